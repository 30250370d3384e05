"""The virtual GPU beside a real one. Predictions first, on any machine, and committed; then the card.

    python benchmarks/gpu/virtual.py predict --networks judged --output benchmarks/results/gpu_virtual_predictions.json

needs torch's build for CUDA (no card), torchvision and transformers of the versions that the card's machine has, so that both run the
same networks. `everything.py` measures; what it runs of this file has five parts:

A  The allocator alone: what a card's allocator did for real jobs and for random ones is replayed: every segment that is made or released,
   and the place of every block in its segment, must be the same.
B  What kernels take unseen: which operator asked for what, with its shapes, for jobs of many kinds.
C  Constants: context, cuBLAS workspaces, the kernels that attention takes, bandwidth and operations per second.
D  End to end: peak allocated, reserved and as the driver sees it, beside the prediction.
E  The boundary: the largest micro-batch under a cap, every probe in a fresh process, beside the prediction.
"""

from __future__ import annotations

import argparse
import bisect
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from autoaccum.data import batches
from autoaccum.devices import calibration
from autoaccum.simulate import profiles
from autoaccum.virtual.empty_weights import without_memory

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(ROOT)]
sys.path.append(str(HERE))  # last: a file there has the name of one in benchmarks
MIB, GIB = 2**20, 2**30

CAPS_GIB = (6, 8, 12, 16, 24)
BOUNDARIES = (
    ("mlp", "adam-fp32"), ("resnet50", "sgd-fp32"), ("efficientnet_b0", "adam-bf16"), ("convnext_tiny", "adam-bf16"), ("unet", "sgd-fp32"), ("vit_b_16", "fused-bf16"),
    ("gpt2", "adam-bf16"), ("bert", "adam-fp32"), ("llama", "fused-bf16"),
)  # fmt: skip
# Settings of the allocator under which random requests are made; with a share of the card where one binds.
SETTINGS = {
    "default": "",
    "split": "max_split_size_mb:64",
    "rounded": "roundup_power2_divisions:4",
    "expandable": "expandable_segments:True",
    "expandable, rounded": "expandable_segments:True,roundup_power2_divisions:8",
    "segments of 40": "large_segment_size_mb:40",
    "capped": "",
    "split, capped": "max_split_size_mb:64",
    "collected, capped": "garbage_collection_threshold:0.6",
    "expandable, capped": "expandable_segments:True",
}
CAP_BYTES = 1500 * MIB  # of those that are capped
PLACES = ("start", "before-backward")


# -- predictions, on any machine --


def predict(networks: dict[str, tuple[int, ...]], card: str, processes: int) -> dict[str, Any]:
    import workloads

    boundaries = [(name, way) for name, way in BOUNDARIES if name in networks]
    asked: dict[tuple[str, str], list[int]] = {}
    for name, way, batch in workloads.cases(networks):
        asked.setdefault((name, way), []).append(batch)
    tasks = [(card, name, way, batches, (name, way) in boundaries) for (name, way), batches in asked.items()]
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=12) as pool:
        found = list(pool.imap(_predicted, tasks, chunksize=1))
    return {
        "schema": "autoaccum.gpu_virtual_predictions/2",
        "card": card,
        "commit": commit(),
        "versions": versions(),
        "peaks": {key: peak for each in found for key, peak in each["peaks"].items()},
        "boundaries": {key: most for each in found for key, most in each["boundaries"].items()},
    }


def _predicted(task: tuple[str, str, str, list[int], bool]) -> dict[str, Any]:
    import warnings

    import torch
    import workloads

    from autoaccum.probe.readings import Limits
    from autoaccum.simulate.allocator import Allocator
    from autoaccum.simulate.tape import replay
    from autoaccum.trace import fake
    from autoaccum.virtual import simulation

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    card, name, way, batches, bounded = task
    fake.enable()
    with without_memory():
        job = workloads.job(name, way)
    profile = profiles.load(card)
    simulated = simulation.Simulation([job], profile, Limits(headroom=0))
    peaks, boundaries = {}, {}
    for batch in batches:
        ran = replay(simulated._on_card(simulated._traced.exactly(simulated._card, (batch, batch))), Allocator())
        peaks[f"{name} {way} {batch}"] = {"requested": ran.peak_requested_bytes, "allocated": ran.peak_allocated_bytes, "reserved": ran.peak_reserved_bytes}
    for cap in CAPS_GIB if bounded else ():
        limit = cap * GIB
        simulated.use(replace(profile, total=replace(profile.total, value=limit), context=profiles.of_size(limit).context))
        most = {"largest": simulated._most(partial(_stays_below, simulated, limit)), "hard_largest": simulated._most(simulated._survives)}
        boundaries[f"{name} {way} {cap}"] = most
    print(name, way, peaks, boundaries, flush=True)
    return {"peaks": peaks, "boundaries": boundaries}


