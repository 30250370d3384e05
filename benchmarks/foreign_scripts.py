"""Training scripts of others, as they are, tuned from outside by the command form; what they print is what is checked.

    python benchmarks/foreign_scripts.py [--output benchmarks/results/foreign_scripts.json]

nanoGPT's train.py says how many tokens an iteration has, in every trial; they must be the target's. The word language model of
pytorch/examples does not accumulate, and steps its parameters by hand: both must be told. Each script is tuned twice under a limit between
what its micro-batches take. Data is made up. nanoGPT behind torchrun puts each rank on a CUDA device of its own, so that part runs where there
are two, and is listed as not run elsewhere.
"""

from __future__ import annotations

import argparse
import array
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
BLOCK, TARGET = 64, 48
NANOGPT = [
    "train.py", "--device=cpu", "--compile=False", "--dtype=float32", "--dataset=made_up", f"--block_size={BLOCK}", "--n_layer=4", "--n_head=4", "--n_embd=128",
    "--max_iters=1", "--eval_iters=1", "--batch_size={micro_batch}",
]  # fmt: skip
WORDS = [
    "main.py",
    "--data",
    "made_up",
    "--model",
    "Transformer",
    "--epochs",
    "1",
    "--dry-run",
    "--batch_size",
    "{micro_batch}",
    "--save",
    "{scratch}/model.pt",
]


def made_up_data(folder):
    draw = random.Random(0)
    (folder / "nanogpt/data/made_up").mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        (folder / "nanogpt/data/made_up" / name).write_bytes(array.array("H", (draw.randrange(50000) for _ in range(50_000))).tobytes())
    (folder / "word_language_model/made_up").mkdir()
    words = [f"w{number}" for number in range(800)]
    for name in ("train.txt", "valid.txt", "test.txt"):
        (folder / "word_language_model/made_up" / name).write_text("\n".join(" ".join(draw.choices(words, k=20)) for _ in range(1200)) + "\n")


def autoaccum(verb, words, folder, *options):
    command = [sys.executable, "-m", "autoaccum", verb, "-b", str(TARGET), "--json", "--timeout", "300", *options, "--", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    started = time.monotonic()
    finished = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    if finished.returncode:
        raise SystemExit(f"{' '.join(words)}\n{finished.stderr[-3000:]}")
    return json.loads(finished.stdout), finished.stderr, time.monotonic() - started


def tuned(name, words, folder, *options):
    """The plans under two limits: what the full target takes, and a third of the way up from one sample."""
    command = [sys.executable, *words] if words[0].endswith(".py") else words
    low, _, _ = autoaccum("check", command, folder, "-m", "1", *options)
    high, _, _ = autoaccum("check", command, folder, "-m", str(TARGET), *options)
    record = {"command": " ".join(command[1:]), "peak_of_one": low["peak_bytes"], "peak_of_all": high["peak_bytes"], "plans": []}
    for part in (1.05, 0.4):
        limit = int((low["peak_bytes"] + part * (high["peak_bytes"] - low["peak_bytes"])) / 0.97)
        plan, said, seconds = autoaccum("tune", command, folder, "--memory-limit", str(limit), *options)
        told = {int(number.replace(",", "")) for number in re.findall(r"tokens per iteration will be: ([\d,]+)", said)}
        record["plans"].append(
            {
                "limit_bytes": limit,
                "plan": f"{TARGET} = {plan['micro_batch']} x {plan['accumulation_steps']}",
                "world_size": plan["world_size"],
                "peak_bytes": plan["peak_bytes"],
                "smallest_refused": plan["smallest_refused"],
                "trials": len(plan["trials"]),
                "seconds": round(seconds, 1),
                "tokens_told": sorted(told),
                "warnings": plan["warnings"],
            }
        )
        print(name, record["plans"][-1]["plan"], sorted(told), f"{seconds:.0f} s", file=sys.stderr, flush=True)
        if name.startswith("nanoGPT"):
            assert told == {TARGET * BLOCK}, told
        else:
            assert any("no {accumulation_steps}" in warning for warning in plan["warnings"])
            assert any("no optimizer of torch made a step" in warning for warning in plan["warnings"])
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each in ("nanogpt", "word_language_model"):
            shutil.copytree(HERE / "foreign" / each, folder / each)
        made_up_data(folder)
        steps = "--gradient_accumulation_steps={accumulation_steps}"
        found = {
            "nanoGPT": tuned("nanoGPT", [*NANOGPT, steps, "--out_dir={scratch}"], folder / "nanogpt"),
            "word_language_model": tuned("word_language_model", WORDS, folder / "word_language_model"),
        }
        if torch.cuda.device_count() > 1:
            words = [
                "torchrun",
                "--standalone",
                "--nproc-per-node",
                "2",
                *NANOGPT,
                "--gradient_accumulation_steps={accumulation_steps_of_all}",
                "--out_dir={scratch}",
            ]
            found["nanoGPT behind torchrun"] = tuned("nanoGPT behind torchrun", [word for word in words if word != "--device=cpu"], folder / "nanogpt")
        else:
            found["nanoGPT behind torchrun"] = "not run: it wants two CUDA devices"
    found["versions"] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    text = json.dumps(found, indent=1)
    print(text)
    if given.output is not None:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
