"""What is compiled is seen wherever it is, and where CUDA graphs are replayed a window keeps gradients and losses of its own.

A graph is stood in for by a function that behaves as torch.cuda.make_graphed_callables makes them: what it returns, forward and backward, lies in
memory that its next run writes into.
"""

import copy
import functools
import inspect

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import autoaccum
from autoaccum.errors import JobError, UsageError
from autoaccum.window import accumulation, captured, replays_graphs
from tests import jobs
from tests.plans import by_hand


def helper(output):
    return output.square().mean()


compiled_helper = torch.compile(helper)
graphed_helper = torch.compile(helper, mode="reduce-overhead")


def calls_by_name(model, batch):
    return compiled_helper(model(batch[0]))


def calls_what_calls(model, batch):
    return calls_by_name(model, batch)


def with_closure(function):
    def loss(model, batch):
        return function(model(batch[0]))

    return loss


class Criterion:
    def __init__(self):
        self.inner = compiled_helper

    def __call__(self, model, batch):
        return self.inner(model(batch[0]))


@pytest.mark.parametrize(
    "loss", [compiled_helper, calls_by_name, calls_what_calls, with_closure(compiled_helper), functools.partial(with_closure, compiled_helper), Criterion()]
)
def test_a_compiled_loss_is_seen_however_it_is_called(loss):
    assert jobs.small(loss).is_compiled and not jobs.small().is_compiled
    assert not replays_graphs(nn.Linear(1, 1), loss)


def compiled_part(**given):
    return nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2), **given))


def compiled_in_place(**given):
    model = nn.Linear(2, 2)
    model.compile(**given)
    return model


class Decorated(nn.Linear):
    @torch.compile(mode="reduce-overhead")
    def forward(self, inputs):
        return inputs


class Calling(nn.Linear):
    def forward(self, inputs):
        return graphed_helper(inputs)


class Holding(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)
        self.function = graphed_helper

    def forward(self, inputs):
        return self.function(inputs)


def replaced():
    model = nn.Linear(1, 1)
    model.forward = torch.compile(model.forward, mode="reduce-overhead")
    return model


class Trainer:
    def __init__(self):
        self.criterion = graphed_helper

    def loss(self, model, batch):
        return self.criterion(model(batch[0]))


def test_compiled_parts_of_a_model_are_seen_wherever_they_are():
    for model in (Decorated(1, 1), Calling(1, 1), Holding(), replaced()):
        assert replays_graphs(model, jobs.mse), model
        assert replays_graphs(nn.Sequential(model), jobs.mse), model
    assert replays_graphs(nn.Linear(1, 1), Trainer().loss)


class Hostile:
    def __getattr__(self, name):
        raise RuntimeError("not connected")


hostile = Hostile()


def test_a_global_that_answers_with_errors_does_no_harm():
    def loss(model, batch):
        return jobs.mse(model, batch) + 0 * (hostile is None)

    job = jobs.small(loss)
    assert not job.is_compiled and not replays_graphs(job.model, job.loss)


@pytest.mark.parametrize("made", [compiled_part, compiled_in_place])
def test_graphs_are_told_from_other_modes_of_compiling(made):
    for mode in ("reduce-overhead", "max-autotune"):
        assert replays_graphs(made(mode=mode), jobs.mse)
    assert not replays_graphs(made(), jobs.mse) and not replays_graphs(made(mode="max-autotune-no-cudagraphs"), jobs.mse)
    assert not replays_graphs(made(backend="eager"), jobs.mse)
    assert replays_graphs(compiled_part(backend="cudagraphs"), jobs.mse)
    assert replays_graphs(nn.Linear(1, 1), with_closure(graphed_helper))


class Static(torch.autograd.Function):
    """`weight * batch`, summed; the loss and the gradient of `weight` lie in buffers that every run writes into."""

    buffers = (torch.zeros(()), torch.zeros(3))

    @staticmethod
    def forward(ctx, weight, batch):
        ctx.save_for_backward(batch)
        Static.buffers[0].copy_((weight * batch).sum(1).mean())
        return Static.buffers[0].detach()

    @staticmethod
    def backward(ctx, grad):
        (batch,) = ctx.saved_tensors
        Static.buffers[1].copy_(grad * batch.mean(0))
        return Static.buffers[1].detach(), None


class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, batch):
        return Static.apply(self.weight, batch)


