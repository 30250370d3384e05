"""Simulated peaks beside those that other people measured on real cards.

    python benchmarks/estimate_published.py --output benchmarks/results/estimate_published.json

needs timm, torchvision and transformers, in an environment of its own: `pip install --no-deps torchvision timm` beside a
CPU torch, and `pip install transformers`. Two sources, in `benchmarks/data/`:

- xMem (github.com/Stone-ResearchLife/xMem, MIT): 29 training runs on an RTX 3060 or 4060, what the device held less what it
  held with an idle context. CNNs at 86 x 86, language models at up to 128 tokens, in fp32, four steps.
- GPUMemNet (github.com/itu-rad/GPUMemNet): timm models at five micro-batches, what the driver saw on a card of about
  40 GB with cuDNN's benchmark mode on. Context and libraries are in that figure, so one constant is added to the simulated
  one; it is the median over all other models' rows (leave one model out). Rows left out: over 36,000 MiB, those whose
  plain sum of tensors is above 40 GiB, and models whose peak falls as the micro-batch grows (failed runs).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from pathlib import Path

from autoaccum.simulate import profiles
from autoaccum.virtual import phantom

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # also where the package is not installed
MIB = 1 << 20
# The seed and size of an earlier sample of timm's rows: what cuDNN takes in benchmark mode was chosen by them, so they judge nothing.
CHOSEN_ON = (20261121, 160)
CARD_TOTAL = {8318222336: ("rtx-4060", 8318222336)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--xmem", type=Path, default=HERE / "data" / "xmem_peaks_dev.csv")
    parser.add_argument("--timm", type=Path, default=HERE / "data" / "timm_peaks_dev.csv")
    parser.add_argument("--sample", type=int, default=160, help="rows of timm's, drawn with a fixed seed; 0 for none")
    parser.add_argument("--seed", type=int, default=20261128)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    started = time.perf_counter()
    tasks = [("xmem", row) for row in csv.DictReader(given.xmem.open())] if given.xmem.name != "none" else []
    if given.sample:
        tasks += [("timm", row) for row in sampled(given.timm, given.sample, given.seed)]
    with multiprocessing.get_context("spawn").Pool(given.processes, initializer=prepare) as pool:
        rows = list(pool.imap(predicted, tasks, chunksize=1))
    result = {
        "schema": "autoaccum.estimate_published/1",
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 1),
        "xmem": xmem_summary([row for row in rows if row["source"] == "xmem"]),
        "timm": timm_summary([row for row in rows if row["source"] == "timm"]),
        "margins": margins_seen(rows),  # after the constants are there
        "rows": rows,
    }
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("xmem", "timm", "margins", "seconds")}, indent=1))


def sampled(path: Path, count: int, seed: int) -> list[dict[str, str]]:
    """A fixed sample of the rows that can be trusted, none of which a rule was chosen on (`CHOSEN_ON`)."""
    rows = list(csv.DictReader(path.open()))
    by_model: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_model.setdefault(row["timm_model"], []).append(row)
    good = []
    for name in sorted(by_model):
        known = sorted(by_model[name], key=lambda row: int(row["micro_batch"]))
        peaks = [float(row["measured_peak_mib"]) for row in known]
        if any(later < earlier for earlier, later in itertools.pairwise(peaks)):
            continue
        good += [row for row in known if float(row["measured_peak_mib"]) <= 36000 and float(row["naive_faketensor_mib"]) <= 40 * 1024]
    seen = random.Random(CHOSEN_ON[0]).sample(range(len(good)), min(CHOSEN_ON[1], len(good)))
    others = [row for at, row in enumerate(good) if at not in set(seen)]
    return random.Random(seed).sample(others, min(count, len(others)))


# -- in a worker --


def prepare() -> None:
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    declare_torchvision()
    from autoaccum.trace import fake

    fake.enable()


def declare_torchvision() -> None:
    """Makes torchvision importable beside a torch that its C++ library was not built for."""
    import torch

    try:
        import torchvision  # noqa: F401 - whether it comes with its C++ library
    except (ImportError, RuntimeError):
        # What that library would register, and nothing of it is needed here.
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_library"] = library


def predicted(task: tuple[str, dict[str, str]]) -> dict[str, object]:
    source, row = task
    started = time.perf_counter()
    try:
        found = of_xmem(row) if source == "xmem" else of_timm(row)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
    return {"source": source, **row, **found, "seconds": round(time.perf_counter() - started, 2)}


XMEM_CNNS = {
    "ResNet101": "resnet101", "ResNet152": "resnet152", "VGG16": "vgg16", "VGG19": "vgg19", "MnasNet": "mnasnet1_0", "MobeNetV3Small": "mobilenet_v3_small", "MobeNetV3Large": "mobilenet_v3_large", "VGG11": "vgg11",
    "ResNet50": "resnet50", "RegNetX32GF": "regnet_x_32gf", "RegNetY32GF": "regnet_y_32gf", "MobileNetV2": "mobilenet_v2",
    "MobileNetV3Small": "mobilenet_v3_small", "MobileNetV3Large": "mobilenet_v3_large", "RegNetX400MF": "regnet_x_400mf", "RegNetY400MF": "regnet_y_400mf",
    "ConvNeXtTiny": "convnext_tiny", "ConvNeXtBase": "convnext_base",
}  # fmt: skip
TOKENS = 128


def of_xmem(row: dict[str, str]) -> dict[str, object]:
    from autoaccum.virtual.empty_weights import without_memory

    with without_memory():
        job = xmem_job(row["model"], row["optimizer"])
    made = phantom.Phantom([job])
    batch, card = int(row["batch"]), profiles.load("rtx-4060" if row["gpu_total_bytes"] else "rtx-3060-12gb")
    peaks = {position: iterations(made, batch, position, card) for position in ("start", "before-backward")}
    (start, family), (before, _) = peaks["start"], peaks["before-backward"]
    return {"predicted_bytes": start, "predicted_before_backward_bytes": before, "measured_bytes": int(row["nvml_peak_bytes"]), "family": family}


def xmem_job(name: str, optimizer: str):
    """The job of one of xMem's rows. Its loss also returns what the model returned: that stays in a variable until the next
    iteration's takes its place, as in any plain loop."""
    import torch
    from torch.nn.functional import cross_entropy

    from autoaccum import Job

    if name in XMEM_CNNS:
        import torchvision

        made_by = getattr(torchvision.models, XMEM_CNNS[name])
        model = made_by(num_classes=10) if name.startswith(("Mnas", "Mobe", "MobileNetV3")) else made_by()
        sample = (torch.zeros(2, 3, 86, 86), torch.zeros(2, dtype=torch.long))

        def loss(model, batch):
            out = model(batch[0])
            return cross_entropy(out, batch[1]), out

    else:
        model, sample = language_model(name), (torch.zeros(2, TOKENS, dtype=torch.long),)

        def loss(model, batch):
            out = model(input_ids=batch[0], attention_mask=torch.ones_like(batch[0]), labels=batch[0].clone())
            return out.loss, out

    model.train()
    return Job(model, getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3), loss, sample)


