"""Takes from the raw results of a card what the tests replay: of every setting of the allocator some traces, and some whole jobs.

    python benchmarks/gpu/golden.py

Reads `gpu.json` and the files beside it in `benchmarks/results`, writes `tests/recordings/h200_allocator.jsonl`: on each line (name,
setting, whether the card was capped, its bytes, the recording).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from virtual import ROOT, SETTINGS

RESULTS = ROOT / "benchmarks" / "results"
OF_EACH = 3  # random traces of a setting
JOBS = ("mlp adam-fp32 8192", "resnet50 adam-bf16+channels_last 32", "mobilenet_v3_large sgd-fp32 64", "gpt2 adam-bf16+checkpointed 2", "t5_small fused-bf16 8")


def recordings() -> Iterator[tuple[str, str]]:
    """(name of the row, text) of every recording."""
    for path in sorted(RESULTS.glob("gpu-long-*.jsonl")):
        for line in path.read_text().splitlines():
            name, text = json.loads(line)
            if name.endswith(" recording"):
                yield name.removesuffix(" recording"), text


def main() -> None:
    rows = json.loads((RESULTS / "gpu.json").read_text())["rows"]
    total = next(row["total"] for name, row in rows.items() if name.startswith("A ") and "total" in row)
    lines = []
    for name, text in recordings():
        what = name[2:]
        if name.startswith("A ") and what in SETTINGS:
            lines += [(f"{what}, {number}", what, "capped" in what, total, each) for number, each in enumerate(json.loads(text)[:OF_EACH])]
        elif name.startswith("A "):
            lines.append((what, what.split(", ")[-1], False, total, text))
        elif name.startswith("D ") and what in JOBS:
            lines.append((what, "default", False, total, text))
    Path(ROOT / "tests" / "recordings" / "h200_allocator.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(lines)} recordings")


if __name__ == "__main__":
    main()
