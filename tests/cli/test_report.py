"""`autoaccum report`: what to give with a report of a fault."""

import json

from tests import jobs, plans
from tests.command_line import autoaccum


def test_it_says_versions_devices_and_the_plan(tmp_path):
    alone = json.loads(autoaccum("report").stdout)
    assert alone["schema"] == "autoaccum.report/1" and alone["versions"]["torch"] and alone["devices"][-1]["kind"] and alone["plan"] is None
    path = tmp_path / "plan.json"
    plans.by_hand(jobs.small(), 12, 4).save(path)
    assert json.loads(autoaccum("report", path).stdout)["plan"]["target_batch"] == 12


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    told = autoaccum("report", tmp_path / "plan.json")
    assert told.returncode == 2 and "Traceback" not in told.stderr