def language_model(name: str):
    import transformers

    configs = {
        "distilgpt2": lambda: transformers.GPT2Config(n_layer=6),
        "gpt2": lambda: transformers.GPT2Config(),
        "cerebras111": lambda: transformers.GPT2Config(n_layer=10, n_embd=768, n_head=12, n_inner=3072, activation_function="gelu"),
        "opt125": lambda: transformers.OPTConfig(),
        "gptneo125": lambda: transformers.GPTNeoConfig(num_layers=12, attention_types=[[["global", "local"], 6]], hidden_size=768, num_heads=12),
        "pythia70": lambda: transformers.GPTNeoXConfig(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048, vocab_size=50304),
        "qwen0.5": lambda: transformers.Qwen2Config(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True
        ),
        "t5small": lambda: transformers.T5Config(),
        "t5base": lambda: transformers.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, d_kv=64),
    }
    if name not in configs:
        raise KeyError(f"no configuration for {name!r}: add it to language_model()")
    config = configs[name]()
    auto = transformers.AutoModelForSeq2SeqLM if name.startswith("t5") else transformers.AutoModelForCausalLM
    return auto.from_config(config)


def iterations(made, batch: int, position: str, card, *, limited: bool = True, steps: int = 4, benchmark: bool = False) -> tuple[int, str]:
    """The most that is reserved in a plain loop, and the family of what ran; `zero_grad` at the start of an iteration or just before backward.

    limited: to what the card has beside its context; a cache that would grow beyond is emptied.
    """
    from autoaccum.simulate import margins
    from autoaccum.simulate.allocator import Allocator
    from autoaccum.simulate.kernel_choice import Card
    from autoaccum.simulate.tape import replay

    (job,) = made._jobs
    tape = made.recorded(lambda tracer: plain_loop(job, lambda: made.batch(batch), position, steps, tracer), Card(card.capability, benchmark=benchmark))
    allocator = Allocator(card.total_bytes, available_bytes=card.available_bytes) if limited else Allocator()
    return replay(tape.on(card.cublas_workspace.value, *card.parallel), allocator).peak_reserved_bytes, margins.family(tape.operators)


