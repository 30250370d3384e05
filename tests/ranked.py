"""Programs that several ranks run together, and a way to run them: real processes, real gloo, one import of torch for all of them.

python -m tests.ranked WORLD PROGRAM ARGUMENTS-AS-JSON
"""

import atexit
import importlib
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

import autoaccum
from autoaccum.devices.cpu import Cpu
from autoaccum.distributed.fleet import Fleet
from autoaccum.distributed.speed_curves import AffineCurve
from tests import forked
from tests.plans import by_hand

ROOT = Path(__file__).parent.parent
MIB = 2**20


def in_ranks(program, *arguments, world=3, timeout=150):
    """What each rank told, by rank; `{"raised": ..., "message": ...}` for one that raised, None for one that ended otherwise."""
    if not _server or _server[0].poll() is not None:
        _server[:] = [_started()]
    server = _server[0]
    with tempfile.TemporaryFile("w+") as errors:
        server.stdin.write(json.dumps([world, program, arguments, f"/proc/{os.getpid()}/fd/{errors.fileno()}"]) + "\n")
        server.stdin.flush()
        ended = threading.Timer(timeout, os.killpg, (server.pid, signal.SIGKILL))
        ended.start()
        told = dict.fromkeys(range(world))
        for line in server.stdout:
            if line == "done\n":
                break
            if line.startswith("told:"):
                rank, _, text = line.removeprefix("told:").partition(":")
                told[int(rank)] = json.loads(text)
        else:
            _server.clear()
            raise AssertionError(f"the ranks did not end in {timeout} s")
        ended.cancel()
        errors.seek(0)
        said = errors.read()
    assert any(each is not None for each in told.values()), f"nobody told anything: {said[-4000:]}"
    if None in told.values():
        print(said[-4000:])  # shown by pytest where a test fails of it
    for each in told.values():
        if isinstance(each, dict) and "raised" in each:
            each["stderr"] = said[-4000:]
    return [told[rank] for rank in range(world)]


_server = []


def _started():
    """One process that has imported torch and forks the ranks of one program after another."""
    command = [sys.executable, "-m", "tests.ranked"]
    # A benchmark that another test imports turns the steady allocator off for its process; limits bite only with it.
    env = {**{name: value for name, value in os.environ.items() if name != "AUTOACCUM_MALLOC"}, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True, env=env)
    atexit.register(forked.ended, started)
    return started


def main():
    # What every rank would import by itself, at the latest when its optimizer steps; here once. None of it starts a thread.
    import torch._dynamo
    import torch.distributed.fsdp

    torch.set_num_threads(1)
    for line in sys.stdin:
        world, program, arguments, errors = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        if program == "in_a_framework":
            framework = arguments[0].removesuffix("_resumed")
            importlib.import_module({"huggingface": "transformers.trainer"}.get(framework, framework))
        children = []
        for rank in range(world):
            child = os.fork()  # before any thread of torch: it was only imported
            if child == 0:
                os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND), 2)
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                _be(rank, globals()[program], arguments)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        print("done", flush=True)


def _be(rank, program, arguments):
    try:
        told = program(*arguments)
    except Exception as error:
        traceback.print_exc()
        told = {"raised": type(error).__name__, "message": str(error), "notes": getattr(error, "__notes__", [])}
    sys.stdout.flush()
    os.write(1, f"\ntold:{rank}:{json.dumps(told)}\n".encode())  # at once, on a line of its own, whatever else was printed
    if dist.is_initialized() and not (isinstance(told, dict) and "raised" in told):
        dist.barrier()  # nobody's connections end while another still uses them
    os._exit(0)


def meet(seconds=60):
    from datetime import timedelta

    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    return dist.get_rank(), dist.get_world_size()


# A small language model with very uneven numbers of labels, in double precision.


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(31, 16), nn.Linear(16, 31)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)])

    def forward(self, ids):
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.out(hidden)


def words(seed=0):
    torch.manual_seed(seed)
    return Words().double()


def texts(samples=400, length=8):
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(0, 31, (samples, length), generator=generator) for _ in range(2))
    ends = torch.randint(1, length + 1, (samples,), generator=generator)
    labels[torch.arange(length)[None] >= ends[:, None]] = -100
    return TensorDataset(ids, labels)


def summed(model, batch):
    """Losses of all labels, and how many there are."""
    ids, labels = batch
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"), (labels != -100).sum()


def by_sample(model, batch):
    """The mean over samples of each one's mean over its labels."""
    ids, labels = batch
    losses = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view(labels.shape)
    return (losses.sum(1) / (labels != -100).sum(1)).mean()