def window_of(model, pieces, *, graphs):
    job = autoaccum.Job(model, torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.5), lambda m, b: m(b), torch.ones(2, 3))
    return job, accumulation.gradients(
        job, job.loss, [(piece, len(piece)) for piece in pieces], samples=sum(map(len, pieces)), device=torch.device("cpu"), graphs=graphs
    )


def test_gradients_and_losses_of_a_graph_are_kept_from_its_next_replay():
    pieces = [torch.full((2, 3), float(value)) for value in (1, 2, 6)]
    whole = torch.cat(pieces)
    model = Weight()
    _, told = window_of(model, pieces, graphs=True)
    assert torch.allclose(model.weight.grad, whole.mean(0)) and float(told.loss.sum()) == pytest.approx(float(whole.sum(1).mean()))
    kept = model.weight.grad.clone()
    model(whole)  # replays the forward once more
    assert torch.equal(model.weight.grad, kept) and float(told.loss.sum()) == pytest.approx(float(whole.sum(1).mean()))
    # without that, the stand-in shows what graphs do
    wrong = Weight()
    _, spoilt = window_of(wrong, pieces, graphs=False)
    assert not torch.allclose(wrong.weight.grad, whole.mean(0)) or float(spoilt.loss.sum()) != pytest.approx(float(whole.sum(1).mean()))


def test_a_parameter_without_a_gradient_has_none_and_is_not_decayed():
    model = Weight()
    job, _ = window_of(model, [torch.ones(2, 3)], graphs=True)
    assert model.unused.grad is None and model.weight.grad is not None
    accumulation.run(job, job.loss, [(torch.ones(2, 3), 2)], samples=2, device=torch.device("cpu"), graphs=True)
    assert torch.equal(model.unused, torch.ones(3)) and model.weight.grad is None


def test_sharded_gradients_are_kept_too():
    """FSDP2 adds to the local part of a gradient, whose own version does not move."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    whole, pieces = copy.deepcopy(model), [torch.randn(2, 3), torch.randn(2, 3)]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: m(b).square().mean(), torch.ones(2, 3))
        accumulation.gradients(job, job.loss, [(piece, 2) for piece in pieces], samples=4, device=torch.device("cpu"), graphs=True)
        gradients = [parameter.grad.full_tensor() for parameter in model.parameters()]
    finally:
        dist.destroy_process_group()
    whole(torch.cat(pieces)).square().mean().backward()
    assert all(torch.allclose(ours, theirs.grad) for ours, theirs in zip(gradients, whole.parameters()))


def test_terms_of_several_denominators_are_refused_by_name():
    model = Weight()

    def loss(m, batch):
        value = (m.weight * batch).sum()
        return {"left": (value, 3), "right": (value * 2, 5)}

    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, torch.ones(2, 3))
    with pytest.raises(JobError, match=r"left, right have 2 denominators.*without CUDA graphs"):
        accumulation.gradients(job, loss, [(torch.ones(2, 3), 2)], samples=2, device=torch.device("cpu"), graphs=True)


def captured_model():
    """As make_graphed_callables leaves a module: with a forward of its own, whose name tells where it comes from."""
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1))
    plain = model[0].forward

    def new_fwd(inputs):
        if len(inputs) != 8:
            raise RuntimeError(f"The size of tensor a (8) must match the size of tensor b ({len(inputs)})")
        return plain(inputs)

    new_fwd.__qualname__ = "make_graphed_callables.<locals>.make_graphed_forward.<locals>.new_fwd"
    model[0].forward = new_fwd
    return model


def test_the_stand_in_is_named_as_torch_names_it():
    source = inspect.getsource(torch.cuda.make_graphed_callables)
    inside = source[source.index("def make_graphed_forward") :]
    assert "def new_fwd" in inside and "func.forward = make_graphed_forward" in inside


def test_what_was_captured_for_one_size_is_not_tried_at_others():
    model = captured_model()
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), jobs.mse, jobs.pairs(8))
    assert captured(model, jobs.mse) == "model.0" and replays_graphs(model, jobs.mse)
    with pytest.raises(JobError, match=r"model\.0 was captured by torch\.cuda\.make_graphed_callables.*equal=True"):
        autoaccum.tune(job, target_batch=24)


def test_what_was_captured_trains_in_micro_batches_of_one_size():
    model = captured_model()
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), jobs.mse, jobs.pairs(8))
    loop = autoaccum.Accumulator(job, by_hand(job, 24, 8))
    assert loop.step(jobs.pairs(24)).micro_batches == 3
    with pytest.raises(UsageError, match=r"one batch size only, here 8, and a window of 20 samples .*drop_last=True"):
        loop.step(jobs.pairs(20))
