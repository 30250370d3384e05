"""The comparison with other systems: its devices are what they say, ours is exact on them, and the README says what the results say."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from tests.command_line import ROOT


def trains(scenario, n):
    """Windows of two micro-batches of n by hand."""
    import simulated
    from work import Samples, Work

    device = simulated.Device(scenario)
    work = Work(2 * n, 15, Samples(10**6, lambda n: {"inputs": torch.ones(n, 1)}), device.build, device=device)
    try:
        work.train((n, n))
    except torch.OutOfMemoryError:
        assert device.ooms == 1
        return False
    assert work.whole_windows == 15 and work.state_unchanged
    return True


def scenarios():
    import simulated  # benchmarks/ is on pytest's path

    return simulated.SCENARIOS


@pytest.mark.parametrize("scenario", scenarios(), ids=lambda each: each.name)
def test_a_simulated_device_runs_out_where_it_says(scenario):
    most = scenario.maximum
    for n in {1, max(most - 1, 1), max(most, 1), most + 1, 2 * most + 1, 80}:
        # Noise is drawn: between the truth, which holds for the worst of it, and the least of it either may be.
        if scenario.fits(n) or not scenario.noise or n > 1.1 * most:
            assert trains(scenario, n) == scenario.fits(n), n


def test_ours_is_exact_on_devices_of_known_truth_and_leaves_nothing_changed():
    names = ["line, 40", "optimizer state at the second step, 40", "gradients of an earlier micro-batch, 48"]
    command = [sys.executable, str(ROOT / "benchmarks" / "contestant.py"), "autoaccum", "autoaccum", "policy"]
    done = subprocess.run(command, input=json.dumps({"only": names}), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    rows = [json.loads(line.removeprefix("told:")) for line in done.stdout.splitlines() if line.startswith("told:")]
    assert len(rows) == 4 * len(names)
    truth = {each.name: each for each in scenarios()}
    for row in rows:
        assert row["survives"] and row["exact"] and row["state_unchanged"] and row["random_unchanged"], row
        assert row["trials"] <= 6 and row["ooms"] <= 1 and not row["later_ooms"]
        assert row["steps"] <= truth[row["scenario"]].fewest(row["target"]) * 1.04 + 1  # 3 % are kept aside


def test_every_file_of_a_peer_says_what_it_needs_and_runs():
    import side_by_side

    for name, adapter in side_by_side.adapters().items():
        assert adapter.SYSTEMS and isinstance(adapter.PACKAGES, tuple) and callable(adapter.run) and adapter.__doc__, name


def test_the_readmes_tables_are_those_of_the_committed_results():
    import report

    text = "".join(page.read_text() for page in report.pages())
    for name, table in report.tables(marked=False).items():
        assert f"<!-- table: {name} -->\n{table}" in text, name


def test_a_table_is_put_into_its_own_place_alone():
    import report

    text = "<!-- table: one -->\n<!-- end of table -->\nkept\n<!-- table: two -->\n| old |\n<!-- end of table -->\n"
    for name in ("one", "two", "one"):
        text = report.put(text, name, f"| {name} |")
    assert text == "<!-- table: one -->\n| one |\n<!-- end of table -->\nkept\n<!-- table: two -->\n| two |\n<!-- end of table -->\n"


def test_a_table_of_peers_that_were_fed_differently_is_refused(monkeypatch):
    """What is compared would be how they are fed."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import tables

    def document(*fed):
        row = {
            "sizes": [4],
            "steps": 1,
            "effective": 4,
            "seconds": 1.0,
            "survives": True,
            "samples_per_second": 1234.5,
            "state_unchanged": True,
            "random_unchanged": True,
        }
        rows = {f"peers system {number}, net": {**row, **({} if how is None else {"fed": how})} for number, how in enumerate(fed)}
        return {"target": 4, "machine": {"card": "A card", "driver": "1", "torch": "2"}, "rows": {"oracle net": {"largest": 4}, **rows}}

    assert "1,234" in tables.peers(document("on the device", "on the device"))
    assert "samples a second" not in tables.peers(document(None, None))  # nobody wrote down how
    for fed in (("on the device", "from the host"), ("on the device", None)):
        with pytest.raises(SystemExit, match=r"they were fed differently \(peers system 0, net: on the device"):
            tables.peers(document(*fed))


def test_on_a_card_every_system_gets_samples_that_lie_there():
    from work import Samples, as_it_is, resident

    samples = resident(Samples(64, lambda n: {"inputs": torch.arange(n).float()}), 6, "meta")
    loaded = next(iter(DataLoader(samples, batch_size=2, collate_fn=as_it_is)))
    batches = [samples.make(3), samples.make(10), loaded]
    assert [each["inputs"].device.type for each in batches] == ["meta"] * 3 and [len(each["inputs"]) for each in batches] == [3, 10, 2]