def _stays_below(simulated: Any, limit: int, size: int) -> bool:
    return bool(simulated._peak(size, 2) <= limit)


# -- A: recorded events through the simulated allocator --


def replayed(events: list[tuple[str, int, int]], allocator: Any) -> dict[str, Any]:
    """Runs recorded requests and frees through the simulated allocator; says where the two first part."""
    made: list[tuple[str, int]] = []
    real: list[tuple[str, int]] = []
    bases: tuple[list[int], list[int]] = ([], [])  # of segments that are there: on the card, simulated

    def observe(action: str, address: int, size: int) -> None:
        made.append((f"segment_{action}", size))
        if action == "alloc":
            bisect.insort(bases[1], address)

    allocator.observer = observe
    blocks: dict[int, Any] = {}
    asked = 0

    def parted(at: int, why: str) -> dict[str, Any]:
        return {"exact": False, "event": at, "requests": asked, "why": why, "simulated": made[-3:], "real": real[-3:]}

    import torch

    from autoaccum.simulate.allocator_settings import UNLIMITED

    for at, (action, address, size) in enumerate(events):
        if action == "alloc":
            try:
                block = allocator.malloc(size)
            except torch.OutOfMemoryError:
                return parted(at, f"the simulated one ran out of memory at {size} bytes")
            blocks[address] = block
            asked += 1
            if made != real:  # the card tells of a segment before the block that needed it
                return parted(at, "segments")
            if bases[0] and block.base is None:
                places = [where - near[bisect.bisect(near, where) - 1] for where, near in ((address, bases[0]), (block.address, bases[1]))]
                if places[0] != places[1]:
                    return parted(at, f"a block of {size} bytes lies at {places[1]} of its segment, at {places[0]} on the card")
        elif action == "free":
            if address in blocks:
                allocator.free(blocks.pop(address))
        elif action == "oom":
            try:
                allocator.malloc(size)
            except torch.OutOfMemoryError:
                continue
            return parted(at, f"the card ran out of memory at {size} bytes")
        else:
            if action == "segment_alloc":
                bisect.insort(bases[0], address)
            real.append((action, size))
            if action in ("segment_free", "segment_unmap") and len(made) < len(real) and allocator.limit_bytes == UNLIMITED:
                allocator.empty_cache()  # without a limit nothing else gives segments back
    exact = made == real
    return {"exact": exact, "event": None if exact else len(events), "requests": asked, "segments": len(real), "peak_reserved": allocator.peak_reserved_bytes}


# -- on the card; each call in a process of its own that has not touched it yet --


def part(words: tuple[str, ...]) -> dict[str, Any]:
    """One measurement. What is long is under "recording" and "calls", as text."""
    kind, *rest = words
    parts: dict[str, Callable[..., dict[str, Any]]] = {
        "constants": constants, "profile": profile, "random": random_requests, "peak": peak, "calls": calls, "published": published, "boundary": boundary, "replay": peak_under,
    }  # fmt: skip
    return parts[kind](*rest)


def constants() -> dict[str, Any]:
    """What lies beside the allocator, after each kind of work; workspaces; the kernels that attention takes."""
    import torch

    from autoaccum import devices

    def outside() -> int | None:
        torch.cuda.empty_cache()
        return devices.get("cuda").memory(who=False).outside_bytes

    torch.zeros(1, device="cuda")
    found: dict[str, Any] = {"outside": {"first tensor": outside()}}
    a = torch.ones(512, 512, device="cuda")
    (a @ a).sum().item()
    found["outside"]["product"] = outside()
    calibration.warm_up()
    found["outside"]["a training step"] = outside()
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(0)
    found |= {"free": free, "total_of_mem_get_info": total, "total_of_properties": properties.total_memory, "multiprocessors": properties.multi_processor_count}
    return found | {"cublas": _workspaces(), "attention": _attention(), "cudnn": torch.backends.cudnn.version()}


