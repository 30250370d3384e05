"""`autoaccum fleet`: shares, words and failures for cards that are not here."""

import json
from dataclasses import replace

import pytest

import autoaccum
from autoaccum.distributed.speed_curves import AffineCurve
from autoaccum.plan.plan import Plan, PlannedDevice
from autoaccum.simulate import profiles
from autoaccum.trace.operator_work import OperatorWork
from autoaccum.virtual.roofline import traced_curves
from tests.command_line import autoaccum as command
from tests.command_line import document
from tests.plans import by_hand

BY_HAND = {"fixed": "2.31GiB", "per_sample": "1.25GiB"}
THREE_KINDS = ("fleet", "--gpus", "2*a100-80gb,4*t4,1*rtx-4090", "--target-batch", 480, "--fixed", "2.31GiB", "--per-sample", "1.25GiB")


def test_the_table_and_the_document_say_the_same():
    text = command(*THREE_KINDS).stdout
    told = document(command(*THREE_KINDS, "--json"))
    assert told["schema"] == "autoaccum.fleet/1" and sum(each["share"] for each in told["ranks"]) == 480
    assert [each["gpu"] for each in told["ranks"]] == ["a100-80gb"] * 2 + ["t4"] * 4 + ["rtx-4090"]
    for each in told["ranks"]:
        assert sum(each["micro_batches"]) == each["share"] and max(each["micro_batches"]) <= each["largest_micro_batch"]
        assert len(each["micro_batches"]) == each["accumulation_steps"] and each["predicted_seconds"] <= told["predicted_window_seconds"]
    low, high = told["predicted_window_seconds_interval"]
    assert low < told["predicted_window_seconds"] < high and told["equal_split_seconds"] > 2 * told["predicted_window_seconds"]
    assert text.startswith("480 samples a step over 7 ranks; no times: they need a JOB, or --flops-per-sample") and " ms" not in text and not told["has_times"]
    assert f"an even split would take {told['equal_split_seconds'] / told['predicted_window_seconds']:.2f} times as long" in text
    timed = command(*THREE_KINDS, "--flops-per-sample", "1e12").stdout
    assert timed.startswith("480 samples a step over 7 ranks; times are estimates\n") and "an even split would take " in timed and " ms (" in timed
    assert "note: t4 has no native bf16" in text and "without t4: " in text and "assumed: times go as 1/bandwidth" in text


def test_more_memory_or_speed_is_more_share():
    found = autoaccum.fleet("a100-80gb,t4", target_batch=100, **BY_HAND)
    assert found.fleet.shares[0] > 4 * found.fleet.shares[1] > 0
    faster = autoaccum.fleet("a100-80gb,t4", target_batch=100, **BY_HAND, flops_per_sample=1e15)
    assert faster.fleet.shares[1] < found.fleet.shares[1] or faster.window_seconds > found.window_seconds


def test_figures_by_hand_are_what_the_roofline_says():
    found = autoaccum.fleet("t4", target_batch=10, **BY_HAND, parameters=100e6, flops_per_sample=1e12, bytes_per_sample=1e9, link=1e9)
    curve = found.fleet.curves[0]
    assert isinstance(curve, AffineCurve)
    # fp16: 65e12 operations a second at 42 %, 320e9 bytes a second at 70 %; README of the formula: autoaccum/virtual/roofline.py.
    assert curve.sample_seconds == pytest.approx(1e12 / (65e12 * 0.42))
    assert curve.step_seconds == pytest.approx(0.012 + 1e9 / (320e9 * 0.7))
    assert curve.window_seconds == pytest.approx(2.8e9 / (320e9 * 0.7))
    assert found.link_seconds == 0.0  # one rank
    assert autoaccum.fleet("2*t4", target_batch=10, **BY_HAND, parameters=100e6, link=1e9).link_seconds == pytest.approx(0.4)


