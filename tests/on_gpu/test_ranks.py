"""Two ranks that share one real card, each with a cap of its own. Run with `pytest -m gpu`."""

import json
import subprocess
import sys

import pytest

from tests.command_line import ROOT

pytestmark = pytest.mark.gpu


def test_ranks_that_share_a_card_get_shares_and_train(tmp_path):
    path = tmp_path / "ranks.json"
    subprocess.run([sys.executable, str(ROOT / "benchmarks/gpu/ranks.py"), "--output", str(path)], check=True, timeout=590)
    document = json.loads(path.read_text())
    assert {row["engine"] for row in document["rows"]} == {"ddp", "fsdp2"}
    for row in document["rows"]:
        assert "error" not in row, row["error"]
        shares = row["by_rank"][0]["plan"]["shares"]
        assert sum(shares) == 240 and shares[0] >= shares[-1] > 0
        for rank in row["by_rank"]:
            assert rank["windows"] == 50 and rank["ooms"] == 0 and rank["losses"] == row["by_rank"][0]["losses"]
            assert rank["losses"][-1] < rank["losses"][0]