def profile() -> dict[str, Any]:
    """What `autoaccum profiles record` writes."""
    from autoaccum.devices import calibration
    from autoaccum.simulate import profiles

    return profiles.document(calibration.calibrate("cuda"))


def _workspaces() -> dict[str, int]:
    """What the first product of a thread leaves allocated: plain ones (cuBLAS), and with a bias (cuBLASLt)."""
    import threading

    import torch

    found: dict[str, int] = {}

    def products() -> None:
        for dtype in (torch.float32, torch.bfloat16):
            a, bias = torch.ones(256, 256, device="cuda", dtype=dtype), torch.ones(256, device="cuda", dtype=dtype)
            for name, run in (("mm", lambda a=a: a @ a), ("addmm", lambda a=a, bias=bias: torch.addmm(bias, a, a))):
                before = torch.cuda.memory_allocated()
                out = run()
                found[f"{name} {dtype}"] = torch.cuda.memory_allocated() - before - out.nbytes
                del out

    thread = threading.Thread(target=products)
    thread.start()
    thread.join()
    return found


def _attention() -> list[list[Any]]:
    """(dtype, width of a head, mask, causal, dropout, grouped, gets a gradient, chosen): the number of torch.nn.attention.SDPBackend."""
    import itertools

    import torch

    found: list[list[Any]] = []
    grid = itertools.product(
        ("float32", "bfloat16", "float16"),
        (5, 20, 32, 64, 80, 96, 128, 160, 256, 512),
        ("", "bool", "float", "trained"),
        (False, True),
        (0.0, 0.1),
        (False, True),
    )
    for dtype, width, mask, causal, dropout, grouped in grid:
        if mask and causal:
            continue
        kind = getattr(torch, dtype)
        query = torch.zeros(2, 8, 128, width, device="cuda", dtype=kind, requires_grad=True)
        key = torch.zeros(2, 2 if grouped else 8, 128, width, device="cuda", dtype=kind, requires_grad=True)
        masks = {"": None, "bool": torch.ones(2, 1, 128, 128, device="cuda", dtype=torch.bool), "float": torch.zeros(2, 1, 128, 128, device="cuda", dtype=kind)}
        given = masks[mask] if mask != "trained" else torch.zeros(1, 8, 128, 128, device="cuda", dtype=kind, requires_grad=True)
        try:
            chosen: Any = torch._fused_sdp_choice(query, key, key, given, dropout, causal, enable_gqa=grouped)
        except RuntimeError as error:
            chosen = str(error).splitlines()[0][:80]
        found.append([dtype, width, mask, causal, dropout, grouped, chosen])
    return found


def random_requests(name: str) -> dict[str, Any]:
    """Random requests under one of the settings, in a process whose environment says so."""
    if os.environ.get("AUTOACCUM_SETTINGS") != name:
        environment = {**os.environ, "AUTOACCUM_SETTINGS": name, "PYTORCH_CUDA_ALLOC_CONF": SETTINGS[name]}
        if not SETTINGS[name]:
            del environment["PYTORCH_CUDA_ALLOC_CONF"]
        command = [sys.executable, str(HERE / "virtual.py"), "part", "random", name]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told
    import recorder
    import torch

    chance, tried, kept = random.Random(7), [], []
    total = torch.cuda.get_device_properties(0).total_memory
    capped = "capped" in name
    if capped:
        torch.cuda.set_per_process_memory_fraction(CAP_BYTES / total)
    for _ in range(20):
        torch.cuda.empty_cache()
        recorder.start()
        alive: list[Any] = []
        ooms = 0
        for _ in range(300):
            if alive and chance.random() < 0.45:
                alive.pop(chance.randrange(len(alive)))
            elif not capped and chance.random() < 0.01:
                torch.cuda.empty_cache()
            else:
                try:
                    alive.append(torch.empty(int(2 ** chance.uniform(0, 28)), dtype=torch.uint8, device="cuda"))
                except torch.OutOfMemoryError:
                    ooms += 1
        events = recorder.stop()
        alive.clear()
        tried.append({**judged(events, total, CAP_BYTES if capped else None), "ooms": ooms})
        kept.append(recorder.packed(events))
    exact = sum(each["exact"] for each in tried)
    wrong = next((each for each in tried if not each["exact"]), None)
    return {"exact": exact, "of": len(tried), "ooms": sum(each["ooms"] for each in tried), "total": total, "first_wrong": wrong, "recording": json.dumps(kept)}