def mean_of_labels(model, batch):
    total, count = summed(model, batch)
    return total / count


def labels_of(batch):
    return (batch[1] != -100).sum()


LOSSES = {"by_sample": (by_sample, None), "summed": (summed, None), "counted": (mean_of_labels, labels_of)}


def fleet_plan(rank, world, shares, most, *, lockstep=False, steps=None, seconds=None):
    """A plan as if the ranks had been measured: those shares, in micro-batches of at most `most`."""
    curves = tuple(AffineCurve(each, 0.0, (seconds or [1.0 / max(share, 1) for share in shares])[of]) for of, (each, share) in enumerate(zip(most, shares)))
    fleet = Fleet(curves, tuple(shares), lockstep, steps)
    sizes = tuple(size for size in fleet.sizes(rank, sum(shares)) if size)
    return replace(
        by_hand(None, sum(shares), max(1, most[rank])),
        fleet=fleet, shares=tuple(shares), share=shares[rank], rank=rank, world_size=world,
        micro_batches=sizes, micro_batch=max(sizes, default=0), accumulation_steps=len(sizes),
    )  # fmt: skip


def wrapped(net, engine, world, **given):
    if engine == "ddp":
        return DistributedDataParallel(net, **given)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def whole(parameter):
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach()


def one_process(data, order, target, loss, *, clip=None, windows=None):
    """Parameters, losses and norms of one process that takes every window at once."""
    net, losses, norms = words(), [], []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    for start in range(0, len(order), target)[:windows]:
        returned = loss(net, data[order[start : start + target]])
        value = returned[0] / returned[1] if isinstance(returned, tuple) else returned
        value.backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), clip or 1e9)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    return net, losses, norms


def difference(net, other):
    return max(float((whole(mine) - theirs.detach()).abs().max()) for mine, theirs in zip(net.parameters(), other.parameters()))


def exact(engine, cases):
    """Trains every case over ranks and in one process; tells the largest differences: parameters, losses, norms."""
    rank, world = meet()
    told = {}
    for name, case in cases.items():
        loss, count = LOSSES[case["loss"]]
        data = Subset(texts(), range(case["samples"]))
        net = words()
        model = wrapped(net, engine, world, **case.get("ddp", {}))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
        plan = fleet_plan(rank, world, case["shares"], case["most"], lockstep="steps" in case, steps=case.get("steps"))
        loop = autoaccum.Accumulator(model, optimizer, plan, careful_windows=case["careful"], count=count, max_grad_norm=0.5, rank_timeout_s=30)
        loader = DataLoader(data, batch_sampler=plan.batch_sampler(data, seed=3))
        results = [loop.step(window, loss) for window in plan.windows(loader)]
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(3)).tolist()
        reference, losses, norms = one_process(texts(), order, plan.target_batch, loss, clip=0.5)
        told[name] = {
            "windows": len(results),
            "parameters": difference(net, reference),
            "losses": max(abs(each.loss - other) for each, other in zip(results, losses)),
            "norms": max(abs(each.grad_norm - other) for each, other in zip(results, norms)),
            "samples": [each.samples for each in results],
            "steps": [each.micro_batches for each in results],
        }
    return told


def new_plan_every_window(engine):
    """Five windows, each with shares and micro-batches of its own; tells the difference to one process, and whether replicas are alike bit by bit."""
    rank, world = meet()
    data, net = texts(), words()
    model = wrapped(net, engine, world)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    plans = [([35, 17, 8], [20, 17, 2]), ([35, 17, 8], [20, 17, 2]), ([20, 20, 20], [20, 7, 20]), ([58, 2, 0], [30, 9, 9]), ([10, 10, 40], [10, 10, 10])]
    for at, (shares, most) in enumerate(plans):
        plan = fleet_plan(rank, world, shares, most)
        start = 60 * at + sum(shares[:rank])
        loop = autoaccum.Accumulator(model, optimizer, plan, careful_windows=at % 2, rank_timeout_s=30)
        loop.step(autoaccum.Window([data[start : start + shares[rank]]], [shares[rank]]) if shares[rank] else autoaccum.Window([], []), summed)
    reference, _, _ = one_process(data, list(range(300)), 60, summed)
    mine = torch.cat([whole(each).flatten() for each in net.parameters()])
    others = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(others, mine)
    return {"difference": difference(net, reference), "alike": all(torch.equal(mine, each) for each in others)}