def test_a_card_that_cannot_hold_one_sample_gets_none():
    done = command("fleet", "-b", 12, "--gpus", "a100-80gb,t4", "--fixed", "1GiB", "--per-sample", "20GiB")
    assert done.returncode == 0 and "t4 cannot hold one sample: it gets none" in done.stdout and "times as long: leave it out" in done.stdout
    assert "an even split does not fit" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("-b", 12, "--gpus", "t4", "--fixed", "1GiB", "--per-sample", "20GiB"), 3, "no rank can hold one sample"),
        (("-b", 12, "--gpus", "a100-80gb,t4", "--fixed", "16GiB", "--per-sample", "1GiB"), 3, "t4 cannot hold what is fixed: 16.0 GiB of"),
        (("-b", 120, "--gpus", "7*t4", "--fixed", "1GiB", "--per-sample", "1GiB", "--equal"), 2, "119 and 126 do"),
        (("-b", 120, "--gpus", "2*a100,t5", "--fixed", "1GiB", "--per-sample", "1GiB"), 2, "the nearest are a100-40gb, a100-80gb"),
        (("-b", 120, "--gpus", "0*t4", "--fixed", "1GiB", "--per-sample", "1GiB"), 2, "how many must be a whole number, at least 1"),
        (("-b", 120, "--gpus", "t4,,t4", "--fixed", "1GiB", "--per-sample", "1GiB"), 2, "names no card"),
        (("-b", 120, "--gpus", "t4", "--fixed", "1GiB"), 2, "belong together"),
        (("-b", 120, "--gpus", "t4"), 2, "fleet needs a JOB"),
        (("-b", 120, "--gpus", "t4", "demo", "--fixed", "1GiB", "--per-sample", "1GiB"), 2, "either a JOB, or both"),
        (
            (
                "-b",
                120,
            ),
            2,
            "name the cards",
        ),
        (("--gpus", "t4"), 2, "--target-batch"),
        (("-b", 120, "--gpus", "-1*t4", "--fixed", "1GiB", "--per-sample", "1GiB"), 2, "how many must be a whole number"),
        (("-b", 120, "--gpus", "t4", "--fixed", "1GiB", "--per-sample", "1GiB", "--flops-per-sample", "nan"), 2, "flops_per_sample must be a number above 0"),
        (("-b", 120, "--gpus", "t4", "--fixed", "1GiB", "--per-sample", "1GiB", "--link", "0"), 2, "a size must be more than nothing"),
        (("-b", 120, "--gpus", "t4", "--fixed", "1GiB", "--per-sample", "1GiB", "--parameters", "7e9"), 2, "cannot lie in 1.0 GiB of fixed bytes"),
        (("-b", 120, "--gpus", "t4", "--fixed", "1GiB", "--per-sample", "1GiB", "--dtype", "fp8"), 2, "'fp8': it must be one of"),
        (("-b", 120, "--gpus", "24GiB", "--fixed", "1GiB", "--per-sample", "1GiB"), 2, "nobody says how fast 24GiB is"),
        (
            ("-b", 120, "--gpus", "t4", "--fixed", "1GiB", "--per-sample", "1GiB", "--dtype", "bf16", "--flops-per-sample", 1e9),
            2,
            "nobody says how fast t4 is in bf16",
        ),
    ],
)
def test_bad_input_is_one_sentence(words, code, said):
    done = command("fleet", *words)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr and not done.stdout
    assert document(command("fleet", *words, "--json"))["exit_code"] == code


def test_lockstep_and_equal_plans():
    found = autoaccum.fleet("a100-80gb,2*t4", target_batch=96, **BY_HAND, lockstep=True)
    steps = {len(found.fleet.sizes(rank, 96)) for rank in range(3)}
    assert len(steps) == 1 and sum(found.fleet.shares) == 96
    free = autoaccum.fleet("a100-80gb,2*t4", target_batch=96, **BY_HAND)
    assert free.window_seconds <= found.window_seconds and free.lockstep_seconds == pytest.approx(found.window_seconds)
    assert autoaccum.fleet("a100-80gb,2*t4", target_batch=96, **BY_HAND, equal=True).fleet.shares == (32, 32, 32)