def judged(events: list[tuple[str, int, int]], total: int, cap_bytes: int | None = None) -> dict[str, Any]:
    from autoaccum.simulate.allocator import Allocator
    from autoaccum.simulate.allocator_settings import settings_from_environment

    addresses = (address for action, address, _ in events if action == "segment_alloc")
    settings = settings_from_environment()  # expandable segments lie where they like: of each there is but one
    allocator = Allocator(total, settings=settings, place=None if settings.expandable_segments else lambda _: next(addresses))
    if cap_bytes is not None:
        allocator.set_fraction(cap_bytes / total)
    return replayed(events, allocator)


def on_the_card(name: str, way: str) -> Any:
    """A job with weights that mean nothing: large ones are never written on the host."""
    import torch
    import workloads

    from autoaccum.virtual.empty_weights import without_memory

    with without_memory():
        made = workloads.job(name, way)
    return _filled(made, torch)


def _filled(made: Any, torch: Any) -> Any:
    made.moved("cuda")
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.normal_(0, 0.02)
    return made


def ran(made: Any, batch: int) -> None:
    """The windows of a trial: one micro-batch and a step, then two and a step."""
    import torch

    from autoaccum.window import accumulation
    from autoaccum.window.start import WindowStart

    device = torch.device("cuda", 0)
    whole = batches.resize(made.batch, batch)
    state = WindowStart([made])
    scaler = None if made.scaler is None else torch.amp.GradScaler("cuda", init_scale=1.0, growth_interval=10**9)
    for pieces in (1, 2):
        state.note()
        accumulation.run(made, made.loss, [(whole, batch)] * pieces, samples=batch * pieces, device=device, scaler=scaler)
    torch.cuda.synchronize()


def peak(name: str, way: str, batch: str) -> dict[str, Any]:
    """D, and with its recording A."""
    return _peak(lambda: on_the_card(name, way), lambda made: ran(made, int(batch)))


def peak_under(setting: str, name: str, way: str, batch: str) -> dict[str, Any]:
    """A real job under another setting of the allocator."""
    if os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") != SETTINGS[setting]:
        command = [sys.executable, str(HERE / "virtual.py"), "part", "replay", setting, name, way, batch]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": SETTINGS[setting]}, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told
    return peak(name, way, batch)


def _peak(make: Callable[[], Any], train: Callable[[Any], None]) -> dict[str, Any]:
    import recorder
    import torch

    from autoaccum import devices

    torch.cuda.init()
    recorder.start()
    made = make()
    train(made)
    stats, memory = torch.cuda.memory_stats(), devices.get("cuda").memory(who=False)
    events = recorder.stop()
    return {
        "cublas": _cublas_bytes(events),
        "requested": stats["requested_bytes.all.peak"],
        "allocated": stats["allocated_bytes.all.peak"],
        "reserved": stats["reserved_bytes.all.peak"],
        "reserved_at_end": stats["reserved_bytes.all.current"],
        "outside": memory.outside_bytes,
        "retries": stats["num_alloc_retries"],
        "events": len(events),
        "replayed": judged(events, memory.total_bytes),
        "recording": recorder.packed(events),
    }


def _cublas_bytes(events: list[tuple[str, int, int]]) -> int:
    """The workspace of a cuBLAS handle: of the two sizes that are known, the one that was asked for."""
    asked = {size for action, _, size in events if action == "alloc"}
    return next((size for size in (32 * MIB, 8519680) if size in asked), 0)


def calls(name: str, way: str, batch: str) -> dict[str, Any]:
    """B: who asked for what."""
    return _calls(lambda: on_the_card(name, way), lambda made: ran(made, int(batch)))


def _calls(make: Callable[[], Any], train: Callable[[Any], None]) -> dict[str, Any]:
    import recorder
    import torch

    torch.cuda.init()
    made = make()
    recorder.start()
    mode = recorder.Calls()
    with mode:
        train(made)
    told = mode.told(recorder.stop())
    transient = sum(size for _, _, blocks in told["calls"] for size, kind, _ in blocks if kind == "t")
    return {"calls_made": len(told["calls"]), "transient_bytes": transient, "allocated": torch.cuda.max_memory_allocated(), "calls": recorder.text_of(told)}