def two_jobs_in_turn():
    """Two models, each with its own loss, on the same windows; the last one is a tail."""
    rank, world = meet()
    data = texts(157)

    def jobs(wrap):
        nets = [words(0), words(1)]
        models = [wrapped(net, "ddp", world) if wrap else net for net in nets]
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.5) for net in nets]
        return nets, [
            autoaccum.Job(model, optimizer, loss, data[:4], count=count)
            for model, optimizer, loss, count in zip(models, optimizers, (summed, mean_of_labels), (None, labels_of))
        ]

    nets, turns = jobs(True)
    plan = fleet_plan(rank, world, [70, 35, 15], [35, 35, 4])
    loop = autoaccum.Accumulator(turns, plan, careful_windows=1, rank_timeout_s=30)
    loader = DataLoader(data, batch_sampler=plan.batch_sampler(data, shuffle=False))
    for _ in range(2):
        for window in plan.windows(loader):
            loop.step(window)
    others, alone = jobs(False)
    single = autoaccum.Accumulator(alone, by_hand(alone, 120, 120))
    for _ in range(2):
        for start in (0, 120):
            single.step(data[start : start + 120])
    return max(difference(net, other) for net, other in zip(nets, others))


def ragged(samples=200):
    """Texts of 1 to 12 tokens, as dicts."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 13, (samples,), generator=generator).tolist()
    return [{"ids": torch.randint(1, 31, (length,), generator=generator)} for length in lengths]


def put_together(samples):
    ids = nn.utils.rnn.pad_sequence([sample["ids"] for sample in samples], batch_first=True)
    labels = nn.utils.rnn.pad_sequence([sample["ids"] for sample in samples], batch_first=True, padding_value=-100)
    return {"ids": ids, "labels": labels}


def of_labels(model, batch):
    return F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten())


class Bigrams(nn.Module):
    """Sees no padding, so that padding changes nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(31, 16), nn.Linear(16, 31)

    def forward(self, ids):
        return self.out(torch.tanh(self.embed(ids)))


def by_tokens(sampled, careful):
    """Windows of 150 tokens, shared out by tokens; tells the windows, and the difference to one process that takes each at once."""
    rank, world = meet()
    data, net = ragged(), Bigrams().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    tuned = autoaccum.tune(net, optimizer, of_labels, autoaccum.worst_case(data, collate=put_together), target_tokens=150)
    shares, most = [8, 4, 1][:world], [4, 4, 1][:world]
    plan = replace(fleet_plan(rank, world, shares, most), target_tokens=150, micro_tokens=12 * most[rank])
    model = DistributedDataParallel(net)
    loop = autoaccum.Accumulator(model, optimizer, plan, careful_windows=careful, rank_timeout_s=30)
    if sampled:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(3)).tolist()
        sampler = plan.batch_sampler(data, seed=3, tokens=lambda sample: len(sample["ids"]))
        loader = DataLoader(data, batch_sampler=sampler, collate_fn=put_together)
    else:
        order = list(range(len(data)))
        loader = DataLoader(data, batch_size=7, collate_fn=put_together)
    windows, steps, counts = [], [], []
    for window in plan.windows(loader):
        result = loop.step(window, of_labels)
        windows.append(window.of_all)
        steps.append(result.micro_batches)
        counts.append(result.count)
    reference = Bigrams().double()
    stepped = torch.optim.SGD(reference.parameters(), lr=0.5, momentum=0.9)
    start = 0
    for samples in windows:
        of_labels(reference, put_together([data[index] for index in order[start : start + samples]])).backward()
        stepped.step()
        stepped.zero_grad()
        start += samples
    return {
        "tuned": [tuned.target_tokens, tuned.target_batch, tuned.world_size, tuned.micro_tokens],
        "windows": windows, "steps": steps, "counts": counts, "samples": start, "difference": difference(net, reference),
    }  # fmt: skip


def an_inf_on_one_rank():
    """Under a scaler: the window with it is skipped on every rank, and no other."""
    rank, world = meet()
    data, net = texts(), words()
    model = wrapped(net, "ddp", world)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    plan = fleet_plan(rank, world, [35, 17, 8], [20, 17, 3])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loop = autoaccum.Accumulator(model, optimizer, plan, scaler=scaler, max_grad_norm=1.0, careful_windows=1, rank_timeout_s=30)
    skipped = []
    for at, window in enumerate(plan.windows(DataLoader(data, batch_sampler=plan.batch_sampler(data, shuffle=False)))):
        loss = (lambda model, batch: by_sample(model, batch) * float("inf")) if rank == 1 and at in (0, 3) else by_sample
        skipped.append(loop.step(window, loss).skipped)
    mine = torch.cat([whole(each).flatten() for each in net.parameters()])
    others = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(others, mine)
    return {"skipped": skipped, "alike": all(torch.equal(mine, each) for each in others), "finite": bool(mine.isfinite().all())}


