"""What it costs to ask for all known cards at once: seconds and memory of `autoaccum estimate ... --all-gpus`, from a configuration alone.

    python benchmarks/all_cards.py --output benchmarks/results/all_cards.json

needs transformers and peft. Each command runs three times, in processes of its own; the middle one counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODELS = {
    "GPT-2 (124 million), 512 tokens": ({"model_type": "gpt2"}, ["--length", "512"]),
    "Llama-3 8B with LoRA, 2,048 tokens": (
        {
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
        },
        ["--length", "2048", "--lora", "r=16"],
    ),
}  # fmt: skip


def once(config: Path, more: list[str]) -> dict[str, float]:
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "autoaccum", "estimate", f"hf:{config}", "-b", "64", "--all-gpus", *more, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": time.perf_counter() - started,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "largest_process_bytes": after.ru_maxrss * 1024,
        "cards": len(json.loads(done.stdout)["gpus"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows = []
    for name, (config, more) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(config))
            runs = [once(path, more) for _ in range(3)]
        middle = {figure: statistics.median(run[figure] for run in runs) for figure in ("seconds", "processor_seconds", "largest_process_bytes")}
        rows.append({"model": name, "cards": runs[0]["cards"], **{figure: round(value, 2) for figure, value in middle.items()}})
        print(rows[-1])
    document = {"schema": "autoaccum.all_cards/1", "machine": {"cores": os.cpu_count(), "python": platform.python_version()}, "rows": rows}
    if given.output:
        given.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