def test_a_job_is_simulated_on_every_card():
    done = command("fleet", "examples/tiny_gpt.py:make_job", "-b", 4096, "--gpus", "2*t4,a100-40gb", "-q", "--json")
    assert done.returncode == 0, done.stderr
    told = document(done)
    assert sum(each["share"] for each in told["ranks"]) == 4096 and told["job"] == "examples/tiny_gpt.py:make_job"
    assert told["ranks"][2]["largest_micro_batch"] > told["ranks"][0]["largest_micro_batch"] > 0


WIDE = """
import torch, autoaccum

def make_job():
    model = torch.nn.Sequential(torch.nn.Linear(5000, 5000), torch.nn.Linear(5000, 1))
    model[1].requires_grad_(False)
    return autoaccum.Job(model, torch.optim.SGD(model[0].parameters(), lr=0.1), lambda m, b: m(b).mean(), torch.zeros(4, 5000))
"""


def test_parameters_that_are_stepped_are_counted_and_cross_between_ranks(tmp_path):
    (tmp_path / "wide.py").write_text(WIDE)
    told = document(command("fleet", f"{tmp_path}/wide.py:make_job", "-b", 512, "--gpus", "2*t4", "--link", "1GB", "-q", "--json"))
    crossing = 4 * (5000 * 5000 + 5000) / 1e9  # two ranks send and receive the gradients once
    slowest = max(each["predicted_seconds"] for each in told["ranks"])
    assert told["predicted_window_seconds"] - slowest == pytest.approx(crossing, rel=0.01)


CONVOLUTIONS = """
import torch, autoaccum
from torch import nn

def make_job():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.Flatten(), nn.LazyLinear(10))
    model(torch.zeros(2, 3, 32, 32))
    return autoaccum.Job(
        model, torch.optim.Adam(model.parameters()), lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]),
        (torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)), autocast=torch.float16,
    )
"""


def test_convolutions_have_times_too(tmp_path):
    (tmp_path / "conv.py").write_text(CONVOLUTIONS)
    done = command("fleet", f"{tmp_path}/conv.py:make_job", "-b", 256, "--gpus", "a100-40gb,t4", "-q", "--json")
    assert done.returncode == 0, done.stderr
    told = document(done)
    assert told["has_times"] and 0 < told["predicted_window_seconds_interval"][0] < told["predicted_window_seconds"]
    assert told["ranks"][0]["share"] > told["ranks"][1]["share"] > 0


def test_no_time_is_beyond_the_cards_peak_and_other_courses_are_taken_as_a_whole():
    card = profiles.load("a100-40gb")

    def works(samples, calls=1):
        return [OperatorWork("forward", 1e12 * samples / calls, 1e8, "tf32")] * calls + [
            OperatorWork("backward", 0.0, 3e9 * samples, "fp32"),
            OperatorWork("step", 0.0, 1e9, "fp32"),
        ]

    slow, middle, fast = traced_curves(card, 16, (2, works(2)), (4, works(4)))
    least = 16 * (1e12 / card.flops["tf32"].value + 3e9 / card.bandwidth.value)
    assert least <= fast.seconds(16) - fast.window_seconds < middle.seconds(16) < slow.seconds(16)
    assert fast.window_seconds >= 1e9 / card.bandwidth.value
    other = traced_curves(card, 16, (2, works(2)), (4, works(4, calls=2)))[1]
    assert other.seconds(16) == pytest.approx(middle.seconds(16), rel=0.05)
    alone = traced_curves(card, 1, (2, works(2)), (4, works(4)))[1]
    assert alone.seconds(1) == pytest.approx(alone.window_seconds + alone.sample_seconds)


