"""Model families that train on the CPU: which of them can be traced on a card that is not here.

    python benchmarks/families.py --output benchmarks/results/families.json

Small configurations of every family of transformers' causal, masked, sequence-to-sequence, image, speech and CTC models, and of torchvision's,
timm's and diffusers' models where these are installed. A family counts if forward and backward run on the CPU; it traces if one window of it
runs on simulated CUDA tensors of an A100 and of a T4.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import estimate_published  # beside this file

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
SMALL = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32, "intermediate_size": 64, "d_ff": 64, "d_kv": 8,
    "ffn_dim": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_inner": 64, "n_inner": 64, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2, "num_decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_head": 8, "vocab_size": 128, "max_position_embeddings": 64, "n_positions": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_num_experts": 4, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1, "image_size": 32, "patch_size": 8, "num_labels": 5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "rotary_dim": 4, "layer_types": None,
}  # fmt: skip
TASKS = (
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "CTC",
    "SEQUENCE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
)


def of_transformers(task: str, config_class: Any, model_class: Any) -> Callable[[], tuple[Any, dict[str, Any]]]:
    """A function that builds a small model of a family, and a batch for it."""
    import torch

    def build() -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(0)
        known = config_class()
        for name, value in SMALL.items():
            if name != "layer_types" and isinstance(getattr(known, name, None), (int, type(None))) and hasattr(known, name):
                with suppress(Exception):
                    setattr(known, name, value)
        for name in ("layer_types", "mlp_layer_types"):
            if isinstance(getattr(known, name, None), list):
                setattr(known, name, getattr(known, name)[:2])
        if hasattr(known, "_attn_implementation"):
            known._attn_implementation = None
        with suppress(Exception):
            known = config_class(**{name: value for name, value in SMALL.items() if value is not None and hasattr(known, name)})
        make = model_class[0] if isinstance(model_class, tuple) else model_class
        with torch.device("meta"):
            if sum(parameter.numel() for parameter in make(known).parameters()) > 30e6:
                raise ValueError("not small")
        model = make(known).train()
        ids = torch.randint(3, 100, (2, 16))
        if task in ("IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION"):
            side = getattr(known, "image_size", 32)
            side = side if isinstance(side, int) and side <= 64 else 64
            labels = torch.randint(0, 2, (2,)) if task == "IMAGE_CLASSIFICATION" else torch.randint(0, 2, (2, side, side))
            return model, {"pixel_values": torch.randn(2, getattr(known, "num_channels", 3), side, side), "labels": labels}
        if task in ("CTC", "AUDIO_CLASSIFICATION"):
            name = model.main_input_name
            values = (
                torch.randn(2, 4000)
                if name == "input_values"
                else torch.randn(2, 64, getattr(known, "num_mel_bins", getattr(known, "input_feat_per_channel", 80)))
            )
            return model, {name: values, "labels": torch.randint(1, 20, (2, 4)) if task == "CTC" else torch.randint(0, 2, (2,))}
        if task == "SEQUENCE_CLASSIFICATION":
            return model, {"input_ids": ids, "labels": torch.randint(0, 2, (2,))}
        return model, {"input_ids": ids, "labels": ids}

    return build


def families() -> Iterator[tuple[str, Callable[[], tuple[Any, dict[str, Any]]]]]:
    """The name of each family, and what builds a small model of it and a batch."""
    from transformers.models.auto import modeling_auto

    for task in TASKS:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING")
        for config_class in mapping:
            with suppress(Exception):
                yield f"transformers {task.lower()} {config_class.model_type}", of_transformers(task, config_class, mapping[config_class])
    with suppress(ImportError):
        yield from of_torchvision()
    with suppress(ImportError):
        yield from of_timm()
    with suppress(ImportError):
        yield from of_diffusers()


def of_torchvision() -> Iterator[tuple[str, Callable[[], tuple[Any, dict[str, Any]]]]]:
    """One model of each of torchvision's classification and segmentation families."""
    import torch
    from torchvision import models

    seen = set()
    for name in models.list_models(module=models) + models.list_models(module=models.segmentation):
        family = models.get_model_builder(name).__module__
        if family in seen:
            continue
        seen.add(family)

        def build(name: str = name) -> tuple[Any, dict[str, Any]]:
            side = 299 if "inception" in name else 224
            extra = {"weights_backbone": None} if "segmentation" in models.get_model_builder(name).__module__ or "lraspp" in name else {}
            return models.get_model(name, weights=None, **extra).train(), {"images": torch.randn(2, 3, side, side)}

        yield f"torchvision {name}", build


def of_timm() -> Iterator[tuple[str, Callable[[], tuple[Any, dict[str, Any]]]]]:
    """The first model of each of timm's families."""
    import timm
    import torch

    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if not names:
            continue

        def build(name: str = min(names, key=len)) -> tuple[Any, dict[str, Any]]:
            model = timm.create_model(name, pretrained=False).train()
            side = model.default_cfg.get("input_size", (3, 224, 224))[-1]
            return model, {"images": torch.randn(2, 3, side, side)}

        yield f"timm {module}", build


