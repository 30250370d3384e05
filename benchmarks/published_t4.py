"""LoRA and QLoRA runs on a Tesla T4 that others measured, and the same loop on a simulated card.

    python benchmarks/published_t4.py --output benchmarks/results/published_t4.json

needs transformers, peft and bitsandbytes. Source: github.com/Anassbzdd/fitcheck (MIT); `benchmarks/data/t4_lora_dev.csv`. The loop: weights in float16, or packed in nf4 with the rest in
float32; LoRA matrices (q, k, v and o projections) in float32; gradient checkpointing; AdamW on the LoRA parameters; labels are the inputs; the
batch stays on the card; what the model returned is held until the step is over.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # also where the package is not installed

# vocab, hidden, intermediate, layers, heads, key-value heads, tied: from the models' published configurations
SIZES = {
    "Qwen/Qwen2.5-1.5B-Instruct": ("Qwen2Config", 151936, 1536, 8960, 28, 12, 2, True),
    "HuggingFaceTB/SmolLM2-1.7B": ("LlamaConfig", 49152, 2048, 8192, 24, 32, 32, True),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": ("LlamaConfig", 32000, 2048, 5632, 22, 32, 4, False),
    "mistralai/Mistral-7B-Instruct-v0.3": ("MistralConfig", 32768, 4096, 14336, 32, 32, 8, False),
    "deepseek-ai/deepseek-coder-1.3b-instruct": ("LlamaConfig", 32256, 2048, 5504, 24, 16, 16, False),
    "meta-llama/Llama-3.2-1B-Instruct": ("LlamaConfig", 128256, 2048, 8192, 16, 32, 8, True),
}
STEPS = 3  # one to warm up, and two that were measured


def job_of(row: dict[str, str]) -> Any:
    """The job of a row. Needs transformers, peft, and bitsandbytes for rows in nf4."""
    import peft
    import torch
    import transformers

    from autoaccum import Job

    kind, vocab, hidden, intermediate, layers, heads, key_value_heads, tied = SIZES[row["model"]]
    config = getattr(transformers, kind)(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        use_cache=False,
    )
    if row["attention"] == "sdpa":
        import transformers.integrations.sdpa_attention as attention

        attention.use_gqa_in_sdpa = lambda *_, **__: False  # keys and values repeated by hand
    packed = row["quantization"] == "nf4"
    torch.set_default_dtype(torch.float16)
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=row["attention"])
    finally:
        torch.set_default_dtype(torch.float32)
    if packed:
        model = transformers.integrations.bitsandbytes.replace_with_bnb_linear(
            model,
            quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16),
            modules_to_not_convert=["lm_head"],
        )
        model.is_loaded_in_4bit = True
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if type(parameter).__name__ != "Params4bit":
                parameter.data = parameter.data.float()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=int(row["lora_rank"]), lora_alpha=2 * int(row["lora_rank"]), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
        ),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train()
    ids = torch.zeros(2, int(row["seq"]), dtype=torch.long)

    def loss(model, batch):
        out = model(input_ids=batch[0], labels=batch[0])
        return out.loss, out

    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    return Job(model, optimizer, loss, (ids,))


def loop(job: Any, batch: Any, tracer: Any) -> None:
    """What was measured."""
    import torch

    from autoaccum.data import batches

    inputs = batches.move(batch, torch.device("cuda"))
    for step in range(STEPS):
        tracer.window = step
        tracer.on_phase("forward", 0)
        job.optimizer.zero_grad(set_to_none=True)
        loss, outputs = job.loss(job.model, inputs)
        tracer.on_phase("backward", 0)
        loss.backward()
        tracer.on_phase("step", 0)
        job.optimizer.step()
        del loss, outputs


def predicted(row: dict[str, str]) -> dict[str, Any]:
    """The simulated peak of a row, and the measured one, in bytes."""
    from autoaccum.simulate import profiles
    from autoaccum.simulate.allocator import Allocator
    from autoaccum.simulate.kernel_choice import Card
    from autoaccum.simulate.tape import replay
    from autoaccum.virtual import phantom, without_memory

    with without_memory():
        job = job_of(row)
    made, card = phantom.Phantom([job]), profiles.load("t4")
    tape = made.recorded(lambda tracer: loop(job, made.batch(int(row["batch"])), tracer), Card(card.capability))
    replayed = replay(tape.on(card.cublas_workspace.value, *card.parallel), Allocator(card.total_bytes, available_bytes=card.available_bytes))
    return {
        "predicted_bytes": replayed.peak_reserved_bytes,
        "predicted_allocated_bytes": replayed.peak_allocated_bytes,
        "measured_bytes": int(float(row["peak_reserved_mib"]) * 2**20),
        "measured_allocated_bytes": int(float(row["peak_allocated_mib"]) * 2**20),
    }


def prepare() -> None:
    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    from autoaccum.trace import fake

    fake.enable()


def rows_of(path: Path) -> list[dict[str, str]]:
    """One row for each configuration: of repeats, the one with the median reserved peak. Rows that the source excludes are left out."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in csv.DictReader(path.open()):
        if row["role"] != "excluded":
            found.setdefault(tuple(row[name] for name in ("model", "attention", "quantization", "lora_rank", "batch", "seq")), []).append(row)
    return [sorted(rows, key=lambda row: float(row["peak_reserved_mib"]))[len(rows) // 2] for rows in found.values()]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors of the reserved peak, without sign; the 90th percentile is the row below which nine of ten are."""
    errors = sorted(abs(row["predicted_bytes"] / row["measured_bytes"] - 1) for row in rows)
    allocated = sorted(abs(row["predicted_allocated_bytes"] / row["measured_allocated_bytes"] - 1) for row in rows)
    theirs = sorted(abs(float(row["fitcheck_total_mib"]) / float(row["peak_reserved_mib"]) - 1) for row in rows)
    return {
        name: {
            "rows": len(values),
            "median_percent": round(100 * statistics.median(values), 2),
            "p90_percent": round(100 * values[min(int(0.9 * len(values)), len(values) - 1)], 2),
            "worst_percent": round(100 * values[-1], 2),
        }
        for name, values in (("reserved", errors), ("allocated", allocated), ("fitcheck itself, its total", theirs))
    }


def timed(row: dict[str, str]) -> dict[str, Any]:
    started = time.perf_counter()
    return {**row, **predicted(row), "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "data" / "t4_lora_dev.csv")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(given.processes, initializer=prepare) as pool:
        rows = list(pool.imap(timed, rows_of(given.data), chunksize=1))
    result = {
        "schema": "autoaccum.published_t4/1",
        "source": "github.com/Anassbzdd/fitcheck (MIT), Tesla T4, torch 2.10 and 2.14",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "plain weights": summary([row for row in rows if row["quantization"] == "none"]),
        "nf4": summary([row for row in rows if row["quantization"] == "nf4"]),
        "rows": rows,
    }
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("plain weights", "nf4")}, indent=1))


if __name__ == "__main__":
    main()