def test_ranks_load_the_plan_that_was_written(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    done = command(*THREE_KINDS, "-o", path)
    assert done.returncode == 0
    whole = Plan.load(path)  # without torchrun: to look at
    assert whole.world_size == 7 and whole.predicted and "480 = " in str(whole)
    json.loads(path.read_text())
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.setenv("LOCAL_RANK", "0")
    parts = []
    for rank in range(7):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.warns(UserWarning, match="the plan was made on "):
            plan = Plan.load(path)
        assert (plan.rank, plan.share, plan.shares) == (rank, sum(plan.micro_batches), whole.shares)
        parts.append(plan.share)
        assert plan.explain().startswith("480 = ")
    assert tuple(parts) == whole.shares
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(autoaccum.PlanError, match="for 7 ranks, and torchrun started 6"):
        Plan.load(path)


TIMES = "gpu,micro_batch,seconds,window_seconds\nt4,1,0.25,0.1\nt4,4,1.0,0.1\na100-80gb,1,0.05,0.02\nTesla T4,8,2.0,\n"


def test_measured_seconds_count_instead_of_estimates(tmp_path):
    table = tmp_path / "times.csv"
    table.write_text(TIMES)
    found = autoaccum.fleet("a100-80gb,4*t4", target_batch=90, **BY_HAND, link=1e15, times=table)
    a100, t4 = found.fleet.curves[0], found.fleet.curves[1]
    assert a100.seconds(10) == pytest.approx(0.02 + 10 * 0.05) and t4.seconds(4) == pytest.approx(0.1 + 4 * 0.25)
    # 20 samples a second on the one and 4 on each of the others: 50 and 10, and all are finished after 2.5 s.
    assert found.fleet.shares[0] in (50, 51) and max(found.fleet.shares[1:]) == 10 and found.window_seconds == pytest.approx(2.6, abs=0.01)
    assert found.has_times and found.interval[0] == found.interval[1] and "(--times)" in found.explain() and " to " not in found.explain()


def test_a_plan_that_was_measured_on_a_card_is_one_timing(tmp_path):
    plan = replace(by_hand(None, 60, 20), device=PlannedDevice("cuda", "Tesla T4", None, 0, 0, 0), samples_per_second=30.0, predicted=False)
    plan.save(tmp_path / "t4.json")
    found = autoaccum.fleet("2*t4", target_batch=100, **BY_HAND, times=[tmp_path / "t4.json"], link=1e15)
    assert found.window_seconds == pytest.approx(50 / 30, rel=0.01)
    known = autoaccum.fleet("t4,a100-80gb", target_batch=100, **BY_HAND, flops_per_sample=1e12, times=[tmp_path / "t4.json"])
    assert known.cards[0].curves[0] == known.cards[0].curves[2] and known.cards[1].curves[0] != known.cards[1].curves[2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "begins with nothing: give a plan"),
        ("card,size\nt4,1\n", "begins with 'card,size': give a plan"),
        ("gpu,micro_batch,seconds\nt4,0,1\n", "line 2: micro_batch must be a whole number from 1 on"),
        ("gpu,micro_batch,seconds\nt4,1,1\nt4,2,nan\n", "line 3: micro_batch must"),
        ("gpu,micro_batch,seconds\nt5,1,1\n", "there is no GPU data file for 't5'"),
        ("gpu,micro_batch,seconds\n", "has no rows"),
        ("gpu,micro_batch,seconds\nl4,1,1\n", "has seconds of l4, and --gpus names t4"),
        ('{"schema": "autoaccum.fleet/1"}', "is no plan: give a plan"),
    ],
)
def test_a_file_that_is_no_table_of_times_is_refused_in_a_sentence(tmp_path, text, says):
    (tmp_path / "times").write_text(text)
    with pytest.raises(autoaccum.UsageError) as refused:
        autoaccum.fleet("t4", target_batch=100, **BY_HAND, times=tmp_path / "times")
    assert says in str(refused.value) and "\n" not in str(refused.value)
