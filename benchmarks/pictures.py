"""Draws the README's two pictures: a search that really ran, and a window that was simulated.

    python benchmarks/pictures.py [--folder benchmarks/results]

Needs matplotlib. Takes about a minute and a half.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
JOB = "examples/tiny_gpt.py:make_job"


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False, exists=True), default=ROOT / "benchmarks/results", show_default=True)
def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as nothing_remembered:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "AUTOACCUM_CACHE_DIR": nothing_remembered}
        limited = ("--memory-limit", "560MiB", "--device", "cpu", "--objective", "throughput")
        larger = tuple(word for setting in ("width=1280", "layers=20", "heads=20", "length=512") for word in ("--set", setting))
        for words in (
            ("tune", JOB, "-b", "120", *limited, "--plot", str(folder.resolve() / "search.png")),
            ("estimate", JOB, *larger, "-b", "64", "--gpu", "t4", "--timeline", str(folder.resolve() / "window.png")),
        ):
            subprocess.run([sys.executable, "-m", "autoaccum", *words], cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