def plain_loop(job, batch, position: str, steps: int, tracer=None) -> None:
    """What both sources ran: `steps` iterations on a batch that is moved to the card each time."""
    import torch

    from autoaccum.data import batches

    kept: list[object] = []
    for step in range(steps):
        if tracer is not None:
            tracer.window = step
            tracer.on_phase("forward", 0)
        if position == "start":
            job.optimizer.zero_grad()
        inputs = batches.move(batch(), torch.device("cuda"))
        loss, outputs = job.loss(job.model, inputs)
        kept[:] = [outputs]  # and the one before goes
        del outputs
        if position != "start":
            job.optimizer.zero_grad()
        if tracer is not None:
            tracer.on_phase("backward", 0)
        loss.backward()
        if tracer is not None:
            tracer.on_phase("step", 0)
        job.optimizer.step()
        del loss, inputs


def of_timm(row: dict[str, str]) -> dict[str, object]:
    from autoaccum.simulate import profiles
    from autoaccum.virtual import phantom, without_memory

    with without_memory():
        job = timm_job(row["timm_model"])
    made = phantom.Phantom([job])
    peak, family = iterations(made, int(row["micro_batch"]), "start", profiles.load("a100-40gb"), limited=False, steps=3, benchmark=True)
    return {"predicted_bytes": peak, "measured_bytes": int(float(row["measured_peak_mib"]) * MIB), "family": family}


def timm_job(name: str):
    """The job of one of GPUMemNet's rows; its loss returns what the model returned, too."""
    import timm
    import torch
    from torch.nn.functional import cross_entropy

    from autoaccum import Job

    model = timm.create_model(name, pretrained=False)
    model.train()
    channels, height, width = model.default_cfg["input_size"]

    def loss(model, batch):
        out = model(batch[0])
        return cross_entropy(out[0] if isinstance(out, tuple) else out, batch[1]), out

    sample = (torch.zeros(2, channels, height, width), torch.zeros(2, dtype=torch.long))
    return Job(model, torch.optim.Adam(model.parameters(), lr=1e-3), loss, sample)


# -- summaries --


def errors(pairs: list[tuple[float, float]]) -> dict[str, object]:
    relative = [(predicted - measured) / measured for predicted, measured in pairs]
    absolute = sorted(map(abs, relative))
    at = 0.9 * (len(absolute) - 1)
    low, part = int(at), at - int(at)
    ninth = absolute[low] + (absolute[min(low + 1, len(absolute) - 1)] - absolute[low]) * part
    return {
        "rows": len(pairs),
        "median_percent": round(100 * statistics.median(absolute), 2),
        "p90_percent": round(100 * ninth, 2),
        "worst_percent": round(100 * absolute[-1], 2),
        "bias_percent": round(100 * statistics.median(relative), 2),
        "under_estimates_percent": round(100 * sum(each < 0 for each in relative) / len(relative), 1),
    }


