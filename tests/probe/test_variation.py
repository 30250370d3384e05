"""Memory that grows from window to window is told before training runs out of it; what is steady is not suspected."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.probe import variation
from tests import command_line
from tests.jobs import MIB, small


class Keeps(nn.Module):
    """What its forward keeps: nothing, its outputs with their graph, or its outputs as numbers."""

    def __init__(self, keeps):
        super().__init__()
        self.first, self.second, self.keeps, self.kept = nn.Linear(64, 2048), nn.Linear(2048, 1), keeps, []

    def forward(self, x):
        hidden = self.first(x)
        if self.keeps == "graphs":
            self.kept.append(hidden)
        elif self.keeps == "numbers":
            self.kept.append(float(hidden.detach().mean()))
        return self.second(hidden.relu())


def told(keeps, optimizer=torch.optim.AdamW, **given):
    model = Keeps(keeps)
    batch = torch.randn(8, 64), torch.randn(8, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = autoaccum.tune(
            model, optimizer(model.parameters()), lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), batch, target_batch=600, **given
        )
    assert not model.kept  # put back
    return [str(each.message) for each in caught if "memory grows" in str(each.message)], plan


@pytest.mark.parametrize("given", [{"max_micro_batch": 200}, {}])
def test_graphs_that_are_kept_are_told_with_their_size(given):
    (message,), plan = told("graphs", **given)
    grows = float(message.split("grows by ")[1].split()[0])
    assert 3 < grows < 12 and "with every window" in message  # 600 samples of 8 KiB, and what their graph holds
    assert "keep numbers (loss.item())" in message and plan.accumulation_steps == (3 if given else 1)


@pytest.mark.parametrize("keeps", ["nothing", "numbers"])
def test_what_is_steady_is_not_suspected(keeps):
    assert not told(keeps, max_micro_batch=200)[0]


def test_noise_is_no_growth():
    assert not variation.slope_bytes([100 * MIB, 100 * MIB + 4096, 100 * MIB + 8192], shared_with_host=True)
    assert not variation.slope_bytes([100 * MIB, 103 * MIB, 103 * MIB], shared_with_host=True)  # once, and then no more
    assert variation.slope_bytes([100 * MIB, 103 * MIB, 105 * MIB], shared_with_host=True) == 2.5 * MIB
    assert not variation.slope_bytes([100 * MIB, 108 * MIB, 109.1 * MIB, 110.2 * MIB], shared_with_host=True)  # less and less
    assert variation.growth_remark([0, 2 * MIB], 20 * MIB, shared_with_host=True)[0].startswith(
        "memory grows by 2 MiB with every window, so training runs out about 10 "
    )


JOB = """
import torch, autoaccum
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.seen = nn.Linear(64, 2048), nn.Linear(2048, 10), []
    def forward(self, x):
        h = self.a(x)
        if {keeps}: self.seen.append(h)
        return self.b(h.relu())
def make_job():
    m = Net()
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])
    return autoaccum.Job(m, torch.optim.SGD(m.parameters(), lr=.1), loss, (torch.randn(8, 64), torch.randint(0, 10, (8,))))
"""


@pytest.mark.parametrize("keeps", [True, False])
def test_in_a_child_process_over_many_windows_and_on_a_card_that_is_not_here(tmp_path, keeps):
    (tmp_path / "job.py").write_text(JOB.format(keeps=keeps))
    for words in (["check", "job.py", "-b", "600", "-m", "300", "--windows", "6"], ["tune", "job.py", "-b", "600", "-d", "virtual:1GiB"]):
        shown = command_line.autoaccum(*words, "-q", cwd=tmp_path)
        assert shown.returncode == 0 and ("memory grows by" in shown.stdout) is keeps, shown.stdout + shown.stderr


def test_the_warning_holds_for_a_job_that_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autoaccum.tune(small(), target_batch=64, max_micro_batch=16)
