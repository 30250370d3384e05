"""A program: bytes that are live, at most, in each phase of two windows on rank 0 of four, with torch's own FSDP2 or simulated.

python -m tests.virtual.live_ranks real|ENGINE MODEL prints one JSON object, from phase to bytes.
"""

import json
import sys
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORLD, WIDTH = 4, 96


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Blocks(torch.nn.Module):
    """Repeated blocks between layers that are none; no dimension is a multiple of all ranks but by chance."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(50, WIDTH), torch.nn.Linear(WIDTH, 7)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(5))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def plain():
    return torch.nn.Sequential(torch.nn.Linear(50, 301), torch.nn.ReLU(), torch.nn.Linear(301, 7))


def frozen():
    model = Blocks()
    for block in list(model.blocks)[:3]:
        block.requires_grad_(False)
    return model


MODELS = {"blocks": Blocks, "plain": plain, "frozen": frozen}


def adam(model):
    return torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], foreach=True)


class Live(TorchDispatchMode):
    """Counts the storages of CPU tensors."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def see(self, tensor):
        if isinstance(tensor, FakeTensor):  # shapes that a DTensor asks for
            return
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        key, held = storage._cdata, storage.nbytes()
        known = self.sizes.get(key)
        if known == held:
            return
        self.now, self.sizes[key] = self.now + held - (known or 0), held
        if known is None:
            weakref.finalize(storage, self.gone, key)
        self.peak = max(self.peak, self.now)

    def gone(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, out)):
            if isinstance(each, torch.Tensor):
                self.see(each)
        return out

    def phase(self):
        """The peak since the last call."""
        peak, self.peak = self.peak, self.now
        return peak


def real(model):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    for block in getattr(model, "blocks", ()):
        fully_shard(block)
    fully_shard(model)
    optimizer, live, found = adam(model), Live(), {}

    def followed(own):  # storages that are resized without an operator
        def resized(tensor):
            own(tensor)
            live.see(tensor)

        return resized

    for name in ("alloc_storage", "free_storage"):
        for module in (_fsdp_param, _fsdp_param_group):
            if hasattr(module, name):
                setattr(module, name, followed(getattr(module, name)))
    with live:
        for parameter in model.parameters():
            live.see(parameter)
        for window, pieces in enumerate((1, 2, 2)):
            for piece in range(pieces):
                batch = torch.zeros(8, 50)
                live.peak = live.now
                loss = model(batch).square().mean()
                found[f"{window}.{piece}.forward"] = live.phase()
                loss.backward()
                found[f"{window}.{piece}.backward"] = live.phase()
                del loss, batch
            live.peak = live.now
            optimizer.step()
            found[f"{window}.{piece}.step"] = live.phase()
            optimizer.zero_grad()
    return found


def simulated(model, engine):
    from autoaccum.probe import Limits
    from autoaccum.simulate import profiles
    from autoaccum.trace import fake_cuda
    from autoaccum.virtual.simulation import Simulation
    from autoaccum.window import Job

    assert not fake_cuda()
    job = Job(model, adam(model), lambda model, batch: model(batch).square().mean(), torch.zeros(8, 50))
    simulation = Simulation([job], profiles.load("t4"), Limits(engine=engine, world=WORLD if engine else 1))
    tape = simulation._traced.exactly(simulation._card, (8, 8), twice=True)
    found, now, marks = {}, 0, list(tape.marks)
    phase = "setup"
    for at, event in enumerate(tape.events):
        while marks and marks[0].event <= at:
            mark = marks.pop(0)
            phase = f"{mark.window}.{mark.piece}.{mark.phase}"
            if mark.phase == "end":
                found[phase] = now
        number = event if event >= 0 else ~event
        if tape.kinds[number] != "workspace":  # of a card's kernels
            now += tape.sizes[number] if event >= 0 else -tape.sizes[number]
            found[phase] = max(found.get(phase, 0), now)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = MODELS[sys.argv[2]]()
    print(json.dumps(real(made) if sys.argv[1] == "real" else simulated(made, "" if sys.argv[1] == "none" else sys.argv[1])))