def xmem_summary(rows: list[dict]) -> dict[str, object]:
    good = [row for row in rows if "error" not in row]
    if not good:
        return {}

    def of(position, rows):
        return errors([(row["predicted_before_backward_bytes"] if position == "before" else row["predicted_bytes"], row["measured_bytes"]) for row in rows])

    def nearer(row):
        pair = ((row[name], row["measured_bytes"]) for name in ("predicted_bytes", "predicted_before_backward_bytes"))
        return min(pair, key=lambda each: abs(each[0] - each[1]))

    language = [row for row in good if row["family"] == "others"]
    # Where zero_grad stood was not recorded: convolutional nets hardly tell, for language models each position is told.
    rest = [row for row in good if row["family"] != "others"]
    return {
        "start_of_iteration": of("start", good),
        "before_backward": of("before", good),
        "nearer_position": errors([nearer(row) for row in good]),
        "language_models": {"start_of_iteration": of("start", language), "before_backward": of("before", language)} if language else {},
        "convolutions": of("start", rest) if rest else {},
        "xmem_itself": errors([(int(row["xmem_bytes"]), row["measured_bytes"]) for row in good if row.get("xmem_bytes")]),
        "dnnmem": errors([(int(row["dnnmem_bytes"]), row["measured_bytes"]) for row in good if row.get("dnnmem_bytes")]),
        "failed": [f"{row['model']}: {row['error']}" for row in rows if "error" in row],
    }


def margins_seen(rows: list[dict]) -> dict[str, object]:
    """How far the real peak was above and below the simulated one, 5 % of the rows of a family beyond either; language
    models of xMem's with the nearer position of zero_grad. Rows that cannot be right (less than their plain sum of
    tensors was measured) are left out."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if "error" in row or float(row.get("naive_faketensor_mib") or 0) > float(row.get("measured_peak_mib") or 0):
            continue
        simulated = [row["predicted_bytes"] + row.get("constant_bytes", 0)]
        if row.get("predicted_before_backward_bytes"):
            simulated.append(row["predicted_before_backward_bytes"])
        ratios.setdefault(row["family"], []).append(min((row["measured_bytes"] / each - 1 for each in simulated), key=abs))
    found = {}
    for family, seen in ratios.items():
        seen.sort()
        low, high = seen[int(0.05 * len(seen))], seen[min(int(0.95 * len(seen)), len(seen) - 1)]
        found[family] = {"low": round(max(-low, 0.0), 3), "high": round(max(high, 0.0), 3), "rows": len(seen)}
    return found


def timm_summary(rows: list[dict]) -> dict[str, object]:
    good = [row for row in rows if "error" not in row]
    if not good:
        return {}
    rest = {}
    for row in good:
        rest.setdefault(row["timm_model"], []).append(row["measured_bytes"] - row["predicted_bytes"])
    pairs, constants = [], []
    for row in good:
        constant = statistics.median([each for model, found in rest.items() if model != row["timm_model"] for each in found])
        constants.append(constant)
        pairs.append((row["predicted_bytes"] + constant, row["measured_bytes"]))
        row["constant_bytes"] = constant
    return {
        "leave_one_model_out": errors(pairs),
        "constant_mib": [round(min(constants) / MIB), round(max(constants) / MIB)],
        "failed": [f"{row['timm_model']}: {row['error']}" for row in rows if "error" in row],
    }


def table(document: dict) -> str:
    """The README's table."""
    xmem, timm = document["xmem"], document["timm"]
    lines = [
        ("xMem's runs, torchvision and GPT-2 layouts on an RTX 3060 or 4060", xmem["start_of_iteration"]),
        ("the same, zero_grad where it agrees better (not recorded)", xmem["nearer_position"]),
        ("xMem's own prediction of these", xmem["xmem_itself"]),
        ("DNNMem's prediction of these", xmem["dnnmem"]),
        ("timm models, a card of 40 GB, one constant from the other models", timm["leave_one_model_out"]),
    ]
    head = "| | rows | median error | 90th percentile | worst | too low |\n| --- | --- | --- | --- | --- | --- |"
    row = "| {} | {rows} | {median_percent:.1f}% | {p90_percent:.1f}% | {worst_percent:.0f}% | {under_estimates_percent:.0f}% |"
    return "\n".join([head, *(row.format(name, **each) for name, each in lines)])


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "timm", "torchvision", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


if __name__ == "__main__":
    main()