def with_batch_norm(careful, shares):
    """BatchNorm, whose buffers cross once a window; tells whether weights and buffers end alike on every rank."""
    rank, world = meet(40)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).double()
    inputs = torch.randn(300, 6, dtype=torch.double)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    plan = fleet_plan(rank, world, shares, [10, 9, 5])
    loop = autoaccum.Accumulator(DistributedDataParallel(net), torch.optim.SGD(net.parameters(), lr=0.05), plan, careful_windows=careful, rank_timeout_s=20)
    loader = DataLoader(data, batch_sampler=plan.batch_sampler(data, drop_last=True))
    losses = [
        loop.step(window, lambda model, batch: F.mse_loss(model(batch[0]), batch[1])).loss for _ in range(3) for window in plan.windows(loader, drop_last=True)
    ]
    mine = torch.cat([each.flatten().double() for each in (*net.parameters(), *([] if careful == 0 else net.buffers()))])
    others = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(others, mine.detach())
    return {"alike": all(torch.equal(mine, each) for each in others), "losses": losses}


def by_hand_loop(engine, wrong):
    """A loop that is not ours, with `micro.sync`, over a tail, too. wrong: weighted as most loops do."""
    rank, world = meet()
    data, net = texts(157), words()
    model = wrapped(net, engine, world)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    plan = fleet_plan(rank, world, [70, 35, 15], [35, 35, 4])
    for window in plan.windows(DataLoader(data, batch_sampler=plan.batch_sampler(data, shuffle=False))):
        for micro in plan.split(window, labels_of):
            with micro.sync(model):
                weight = 1 / len(plan.sizes(max(window.samples, 1))) if wrong else micro.weight
                (mean_of_labels(model, micro.batch) * weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    reference, _, _ = one_process(data, list(range(157)), 120, mean_of_labels)
    return difference(net, reference)


class Grown(torch.autograd.Function):
    """Takes memory for every sample: in forward kept for backward, or in backward alone."""

    @staticmethod
    def forward(ctx, x, mib, where):
        ctx.mib, ctx.where = mib, where
        ctx.held = torch.ones(len(x), int(mib * MIB / 4)) if where == "forward" else None
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        held = torch.ones(len(gradient), int(ctx.mib * MIB / 4)) if ctx.where == "backward" else ctx.held
        assert held is not None
        return gradient, None, None


def limited(engine, where, careful, keeps_mib, sample_mib=4.0, windows=6):
    """From the third window on rank 2 may hold but so much more; tells what was rescued and the difference to one process."""
    rank, world = meet(60)
    data, net = texts(), words()
    model = wrapped(net, engine, world)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    plan = fleet_plan(rank, world, [35, 17, 8], [20, 17, 3], seconds=[1.0, 2.0, 4.0])

    def loss(model, batch):
        ids, labels = batch
        out = Grown.apply(model(ids), sample_mib if rank == 2 else 0.1, where)
        total = F.cross_entropy(out.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return total, (labels != -100).sum()

    loop = autoaccum.Accumulator(model, optimizer, plan, careful_windows=careful, rank_timeout_s=40)
    rescued, micro = [], []
    cpu = Cpu()
    for at, window in enumerate(plan.windows(DataLoader(data, batch_sampler=plan.batch_sampler(data, shuffle=False)))):
        if at == windows:
            break
        if rank == 2 and at >= 2:
            with cpu.capped(cpu.held_bytes() + int(keeps_mib * MIB)):
                result = loop.step(window, loss)
        else:
            result = loop.step(window, loss)
        rescued.append(str(result.rescued) if result.rescued else "")
        micro.append(result.micro_batches)
    reference, _, _ = one_process(data, list(range(400)), 60, summed, windows=windows)
    return {"difference": difference(net, reference), "rescued": rescued, "micro_batches": micro}


def running_out(engine, shares, most, calls, careful=3, optimizer="sgd", windows=4):
    """Ranks run out of memory in the given calls of the loss, counted from 0; tells what was rescued and the difference to one process."""
    rank, world = meet(30)
    data, net, mine, seen = texts(), words(), calls.get(str(rank), []), itertools.count()
    model = wrapped(net, engine, world)
    plan = fleet_plan(rank, world, shares, most)

    def made(parameters):
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=4) if optimizer == "lbfgs" else torch.optim.SGD(parameters, lr=0.5, momentum=0.9)

    def loss(model, batch):
        if next(seen) in mine:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return summed(model, batch)

    loop = autoaccum.Accumulator(model, made(net.parameters()), plan, careful_windows=careful, rank_timeout_s=20)
    results = []
    for at, window in enumerate(plan.windows(DataLoader(data, batch_sampler=plan.batch_sampler(data, shuffle=False)))):
        if at == windows:
            break
        results.append(loop.step(window, loss))
    reference, _, _ = one_process(data, list(range(400)), sum(shares), summed, windows=windows)
    return {"difference": difference(net, reference), "rescued": [bool(each.rescued) for each in results], "steps": [each.micro_batches for each in results]}


def counting_nothing(engine, careful, steps):
    """The last micro-batch of the last rank holds no label at all, and the mean over none is nan."""
    rank, world = meet(30)
    data, net = texts(240), words()
    data.tensors[1][236:240] = -100
    model = wrapped(net, engine, world)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    plan = fleet_plan(rank, world, [70, 35, 15], [35, 35, 4], lockstep=steps is not None, steps=steps)
    loop = autoaccum.Accumulator(model, optimizer, plan, careful_windows=careful, count=labels_of, rank_timeout_s=20)
    for window in plan.windows(DataLoader(data, batch_sampler=plan.batch_sampler(data, shuffle=False))):
        loop.step(window, mean_of_labels)
    reference, _, _ = one_process(data, list(range(240)), 120, mean_of_labels)
    return difference(net, reference)


def after_a_failure(engine, careful):
    """Every rank's loss fails in the middle of a window, that is caught, and the next window is trained on."""
    rank, world = meet(30)
    data, net, seen = texts(), words(), itertools.count()
    model = wrapped(net, engine, world)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    plan = fleet_plan(rank, world, [20, 20, 20], [5, 5, 5])
    loop = autoaccum.Accumulator(model, optimizer, plan, careful_windows=careful, rank_timeout_s=20)

    def fails(model, batch):
        if next(seen) == 2:
            raise ValueError("a mistake")
        return summed(model, batch)

    try:
        loop.step(data[20 * rank : 20 * rank + 20], fails)
    except ValueError:
        loop.step(data[60 + 20 * rank : 80 + 20 * rank], summed)
    reference, _, _ = one_process(data, list(range(60, 120)), 60, summed)
    return difference(net, reference)


def by_hand_and_ours():
    """Gradients of a loop by hand before and after an Accumulator of the same sharded model has trained."""
    rank, world = meet()
    data, net = texts(), words()
    model = wrapped(net, "fsdp2", world)
    plan, found = fleet_plan(rank, world, [20, 20, 20], [5, 5, 5]), []
    loop = autoaccum.Accumulator(model, torch.optim.SGD(net.parameters(), lr=0.0), plan, rank_timeout_s=30)
    mine = data[20 * rank : 20 * rank + 20]
    for _ in range(2):
        for micro in plan.split(mine, labels_of):
            with micro.sync(model):
                (mean_of_labels(model, micro.batch) * micro.weight).backward()
        found.append([whole(each.grad) for each in net.parameters()])
        model.zero_grad()
        loop.step(mine, summed)
    return max(float((one - other).abs().max()) for one, other in zip(*found))


def never_used():
    """A part of the model that no sample touches, under DDP that does not look for such."""
    rank, world = meet(30)
    data, net = texts(), words()
    net.extra = nn.Linear(4, 4).double()
    model = wrapped(net, "ddp", world)
    plan = fleet_plan(rank, world, [20, 20, 20], [5, 5, 5])
    loop = autoaccum.Accumulator(model, torch.optim.AdamW(net.parameters()), plan, rank_timeout_s=20)
    loop.step(data[20 * rank : 20 * rank + 20], summed)


def tuned_with_batch_norm(target, most, settings):
    meet(60)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))
    data = (torch.randn(64, 8), torch.randn(64, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    plan = autoaccum.tune(
        net, optimizer, lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), data, target_batch=target, max_micro_batch=most, **settings
    )
    return [plan.shares, plan.micro_batches, [plan.fleet.cuts(tail) for tail in range(2, target)]]


def ends_early(ranks_that_end, how, careful):
    """In the third window these ranks end, fail, or stay away."""
    rank, world = meet(15)
    data, net = texts(), words()
    model = wrapped(net, "ddp", world)
    plan = fleet_plan(rank, world, [35, 17, 8], [20, 17, 3])

    def loss(model, batch):
        if rank in ranks_that_end and at == 2:
            if how == "dies":
                os._exit(1)
            raise ValueError("the data is corrupt")
        return summed(model, batch)

    loop = autoaccum.Accumulator(model, torch.optim.SGD(net.parameters(), lr=0.1), plan, careful_windows=careful, rank_timeout_s=4)
    started = time.monotonic()
    try:
        for at, window in enumerate(plan.windows(DataLoader(data, batch_sampler=plan.batch_sampler(data)))):
            if how == "stays away" and rank in ranks_that_end and at == 2:
                threading.Event().wait(12)
                return None
            loop.step(window, loss)
    except Exception as error:
        return {"raised": type(error).__name__, "message": str(error), "seconds": time.monotonic() - started}
    return None


def killed_after(victim, seconds, careful):
    """Rank `victim` is ended by a signal after so many seconds of training. Others tell what was raised, and if the weights are those of their last window."""
    rank, world = meet(15)
    data, net = texts(), words()
    model = wrapped(net, "ddp", world)
    plan = fleet_plan(rank, world, [35, 25][:world], [20, 17][:world])
    loop = autoaccum.Accumulator(model, torch.optim.SGD(net.parameters(), lr=0.1), plan, careful_windows=careful, rank_timeout_s=4)
    batch = next(iter(plan.windows(DataLoader(data, batch_sampler=plan.batch_sampler(data)))))
    after = [parameter.detach().clone() for parameter in net.parameters()]
    windows, started = 0, time.monotonic()
    if rank == victim:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends the process wherever it is
    try:
        while time.monotonic() - started < seconds + 10:
            loop.step(batch, summed)
            windows += 1
            after = [parameter.detach().clone() for parameter in net.parameters()]
    except Exception as error:
        intact = all(torch.equal(now, then) for now, then in zip(net.parameters(), after))
        return {"raised": type(error).__name__, "message": str(error), "seconds": time.monotonic() - started, "windows": windows, "intact": intact}
    return None


def going_on(kind, engine, folder, windows, asks):
    """Goes on from what `folder` has, for at most so many windows, after which rank `asks` asks to stop; then rank 0 saves. Three epochs of 150 samples."""
    from torch.distributed.checkpoint import state_dict as checkpoint

    rank, world = meet()
    data, net = texts(150), words()
    model = net if world == 1 else wrapped(net, engine, world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    if kind == "learned":
        loop = autoaccum.Accumulator(model, optimizer, target_batch=40, max_micro_batch=7)
        loader = DataLoader(data, batch_size=16)
    else:
        plan = by_hand(None, 40, 11) if world == 1 else fleet_plan(rank, world, {2: [31, 9], 3: [20, 13, 7], 4: [17, 11, 8, 4]}[world], [9, 13, 4, 4][:world])
        loop = autoaccum.Accumulator(model, optimizer, plan)
        loader = DataLoader(data, batch_sampler=plan.batch_sampler(data, seed=3))
    whole_state = checkpoint.StateDictOptions(full_state_dict=True)
    saved = Path(folder) / "run.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        loop.load_state_dict(state["loop"])
        checkpoint.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=whole_state)
    samples, done = [], 0
    for _ in range(loop.epoch, 3):
        for window in loop.windows(loader):
            samples.append(loop.step(window, summed).samples)
            done += 1
            if done == windows and rank == asks:
                loop.stop_at_window_end()
    states = checkpoint.get_state_dict(model, optimizer, options=whole_state)
    if rank == 0:
        torch.save({"model": states[0], "optimizer": states[1], "loop": loop.state_dict()}, saved)
    return {"samples": samples, "stopping": loop.is_stopping, "loop": loop.state_dict()}


def in_a_framework(name, target, most, folder, left):
    """Trains two windows and `left` samples through a framework, as torchrun would start it. Per window: the gradient's distance from the whole batch's, and this rank's samples."""
    from tests.integrations import in_ranks

    return in_ranks.PROGRAMS[name](target, most, folder, left)


def limit_data(mib):
    """A limit that the system enforces: so many MiB of data more than there are."""
    held = int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + int(mib * MIB), resource.RLIM_INFINITY))