def of_diffusers() -> Iterator[tuple[str, Callable[[], tuple[Any, dict[str, Any]]]]]:
    """UNets, a transformer and an autoencoder of diffusers."""
    import diffusers
    import torch

    def unet() -> tuple[Any, dict[str, Any]]:
        model = diffusers.UNet2DModel(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )
        return model, {"images": torch.randn(2, 3, 16, 16), "timestep": torch.randint(0, 100, (2,))}

    def conditioned() -> tuple[Any, dict[str, Any]]:
        model = diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        return model, {"images": torch.randn(2, 4, 16, 16), "timestep": torch.randint(0, 100, (2,)), "encoder_hidden_states": torch.randn(2, 8, 32)}

    def transformer() -> tuple[Any, dict[str, Any]]:
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=16, num_embeds_ada_norm=10
        )
        return model, {"images": torch.randn(2, 4, 16, 16), "timestep": torch.randint(0, 100, (2,)), "class_labels": torch.randint(0, 10, (2,))}

    def autoencoder() -> tuple[Any, dict[str, Any]]:
        return diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8), {"images": torch.randn(2, 3, 32, 32)}

    yield from (
        ("diffusers UNet2D", unet),
        ("diffusers UNet2DCondition", conditioned),
        ("diffusers DiT", transformer),
        ("diffusers AutoencoderKL", autoencoder),
    )


def loss(model: Any, batch: dict[str, Any]) -> Any:
    """A loss of any model: its own, or the mean square of what it returns."""
    import torch
    from torch.utils._pytree import tree_leaves

    given = dict(batch)
    images = given.pop("images", None)
    out = model(**given) if images is None else model(images, **given)
    own = getattr(out, "loss", None)
    if own is not None:
        return own
    values = out.to_tuple() if hasattr(out, "to_tuple") else out
    return sum(value.float().square().mean() for value in tree_leaves(values) if isinstance(value, torch.Tensor) and value.requires_grad)


def on_the_cpu(build: Callable[[], tuple[Any, dict[str, Any]]]) -> bool:
    """True if a small model of the family trains on the CPU."""
    try:
        model, batch = build()
        loss(model, batch).backward()
    except Exception:  # not built by this generic configuration, or not by these inputs
        return False
    return True


def names_that_train(names: list[str]) -> list[str]:
    """Those of these families that train on the CPU."""
    wanted = set(names)
    return [name for name, build in families() if name in wanted and on_the_cpu(build)]


def traced(build: Callable[[], tuple[Any, dict[str, Any]]]) -> str:
    """ "" if the family traces on both cards, otherwise the error."""
    import torch

    import autoaccum
    from autoaccum.simulate import Card
    from autoaccum.virtual.phantom import Phantom

    try:
        model, batch = build()
        job = autoaccum.Job(model, torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad]), loss, batch)
        phantom = Phantom([job])
        for capability in (80, 75):
            phantom.tape([(2,), (2, 2)], Card(capability))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    return ""


@click.command()
@click.option("--only", default="", help="families whose name holds this")
@click.option("--output", type=click.Path(path_type=Path))
def main(only: str, output: Path | None) -> None:
    """Tries every family, first on the CPU, then on simulated cards."""
    import torch

    from autoaccum.trace import fake

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.setrecursionlimit(10000)
    if importlib.util.find_spec("torchvision"):
        estimate_published.declare_torchvision()
    built = [(name, build) for name, build in families() if only in name]
    # A process that has run backward on the CPU cannot fake CUDA tensors any more.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        trained = pool.apply(names_that_train, ([name for name, _ in built],))
    trains = [(name, build) for name, build in built if name in trained]
    fake.enable()
    result = {name: traced(build) for name, build in trains}
    failed = {name: error for name, error in result.items() if error}
    libraries = {}
    for name, error in result.items():
        of = libraries.setdefault(" ".join(name.split()[:2]) if name.startswith("transformers") else name.split()[0], [0, 0])
        of[0] += 1
        of[1] += not error
    document = {
        "schema": "autoaccum.families/1",
        "versions": versions(),
        "tried": len(built),
        "train_on_cpu": len(result),
        "trace": len(result) - len(failed),
        "by_kind": {kind: {"train_on_cpu": count, "trace": good} for kind, (count, good) in libraries.items()},
        "families": sorted(result),
        "failed": failed,
    }
    for name, error in failed.items():
        click.echo(f"{name}: {error}")
    click.echo(f"{document['trace']} of {document['train_on_cpu']} families that train on the CPU trace ({len(built)} tried)")
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.flush()
    os._exit(0)  # what was put into torch's tables is gone before its own destructors run


def versions() -> dict[str, str]:
    """The versions of the libraries that were tried."""
    import importlib.metadata

    found = {}
    for name in ("torch", "transformers", "torchvision", "timm", "diffusers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


if __name__ == "__main__":
    main()
