"""Adds a peak that you have measured to the rows that judge the simulated cards.

    python benchmarks/add_row.py train.py:make_job -m 16 --card rtx-3090 --by "your name"

It runs one window of two micro-batches on your card (`autoaccum check`) and the same on the simulated one, appends a line to `benchmarks/data/measured_peaks.csv`,
and prints both peaks. Hand the line in as a pull request: it is shown in docs/simulated_cards.md, and no rule is made from it.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click

ROWS = Path(__file__).resolve().parent / "data" / "measured_peaks.csv"
COLUMNS = ("job", "card", "device", "torch", "micro_batch", "measured_bytes", "simulated_bytes", "by")


def peak(job: str, micro_batch: int, device: str) -> int:
    """The peak of a window of two micro-batches, in bytes. Ends the program with the command's own sentence if it fails."""
    command = [sys.executable, "-m", "autoaccum", "check", job, "-b", str(2 * micro_batch), "-m", str(micro_batch), "-d", device, "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout or "{}")
    if not told.get("peak_bytes"):
        raise click.ClickException(f"on {device}: {told.get('message') or told.get('error') or done.stderr.strip()[-500:]}")
    return int(told["peak_bytes"])


@click.command()
@click.argument("job")
@click.option("-m", "--micro-batch", type=click.IntRange(1), required=True, help="samples of a micro-batch")
@click.option("--card", required=True, help="the simulated card, a name of `autoaccum profiles list`")
@click.option("--device", default="cuda", show_default=True, help="where it is measured")
@click.option("--by", default="", help="who measured it")
@click.option("--rows", type=click.Path(path_type=Path), default=ROWS, help="the file that the row is added to")
def main(job: str, micro_batch: int, card: str, device: str, by: str, rows: Path) -> None:
    """Measures JOB on a card and simulates it, and adds both peaks to the rows."""
    measured, simulated = peak(job, micro_batch, device), peak(job, micro_batch, f"virtual:{card}")
    is_new = not rows.exists()
    with rows.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow((job, card, device, metadata.version("torch"), micro_batch, measured, simulated, by))
    click.echo(f"measured {measured / 2**20:,.0f} MiB, simulated {simulated / 2**20:,.0f} MiB ({simulated / measured - 1:+.1%}); added to {rows}")


if __name__ == "__main__":
    main()
