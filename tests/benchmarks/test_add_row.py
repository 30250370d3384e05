"""A row that somebody measured: both peaks, in a file; a failure is the command's own sentence. The device is a simulated card here."""

import csv

import add_row
from click.testing import CliRunner


def test_a_row_has_both_peaks_and_the_next_one_comes_below(tmp_path):
    rows = tmp_path / "rows.csv"
    for micro_batch in (4, 8):
        told = CliRunner().invoke(
            add_row.main, ["tests/jobs.py:small", "-m", str(micro_batch), "--card", "t4", "--device", "virtual:rtx-3090", "--rows", str(rows)]
        )
        assert told.exit_code == 0 and "MiB, simulated" in told.output
    found = list(csv.DictReader(rows.open()))
    assert [row["micro_batch"] for row in found] == ["4", "8"] and tuple(found[0]) == add_row.COLUMNS
    assert all(int(row["measured_bytes"]) > 0 and int(row["simulated_bytes"]) > 0 for row in found)


def test_what_cannot_be_measured_adds_nothing(tmp_path):
    rows = tmp_path / "rows.csv"
    told = CliRunner().invoke(add_row.main, ["tests/jobs.py:small", "-m", "4", "--card", "t5", "--device", "virtual:t4", "--rows", str(rows)])
    assert told.exit_code == 1 and "t5" in told.output and not rows.exists()
