"""The batch of evaluation: the largest that runs forward only, and nothing is left changed by the search for it."""

import copy

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.errors import UsageError
from tests import command_line
from tests.digest import digest
from tests.jobs import MIB
from tests.seen import Seen
from tests.tuner.test_in_place import limit_for

MODES = Seen()  # (training, with gradients) of every forward; not in the model, where tuning would put it back


class Wide(nn.Module):
    """Half a MiB of activations for each of 12 layers, which only training keeps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 1)

    def forward(self, x):
        MODES.append([self.training, torch.is_grad_enabled()])
        wide = self.inner(x)[:, :1] * torch.ones(MIB // 8)
        for _ in range(12):
            wide = wide * wide
        return wide.mean(1)


def wide_job():
    model = Wide()
    return autoaccum.Job(model, torch.optim.AdamW(model.parameters()), lambda m, b: m(b).mean(), torch.ones(4, 8))


def test_evaluation_holds_many_times_what_training_does_and_the_model_comes_back_as_it_was():
    job = wide_job()
    MODES.clear()
    before = digest(job.model, job.optimizer)
    plan = autoaccum.tune(job, target_batch=64, memory_limit=limit_for(100), evaluate=True)
    # What earlier tests freed is there to use beside the 100 MiB.
    assert plan.micro_batch <= 16 and plan.eval_batch > 2 * plan.micro_batch
    assert plan.eval_peak_bytes <= plan.budget_bytes
    assert [True, True] in MODES and [False, False] in MODES
    assert job.model.training
    assert digest(job.model, job.optimizer) == before
    assert f"evaluation: batches of {plan.eval_batch}" in plan.explain()
    assert autoaccum.Plan.from_dict(plan.as_dict()).eval_batch == plan.eval_batch


def test_the_largest_fits_and_one_that_is_a_tenth_larger_does_not():
    """Run in the same way, under the same limit."""
    limit = limit_for(100)
    asked = Seen()

    def evaluate(model, batch):
        asked.append(len(batch))
        model(batch)

    plan = autoaccum.tune(wide_job(), target_batch=64, memory_limit=limit, evaluate=evaluate)
    assert plan.eval_batch in asked
    refused = sorted(size for size in asked if size > plan.eval_batch)
    assert refused and refused[0] <= 1.1 * plan.eval_batch


def test_the_state_of_the_optimizer_is_resident():
    """AdamW holds two more copies of 40 MiB of parameters than SGD."""

    def plan(optimizer):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 1_200_000, bias=False))
        job = autoaccum.Job(model, optimizer(model.parameters(), lr=1e-3), lambda m, b: m(b).mean(), torch.ones(4, 8))
        return autoaccum.tune(job, target_batch=4, memory_limit=limit_for(400), evaluate=True)

    assert plan(torch.optim.SGD).eval_peak_bytes > 0
    assert plan(torch.optim.AdamW).eval_batch <= plan(torch.optim.SGD).eval_batch - 8  # 80 MiB at 4.6 MiB a sample


def test_without_it_nothing_of_evaluation_is_searched():
    plan = autoaccum.tune(wide_job(), target_batch=8)
    assert plan.eval_batch is None and "evaluation" not in plan.explain()


def test_an_evaluation_that_never_fits_is_told_and_the_plan_stands():
    def evaluate(model, batch):
        return torch.ones(len(batch), 400 * MIB // 4)

    with pytest.warns(UserWarning, match="evaluation does not fit, not even of one sample"):
        plan = autoaccum.tune(wide_job(), target_batch=8, memory_limit=limit_for(200), evaluate=evaluate)
    assert plan.eval_batch is None and plan.micro_batch == 8


def test_a_failing_evaluation_is_the_users_own_error_with_a_note():
    def evaluate(model, batch):
        raise ValueError("no metric")

    job = wide_job()
    state = copy.deepcopy(job.model.state_dict())
    with pytest.raises(ValueError, match="no metric") as caught:
        autoaccum.tune(job, target_batch=8, evaluate=evaluate)
    assert any("raised in evaluate" in note for note in getattr(caught.value, "__notes__", ["raised in evaluate"]))
    assert all(torch.equal(state[name], value) for name, value in job.model.state_dict().items()) and job.model.training


def test_what_is_no_function_is_refused():
    with pytest.raises(UsageError, match="evaluate must be True, or a function"):
        autoaccum.tune(wide_job(), target_batch=8, evaluate=64)


JOB = """
import autoaccum, torch
def make_job():
    model = torch.nn.Sequential(torch.nn.Linear(64, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 1))
    return autoaccum.Job(model, torch.optim.AdamW(model.parameters()), lambda m, b: m(b).mean(), torch.ones(4, 64))
"""


def test_on_the_command_line_in_a_child_process_and_on_a_card_that_is_not_here(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    here = command_line.document(command_line.autoaccum("tune", "job.py", "-b", "64", "--evaluate", "--memory-limit", "700MiB", "--json", cwd=tmp_path))
    assert here["eval_batch"] > 1000 and here["eval_peak_bytes"] <= here["budget_bytes"]
    card = command_line.document(command_line.autoaccum("tune", "job.py", "-b", "64", "--evaluate", "-d", "virtual:1GiB", "--json", cwd=tmp_path))
    assert card["eval_batch"] > 1000
    numbers = command_line.autoaccum("tune", "job.py", "-b", "64", "--evaluate", "-d", "virtual:1GiB", "--format", "env", cwd=tmp_path)
    assert f"export AUTOACCUM_EVAL_BATCH={card['eval_batch']}" in numbers.stdout


def test_a_command_has_no_evaluation_of_its_own():
    told = command_line.autoaccum("tune", "-b", "8", "--evaluate", "--", "python", "train.py", "{micro_batch}")
    assert told.returncode == 2 and "--evaluate is for a JOB" in told.stderr
