"""Every recorded trace of a card's allocator, replayed by the rules as they are now.

    python benchmarks/gpu/replayed.py --output benchmarks/results/gpu_allocator.json

The rows of `gpu.json` were judged when they were measured, some by rules that these very recordings corrected. Needs no card.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import recorder  # noqa: E402 # benchmarks are scripts: what they share lies beside them
import virtual  # noqa: E402


def recorded() -> Iterator[tuple[str, str, bool, str]]:
    """Of each trace its name, the allocator's setting, whether a cap was set, and what was recorded."""
    for path in sorted(RESULTS.glob("gpu-long-*.jsonl")):
        for line in path.read_text().splitlines():
            name, text = json.loads(line)
            if not name.endswith(" recording"):
                continue
            name = name.removesuffix(" recording")
            what = name[2:]
            if name.startswith("A ") and what in virtual.SETTINGS:  # random requests, many in a line
                yield from ((name, what, "capped" in what, each) for each in json.loads(text))
            else:  # a job
                yield name, what.split(", ")[-1] if name.startswith("A ") else "default", False, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    measured = json.loads((RESULTS / "gpu.json").read_text())
    total = next(row["total"] for name, row in measured["rows"].items() if name.startswith("A ") and "total" in row)
    traces, exact, apart = Counter[str](), Counter[str](), []
    for name, setting, capped, text in recorded():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = virtual.SETTINGS[setting]
        found = virtual.judged(recorder.unpacked(text), total, virtual.CAP_BYTES if capped else None)
        kind = ("random requests, " if name[2:] in virtual.SETTINGS else "jobs, ") + setting
        traces[kind] += 1
        exact[kind] += found["exact"]
        if not found["exact"]:
            apart.append({"name": name, **found})
    result = {
        "schema": "autoaccum.gpu_allocator/1",
        "machine": measured["machine"],
        "traces": sum(traces.values()),
        "exact": sum(exact.values()),
        "by_kind": {kind: {"traces": count, "exact": exact[kind]} for kind, count in sorted(traces.items())},
        "apart": apart,
    }
    if given.output:
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