def tuned_and_trained(room_mib, windows, then_mib, wrap_first, settings, sample_mib=2.0):
    """Tunes with a limit on rank 2, trains; then lowers the limit and trains on."""
    rank, world = meet(120)
    from autoaccum.devices import malloc

    malloc.steady_malloc()  # as tune will have it
    data, net = texts(400), words()
    model = wrapped(net, "ddp", world) if wrap_first else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    def loss(model, batch):
        ids, labels = batch
        out = Grown.apply(model(ids), sample_mib if rank == 2 or sample_mib <= 2 else 0.2, "forward")
        return F.cross_entropy(out.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"), (labels != -100).sum()

    before = [parameter.detach().clone() for parameter in net.parameters()]
    if rank == 2:
        limit_data(room_mib)
    plan = autoaccum.tune(model, optimizer, loss, data[:4], target_batch=60, headroom=0, rank_timeout_s=60, **settings)
    for _ in range(3):
        if plan.shares[2] or sample_mib > 60:
            break
        # On cores that other tests use, times may say that a rank only slows the others down.
        plan = autoaccum.tune(model, optimizer, loss, data[:4], target_batch=60, headroom=0, rank_timeout_s=60, **settings)
    untouched = all(torch.equal(one, other) for one, other in zip(before, net.parameters())) and not optimizer.state
    loop = autoaccum.Accumulator(model if wrap_first else wrapped(net, "ddp", world), optimizer, plan, careful_windows=None, rank_timeout_s=60)
    loader, rescued, order = DataLoader(data, batch_sampler=plan.batch_sampler(data, seed=1)), [], []
    ran = 0
    for epoch in range(100):
        order.append(torch.randperm(400, generator=torch.Generator().manual_seed(1 + epoch)).tolist())
        for window in plan.windows(loader):
            if ran == windows and rank == 2 and then_mib is not None:
                limit_data(then_mib)
            result = loop.step(window, loss)
            rescued.append(bool(result.rescued))
            ran += 1
            if ran == windows + 4:
                break
        if ran == windows + 4:
            break
    if rank == 2:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    reference = words()
    other = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    steps = 0
    for epoch in order:
        for start in range(0, 400, 60):
            total, count = summed(reference, data[epoch[start : start + 60]])
            (total / count).backward()
            other.step()
            other.zero_grad()
            steps += 1
            if steps == ran:
                return {
                    "shares": plan.shares, "micro_batches": plan.micro_batches, "most": [curve.most for curve in plan.fleet.curves], "untouched": untouched,
                    "windows": ran, "rescued": rescued, "difference": difference(net, reference), "warnings": plan.warnings, "said": plan.explain(),
                }  # fmt: skip
    return None


def learned(speeds, rooms_mib, windows, slows=None, runs_out=None, workers=None, every=None, of=400, turns=False):
    """Learns over ranks: a sample takes `speeds[rank]` seconds, and a rank may hold `rooms_mib[rank]` MiB more, at 2 MiB a sample.

    slows: from this window on, rank 0 takes three times as long. runs_out: at this window, rank 1 runs out of memory once.
    workers: of each rank's loader with `plan.batch_sampler`, which read ahead unlike far; None for a plain loader. of: so many samples are in the data.
    turns: two such loaders are used in turn.
    every: nothing is learned; a plan of even shares makes them anew after so many windows.
    """
    rank, world = meet(120)
    from autoaccum.devices import malloc

    malloc.steady_malloc()
    data, net = texts(of), words()
    model = wrapped(net, "ddp", world)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    at, failed = 0, []

    def loss(model, batch):
        ids, labels = batch
        if at == runs_out and rank == 1 and not failed:
            failed.append(at)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        ended = time.perf_counter() + speeds[rank] * len(ids) * (3 if slows is not None and at >= slows and rank == 0 else 1) + 0.001
        out = Grown.apply(model(ids), 2.0, "forward")
        while time.perf_counter() < ended:
            time.sleep(0.0002)  # three ranks share two cores here
        return F.cross_entropy(out.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"), (labels != -100).sum()

    limit = None if rooms_mib[rank] is None else Cpu().held_bytes() + rooms_mib[rank] * MIB
    if every is None:
        loop = autoaccum.Accumulator(model, optimizer, target_batch=60, memory_limit=limit, headroom=0, rank_timeout_s=60)
    else:
        loop = autoaccum.Accumulator(model, optimizer, fleet_plan(rank, world, [20] * 3, [10] * 3), replan_after=every, rank_timeout_s=60)
    shares, rescued, order, parts = [], [], [], []
    if workers is not None:
        samplers = [loop.plan.batch_sampler(data, drop_last=True) for _ in range(1 + turns)]
        drawn = [DataLoader(data, batch_sampler=each, num_workers=workers[rank], persistent_workers=workers[rank] > 0) for each in samplers]
    while at < windows:
        order.append(torch.randperm(of, generator=torch.Generator().manual_seed(len(order) // (1 + turns))).tolist())
        loader = DataLoader(Subset(data, order[-1]), batch_size=16) if workers is None else drawn[(len(order) - 1) % len(drawn)]
        for window in loop.windows(loader, drop_last=True):
            rescued.append(loop.step(window, loss).rescued is not None)
            shares.append(loop.plan.shares)
            parts.append(len(window.parts))
            at += 1
            if at == windows:
                break
    reference = words()
    other, steps = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9), 0
    for epoch in order:
        for start in range(0, of - of % 60, 60):
            if steps == windows:
                break
            total, count = summed(reference, data[epoch[start : start + 60]])
            (total / count).backward()
            other.step()
            other.zero_grad()
            steps += 1
    plan = loop.plan
    return {
        "shares": shares, "rescued": rescued, "difference": difference(net, reference), "learning": plan.learning, "micro_batch": plan.micro_batch,
        "seconds": plan.fleet.seconds(), "most": [curve.most for curve in plan.fleet.curves], "said": str(plan), "parts": parts,
    }  # fmt: skip


def refusals():
    """What is refused, in which words."""
    rank, world = meet()
    data, said = texts(), {}

    def noted(name, call):
        try:
            call()
            said[name] = None
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    def loop(model, plan=None, **given):
        return autoaccum.Accumulator(
            model, torch.optim.SGD(model.parameters(), lr=0.1), plan or fleet_plan(rank, world, [35, 17, 8], [20, 17, 3]), rank_timeout_s=20, **given
        )

    def tune(model, **given):
        return autoaccum.tune(model, torch.optim.SGD(model.parameters(), lr=0.1), summed, data[:4], rank_timeout_s=20, **{"target_batch": 60, **given})

    noted("not wrapped", lambda: loop(words()))
    noted("static graph", lambda: loop(DistributedDataParallel(words(), static_graph=True)))
    noted("data parallel", lambda: loop(nn.DataParallel(words())))
    noted("a part wrapped", lambda: loop(nn.Sequential(DistributedDataParallel(words()), nn.Linear(31, 31).double())))
    noted("a plan of one", lambda: loop(DistributedDataParallel(words()), by_hand(None, 60, 20)))
    noted("a plan of one, sharded", lambda: loop(wrapped(words(), "fsdp2", world), by_hand(None, 60, 20)))
    noted("another rank's plan", lambda: loop(DistributedDataParallel(words()), fleet_plan((rank + 1) % world, world, [35, 17, 8], [20, 17, 3])))
    noted("synced norms", lambda: tune(nn.Sequential(words(), nn.SyncBatchNorm(8).double())))  # DDP has it on GPUs only
    noted("tune sharded", lambda: tune(wrapped(words(), "fsdp2", world)))
    noted("scaler and sharded", lambda: loop(wrapped(words(), "fsdp2", world), scaler=torch.amp.GradScaler("cpu")))
    noted("targets differ", lambda: tune(words(), target_batch=60 + (rank == 1)))
    noted("models differ", lambda: tune(words() if rank else nn.Sequential(words())))
    noted("equal", lambda: tune(words(), target_batch=61, equal=True))
    net = words()
    loss = failing if rank == 1 else summed
    noted("a rank's job fails", lambda: autoaccum.tune(net, torch.optim.SGD(net.parameters(), lr=0.1), loss, data[:4], target_batch=60, rank_timeout_s=20))
    good = loop(DistributedDataParallel(words()))
    noted("too many", lambda: good.step(data[:60], summed))
    plan = fleet_plan(rank, world, [35, 17, 8], [20, 17, 3])
    noted("shared out already", lambda: next(iter(plan.windows(DataLoader(Subset(data, range(rank, 400, 3)), batch_size=32)))))
    noted("the same everywhere", lambda: next(iter(plan.windows(DataLoader(data, batch_size=32)))))
    from torch.distributed.algorithms.join import Join

    with Join([model := DistributedDataParallel(words())]):
        noted("join", lambda: loop(model).step(data[: [35, 17, 8][rank]], summed))
        model(data[:1][0]).sum().backward()  # Join waits for one of each rank
    noted("too few once", lambda: good.step(data[:3], summed))
    noted("too few twice", lambda: good.step(data[:3], summed))
    return said


def failing(model, batch):
    raise KeyError("labels")


if __name__ == "__main__":
    main()