def published(what: str, source: str, model: str, optimizer: str, batch: str) -> dict[str, Any]:
    """A row of the published ones, on this card: its peak or its calls. source: "xmem" or "timm"."""
    import estimate_published
    import torch

    from autoaccum.data import batches
    from autoaccum.virtual import without_memory

    torch.backends.cudnn.benchmark = source == "timm"

    def make() -> Any:
        with without_memory():
            made = estimate_published.xmem_job(model, optimizer) if source == "xmem" else estimate_published.timm_job(model)
        return _filled(made, torch)

    def train(made: Any) -> None:
        estimate_published.plain_loop(made, lambda: batches.resize(made.batch, int(batch)), "start", 4 if source == "xmem" else 3)
        torch.cuda.synchronize()

    return (_peak if what == "peak" else _calls)(make, train)


def boundary(name: str, way: str, cap_gib: str, guess: str) -> dict[str, Any]:
    """E: the largest micro-batch that trains under a cap, and the next, which does not: each seen twice, in fresh processes.

    Where the guess is not it, one process looks for it, with an empty cache before every probe, and fresh ones see to it then.
    """
    cap = int(cap_gib)
    probes: list[list[Any]] = []

    def fits(size: int) -> bool:
        found = _in_a_fork(lambda: _probe(name, way, size, cap)) if size else {"fits": True}
        probes.append([size, found["fits"], found.get("retries"), found.get("reserved")])
        return bool(found["fits"])

    largest = int(guess)
    if not fits(largest) or fits(largest + 1):
        largest = _in_a_fork(lambda: {"largest": _look_for(name, way, cap, max(int(guess), 1))})["largest"]
        while not fits(largest):
            largest -= 1
        while fits(largest + 1):
            largest += 1
    again = [fits(largest), fits(largest + 1)]
    return {"largest": largest, "again": again, "guess": int(guess), "probes": probes}


def _look_for(name: str, way: str, cap_gib: int, guess: int) -> int:
    import gc

    import torch

    def fits(size: int) -> bool:
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        return bool(_probe(name, way, size, cap_gib)["fits"])

    torch.cuda.init()
    low = high = guess
    step = max(guess // 64, 1)
    if fits(guess):
        while fits(high := low + step):
            low, step = high, 2 * step
    else:
        low = max(high - step, 0)
        while low and not fits(low):
            high, step = low, 2 * step
            low = max(high - step, 0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _probe(name: str, way: str, size: int, cap_gib: int) -> dict[str, Any]:
    import torch

    torch.cuda.set_per_process_memory_fraction(min(cap_gib * GIB / torch.cuda.get_device_properties(0).total_memory, 1.0))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats().get("num_alloc_retries", 0)
    try:
        ran(on_the_card(name, way), size)
    except torch.OutOfMemoryError:
        return {"fits": False}
    stats = torch.cuda.memory_stats()
    return {"fits": True, "retries": stats["num_alloc_retries"] - before, "reserved": stats["reserved_bytes.all.peak"]}


def _in_a_fork(do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    receive, send = os.pipe()
    process = os.fork()
    if not process:
        code = 1
        try:
            os.write(send, json.dumps(do()).encode())
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(send)
    with os.fdopen(receive) as answer:
        text = answer.read()
    os.waitpid(process, 0)
    if not text:
        raise RuntimeError("a probe ended without an answer")
    found: dict[str, Any] = json.loads(text)
    return found


# -- what was run --


def machine() -> dict[str, Any]:
    import torch

    from autoaccum.devices import nvml

    return {
        "card": torch.cuda.get_device_name(0),
        "driver": nvml.driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "when": time.strftime("%Y-%m-%d"),
    }


def versions() -> dict[str, str]:
    import importlib.metadata

    return {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in ("torch", "torchvision", "transformers")}}


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    if sys.argv[1:2] == ["part"]:
        print(json.dumps(part(tuple(sys.argv[2:]))))
        return
    import workloads

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=["predict"])
    parser.add_argument("--card", default="h200")
    parser.add_argument("--networks", choices=["learnt", "judged", "all"], default="all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    networks = {"learnt": workloads.LEARNT, "judged": workloads.JUDGED, "all": workloads.BATCHES}[given.networks]
    given.output.write_text(json.dumps(predict(networks, given.card, given.processes), indent=1) + "\n")


if __name__ == "__main__":
    main()
