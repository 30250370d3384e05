"""Accumulation arithmetic, and plans as files."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoaccum import PlanError
from autoaccum.plan import arithmetic
from autoaccum.plan.plan import Plan
from autoaccum.plan.record import PlannedDevice, TrialRecord
from tests.command_line import ROOT

GIB = 2**30


def tried(size, steps, outcome, phase, peak, full=False):
    return TrialRecord(size, steps, outcome, phase, peak, 1.5, full=full)


T4 = Plan(
    target_batch=512,
    micro_batch=40,
    accumulation_steps=13,
    micro_batches=arithmetic.micro_batches(512, 13),
    share=512,
    shares=(512,),
    rank=0,
    world_size=1,
    largest_fit=40,
    smallest_refused=43,
    device=PlannedDevice("cuda", "Tesla T4", "0f2e", int(14.6 * GIB), int(14.2 * GIB), 0),
    shapes={"input_ids": (40, 512)},
    budget_bytes=int(13.8 * GIB),
    peak_bytes=int(12.9 * GIB),
    outside_bytes=0,
    headroom_bytes=int(0.4 * GIB),
    samples_per_second=11.5,
    trials=(
        tried(1, 512, "fits", "step", 2 * GIB),
        tried(16, 32, "fits", "step", 6 * GIB),
        tried(43, 12, "oom", "backward", None),
        tried(40, 13, "fits", "step", int(12.9 * GIB), True),
    ),
    seconds=9.2,
    versions={"autoaccum": "0.1.0"},
    job_fingerprint="0123456789abcdef",
    job="train.py:make_job",
    arithmetic=((int(14.6 * GIB), "total"), (int(0.4 * GIB), "python 8123 (another user)"), (int(0.4 * GIB), "headroom")),
    hints=("frameworks need equal micro-batches: --equal gives 32 x 16",),
)


@given(share=st.integers(1, 100_000), data=st.data())
def test_micro_batches_sum_to_the_share_and_differ_by_at_most_one(share, data):
    steps = data.draw(st.integers(1, min(share, 5000)))
    sizes = arithmetic.micro_batches(share, steps)
    assert sum(sizes) == share and len(sizes) == steps
    assert max(sizes) - min(sizes) <= 1 and list(sizes) == sorted(sizes, reverse=True)
    assert max(sizes) == math.ceil(share / steps)


@given(target=st.integers(1, 100_000), world=st.integers(1, 64))
def test_shares_of_ranks_sum_to_the_target_also_where_ranks_outnumber_samples(target, world):
    shares = arithmetic.even_shares(target, world)
    assert sum(shares) == target and len(shares) == world and max(shares) - min(shares) <= 1 and min(shares) >= 0


@given(target=st.integers(1, 100_000), largest=st.integers(1, 100_000), world=st.integers(1, 64))
def test_over_ranks_too_the_fewest_steps_are_taken_that_the_largest_allows(target, largest, world):
    for share in set(arithmetic.even_shares(target, world)) - {0}:
        steps = math.ceil(share / largest)
        sizes = arithmetic.micro_batches(share, steps)
        assert max(sizes) <= largest and (steps == 1 or math.ceil(share / (steps - 1)) > largest)


@pytest.mark.parametrize(("share", "steps"), [(5, 6), (5, 0), (0, 1)])
def test_impossible_splits_are_refused(share, steps):
    with pytest.raises(PlanError):
        arithmetic.micro_batches(share, steps)


@given(samples=st.integers(1, 2000))
def test_a_window_of_any_size_is_cut_no_larger_than_the_plans_micro_batch(samples):
    sizes = T4.sizes(samples)
    assert sum(sizes) == samples and max(sizes) <= T4.micro_batch


def test_split_gives_weights_that_sum_to_one_and_the_gradient_of_the_whole():
    on_cpu = replace(T4, device=replace(T4.device, kind="cpu", index=None))
    inputs = torch.randn(95, 3, dtype=torch.float64)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (inputs @ weight).square().mean().backward()
    whole, weight.grad = weight.grad, None
    pieces = list(on_cpu.split(inputs))
    assert [each.samples for each in pieces] == [32, 32, 31] and [each.last for each in pieces] == [False, False, True]
    assert math.isclose(sum(each.weight for each in pieces), 1.0, rel_tol=1e-15)
    for each in pieces:
        ((each.batch @ weight).square().mean() * each.weight).backward()
    torch.testing.assert_close(weight.grad, whole, rtol=1e-12, atol=0)


def test_split_weights_by_a_count_of_the_users():
    on_cpu = replace(T4, device=replace(T4.device, kind="cpu", index=None), micro_batch=2)
    tokens = torch.tensor([[1.0], [2.0], [3.0]])
    assert [each.weight for each in on_cpu.split(tokens, count=lambda batch: batch.sum())] == [0.5, 0.5]


def test_a_plan_survives_its_file(tmp_path):
    path = tmp_path / "plan.json"
    T4.save(path)
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]
    with pytest.warns(UserWarning, match="Tesla T4"):  # it was made on another device than this machine has
        assert Plan.load(path) == T4


@pytest.mark.parametrize(("content", "says"), [("{", "is not a plan"), ("[]", "its schema is None"), ('{"schema": "autoaccum.plan/1"}', "not a whole plan")])
def test_a_file_that_is_no_plan_is_told(tmp_path, content, says):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PlanError, match=says):
        Plan.load(path)
    with pytest.raises(PlanError, match="there is no plan"):
        Plan.load(tmp_path / "missing.json")


def test_the_document_has_what_the_promise_says():
    promised = (
        "schema job target_batch effective_batch micro_batch accumulation_steps micro_batches share shares largest_fit smallest_refused world_size rank device "
        "shapes budget_bytes peak_bytes outside_bytes headroom_bytes spare_bytes predicted trials seconds samples_per_second versions job_fingerprint warnings"
    )
    document = T4.as_dict()
    assert set(promised.split()) <= set(document) and document["schema"] == "autoaccum.plan/1"
    assert {"kind", "name", "uuid", "total_bytes", "free_bytes"} <= set(document["device"])
    assert {"micro_batch", "accumulation_steps", "outcome", "phase", "peak_bytes", "seconds", "cached"} <= set(document["trials"][0])
    assert json.loads(json.dumps(document)) == document


GOLDEN = {
    "uneven": T4,
    "one_piece": replace(
        T4, target_batch=120, micro_batch=120, accumulation_steps=1, micro_batches=(120,), share=120, shares=(120,), smallest_refused=None, trials=(tried(120, 1, "fits", "step", GIB),),
        hints=(), seconds=0.4,
    ),
    "killed": replace(T4, trials=(*T4.trials[:2], tried(43, 12, "killed", "forward", None), T4.trials[-1]), seconds=95.0),
    "over_budget": replace(T4, trials=(*T4.trials[:2], tried(43, 12, "over-budget", "step", 14 * GIB), T4.trials[-1]), warnings=("BatchNorm (1) sees micro-batches of 40",)),
    "predicted": replace(T4, smallest_refused=None, predicted_refusal=43, trials=T4.trials[:2]),
    "small_limit": replace(
        T4, target_batch=120, accumulation_steps=3, micro_batches=(40,) * 3, share=120, shares=(120,), smallest_refused=60, budget_bytes=485 * 2**20, peak_bytes=435 * 2**20,
        headroom_bytes=15 * 2**20, arithmetic=((500 * 2**20, "limit"), (15 * 2**20, "headroom")), trials=(tried(60, 2, "oom", "step", None), tried(40, 3, "fits", "step", 435 * 2**20, True)),
        allocator="steady malloc",
        device=PlannedDevice("cpu", "AMD EPYC", None, 24 * GIB, 23 * GIB), hints=(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_the_report_is_the_golden_file(name):
    """To accept a change: write the new text into tests/golden by hand, having read it."""
    assert GOLDEN[name].explain() + "\n" == (ROOT / f"tests/golden/{name}.txt").read_text()


def test_notebooks_show_the_report_and_a_table_of_trials():
    html = replace(T4, job="<script>")._repr_html_()
    assert html.startswith("<pre>512 = 40 x 5 + 39 x 8") and html.count("<tr>") == 5 and "ran out in backward" in html and "<script>" not in html


def test_a_plan_prints_as_its_first_line():
    assert str(T4) == "512 = 40 x 5 + 39 x 8     13 micro-batches a step on cuda:0, Tesla T4"


def test_a_file_that_does_not_agree_with_itself_is_told(tmp_path):
    path = tmp_path / "plan.json"
    T4.save(path)
    path.write_text(path.read_text().replace('"share": 512', '"share": 500'))
    with pytest.raises(PlanError, match="does not agree with itself"):
        Plan.load(path)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(PlanError, match="there is no folder"):
        T4.save(tmp_path / "none" / "plan.json")


@pytest.mark.parametrize("empty", [slice(4, 8), slice(0, 8), slice(8, 12), slice(0, 0)])
def test_by_hand_pieces_that_count_nothing_are_left_out(empty):
    """The mean over no labels is nan, and its weight of 0 would not help."""
    labels = torch.arange(12 * 3).view(12, 3) % 5
    labels[empty] = -100
    batch = (torch.randn(12, 3, 4, dtype=torch.float64), labels)

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 5).double()
    loss(model, batch).backward()
    right, model.weight.grad, model.bias.grad = model.weight.grad, None, None
    from tests.plans import by_hand  # which imports this file

    plan = by_hand(None, 12, 4)
    pieces = list(plan.split(batch, count=lambda piece: int((piece[1] != -100).sum())))
    assert sum(piece.weight for piece in pieces) == pytest.approx(1) and [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    for piece in pieces:
        (loss(model, piece.batch) * piece.weight).backward()
    torch.testing.assert_close(model.weight.grad, right, rtol=1e-12, atol=1e-15)
