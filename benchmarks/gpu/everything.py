"""On a CUDA card, without a network: all that is to be known there, in under ten minutes, as one JSON.

    python benchmarks/gpu/everything.py --output benchmarks/results/gpu.json [--minutes 9] [--parts tests,unmeasured,peers,loop,frameworks,selfcheck,memory,tune]

Every measurement is a case of its own, in a process of its own, written as soon as it is there; a run that was cut short, or that ran out of
its minutes, goes on where it stopped. What takes memory runs beside others, what takes time runs alone. Records the card, the driver and the
versions. Recordings of the allocator and of operators are long; they go into files beside the output.

tests   `pytest -m gpu`, its log kept in pytest.txt beside the output.
unmeasured  what nobody has measured yet (`unmeasured.py`): retries of refused sizes, CUDA graphs, benchmark mode, a compiled GPT, throughput
        against fewest steps, 200 windows with a neighbour, with a preset fraction, with expandable segments, and a billion parameters.
selfcheck  `autoaccum selfcheck`, which anyone can run.
memory  the virtual GPU beside this one: parts A to E of `virtual.py`, for the networks that were predicted, and `published`: some rows of other
        people's measurements, run here.
loop    overhead of the loop, copies ahead, a rescue, a snapshot (`loop.py`).
tune    plans under a cap of 8 GiB for a conv net and a GPT (fp32, bf16, fp16 with a scaler, checkpointed, compiled), beside an oracle
        that runs every larger size that would save a step; 30 windows trained at the plan; samples per second.
peers   the systems of `benchmarks/peers` that are installed here, on two networks under a cap of 8 GiB, beside the largest size that
        trains there; what is not installed is listed. `--sites DIR` holds packages for one of them, in a folder of its name.

frameworks  GPT-2 in Transformers' Trainer, some of the ways of `frameworks.py`.

`--device cpu --tiny` tries tune and peers out where there is no card.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click
import forks
import unmeasured
import virtual
from forks import GIB, Case

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(ROOT), str(ROOT / "examples")]

MIB = 2**20
CAP, TARGET = 8 * GIB, 512
WAYS = ("fp32", "bf16", "fp16", "checkpointed", "compiled")
PEERS = (
    ("autoaccum", "autoaccum"), ("autoaccum", "autoaccum, from the host"), ("autoaccum", "autoaccum, largest=True, headroom=0"), ("textbook", "textbook"), ("toma", "toma"), ("torch_max_mem", "torch-max-mem"),
    ("accelerate", "Accelerate"), ("lightning", "Lightning, power"), ("lightning", "Lightning, binsearch"), ("transformers", "HF Trainer"),
)  # fmt: skip
LAST_PEERS = (("koila", "koila"), ("composer", "Composer"), ("ludwig", "Ludwig"))
FRAMEWORKS = ("autoaccum", "by hand, 64", "autoaccum, throughput", "HF, auto_find_batch_size")
PARTS = ("tests", "unmeasured", "peers", "loop", "frameworks", "selfcheck", "memory", "tune")
PREDICTIONS = HERE.parent / "results" / "gpu_virtual_predictions.json"
_LONG = ("recording", "calls")  # what of a row goes into files of its own
_FILE_BYTES = 14 * MIB
# What is imported before the forks must leave the card untouched: whether there is one is asked of NVML.
_SURROUNDED = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def cases(parts: list[str], predicted: dict[str, Any], wanted: Callable[[str], bool]) -> list[Case]:
    """What is run, in order: what nobody has measured yet comes first, then the self-check, then what a card has told before."""
    open_questions = {
        name: Case(f"unmeasured {name}", ("unmeasured", name), alone=True, timeout_s=200 if name in ("compiled", "graphs", "a billion") else 100)
        for name in unmeasured.QUESTIONS
    }
    oracles = [Case(f"oracle {network}", ("oracle", network), alone=True, timeout_s=60) for network in ("conv net", "transformer")]
    peers, last = (
        [
            Case(f"peers {system}, {network}", ("peer", name, system, network), alone=True, timeout_s=45)
            for name, system in group for network in ("conv net", "transformer")
        ]
        for group in (PEERS, LAST_PEERS)
    )  # fmt: skip
    tests = [Case("tests", ("tests",), 20 * GIB, timeout_s=220)] if "tests" in parts else []
    retries, *rest = open_questions.values() if "unmeasured" in parts else [None]
    loop = [Case("loop", ("loop",), alone=True, timeout_s=120)] if "loop" in parts else []
    found = [*tests, *filter(None, [retries]), *([*oracles, *peers] if "peers" in parts else []), *rest[:3], *loop, *rest[3:]]
    if "frameworks" in parts:
        found += [Case(f"frameworks {way}", ("frameworks", way), alone=True, timeout_s=120) for way in FRAMEWORKS]
    if "selfcheck" in parts:
        found.append(Case("selfcheck", ("selfcheck",), alone=True, timeout_s=400))
    if "memory" in parts:
        found += [Case(f"C {name}", ("virtual", name), alone=True, timeout_s=40) for name in ("constants", "profile")]
        found += list(filter(lambda case: wanted(case.name), _of_memory(predicted)))
    tune = [Case(f"tune {model} {way}", ("tune", model, way), alone=True, timeout_s=100) for way in WAYS if way != "compiled" for model in ("conv net", "gpt")]
    # Compilers take longer than all the rest: beside others, so that what these two train in a second says nothing.
    compiled = [Case(f"tune {model} compiled", ("tune", model, "compiled"), CAP, timeout_s=150) for model in ("conv net", "gpt")]
    found += [*compiled, *tune] if "tune" in parts else []
    found += last if "peers" in parts else []
    return found


def _of_memory(predicted: dict[str, Any]) -> list[Case]:
    peaks = {key: each["reserved"] for key, each in predicted.get("peaks", {}).items()}

    def room(key: str) -> int:
        return int(1.15 * peaks.get(key, 12 * GIB))

    recorded = [Case(f"A {name}", ("virtual", "random", name), 4 * GIB) for name in virtual.SETTINGS]
    for setting in ("expandable", "rounded", "split"):
        for key in ("resnet50 adam-bf16 32", "gpt2 adam-bf16 4"):
            if key in peaks:
                recorded.append(Case(f"A {key}, {setting}", ("virtual", "replay", setting, *key.split()), room(key)))
    ends = [Case(f"D {key}", ("virtual", "peak", *key.split()), room(key)) for key in peaks]
    seen = [Case(f"B {key}", ("virtual", "calls", *key.split()), room(key)) for key in peaks if _looked_into(key)]
    others = [
        Case(f"{letter} {source} {model} {optimizer} {batch}", ("virtual", "published", what, source, model, optimizer, batch), room)
        for letter, what in (("B", "calls"), ("P", "peak"))
        for source, model, optimizer, batch, room in published()
    ]
    edges = [
        Case(f"E {key}", ("virtual", "boundary", *key.split(), str(each["hard_largest"])), int(key.split()[-1]) * GIB, timeout_s=150)
        for key, each in predicted.get("boundaries", {}).items()
    ]
    return _in_turn(edges, recorded, ends, seen, others)


def _looked_into(key: str) -> bool:
    """Whose operators are written down: the second size in every way but the plainest ones, which one size more shows."""
    import workloads

    name, way, batch = key.split()
    sizes = workloads.BATCHES[name]
    return int(batch) == sizes[1] or (int(batch) == sizes[2] and way in ("sgd-fp32", "adam-bf16"))


def published() -> Iterator[tuple[str, str, str, str, int]]:
    """(source, model, optimizer, micro-batch, about what it takes) of rows that are run here."""
    data = HERE.parent / "data"
    for row in csv.DictReader((data / "xmem_peaks_dev.csv").open()):
        yield "xmem", row["model"], row["optimizer"], row["batch"], int(1.2 * int(row["nvml_peak_bytes"]))
    for model, batches in {"VGG19": (338, 340, 384), "MobileNetV2": (250, 252, 318, 256), "MnasNet": (322, 324, 376, 256), "RegNetY400MF": (409, 512)}.items():
        for batch in batches:  # beside those whose peaks nobody predicts
            yield "xmem", model, "SGD", str(batch), 12 * GIB
    for model, batch in TIMM:
        yield "timm", model, "Adam", str(batch), 24 * GIB


TIMM = (
    ("resnet18d", 32), ("resnet50_clip", 32), ("vgg19", 32), ("repvgg_b2", 32), ("gernet_l", 32), ("regnety_040", 64), ("regnetx_032", 64), ("efficientnet_es", 16),
    ("rexnet_300", 32), ("hgnetv2_b5", 32), ("coatnet_2_rw_224", 16), ("darknet17", 64), ("convnext_tiny", 32), ("mobilenetv3_large_100", 64), ("vit_base_patch16_224", 32),
    ("poolformer_s36", 16), ("inception_next_base", 8), ("mixer_b32_224", 16), ("focalnet_tiny_srf", 32), ("res2net50_26w_6s", 32), ("nest_small", 32), ("resnest26d", 32),
)  # fmt: skip


def _in_turn(*rows: list[Case]) -> list[Case]:
    return [case for each in zip_longest(*rows) for case in each if case is not None]


# -- each of these in a process of its own --


def do(words: tuple[str, ...], *, tiny: bool = False, device: str = "cuda", sites: str = "", beside: Path = Path(".")) -> dict[str, Any]:
    """A case, in this process."""
    warnings.simplefilter("ignore")
    kind, *rest = words
    if kind == "virtual":
        return virtual.part(tuple(rest))
    if kind == "tests":
        return tests(beside)
    if kind == "unmeasured":
        return unmeasured.QUESTIONS[rest[0]](tiny, device)
    if kind == "selfcheck":
        return selfcheck(beside)
    if kind == "tune":
        return tuned(rest[0], rest[1], tiny, device)
    if kind == "peer":
        return peer(rest[0], rest[1], rest[2], tiny, device, sites)
    if kind == "oracle":
        return oracle(rest[0])
    if kind == "frameworks":
        import frameworks

        return frameworks.way(rest[0], tiny, device)
    if kind == "probe":
        import torch

        torch.zeros(1, device="cuda")
        return {"device": torch.cuda.get_device_name(0)}
    output = beside / "loop.json"
    done = subprocess.run([sys.executable, str(HERE / "loop.py"), "--output", str(output)], check=False, capture_output=True, text=True)
    told: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    output.unlink(missing_ok=True)
    return told | ({"cut_short": done.stderr.strip().splitlines()[-5:]} if done.returncode else {})


def tests(beside: Path) -> dict[str, Any]:
    """The last words of `pytest -m gpu`; all of them in a file beside the output."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/on_gpu", "-n", "4", "-p", "no:cacheprovider", "--durations=8", "--tb=short"]
    with (beside / "pytest.txt").open("w") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
    return {"code": done.returncode, "said": (beside / "pytest.txt").read_text().splitlines()[-25:]}


def selfcheck(beside: Path) -> dict[str, Any]:
    """The document of `autoaccum selfcheck`, which goes on from its own file."""
    output = beside / "selfcheck.json"
    command = [sys.executable, "-m", "autoaccum", "selfcheck", "--output", str(output), "--minutes", "5"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    return json.loads(output.read_text()) if output.exists() else {"failed": [done.stderr[-500:]]}


def make(model: str, way: str, tiny: bool, device: str) -> Any:
    """One of the examples' jobs, larger, on the card."""
    import conv_net
    import tiny_gpt
    import torch

    import autoaccum

    if model == "gpt":
        base = tiny_gpt.make_job() if tiny else tiny_gpt.make_job(width=512, layers=8, heads=8, length=512)
        if way == "checkpointed":
            for block in base.model.blocks:
                block.forward = _checkpointed(block.forward)
    else:
        base = conv_net.make_job() if tiny else conv_net.make_job(channels=64, side=128, samples=64)
        if way == "checkpointed":
            base.model.forward = _checkpointed(base.model.forward)
    net = base.model.to(device)
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(way)
    return autoaccum.Job(
        torch.compile(net) if way == "compiled" else net, base.optimizer, base.loss, base.batch, autocast=autocast, max_grad_norm=1.0,
        scaler=torch.amp.GradScaler(device) if way == "fp16" else None,
    )  # fmt: skip


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    return lambda *given: checkpoint(forward, *given, use_reentrant=False)


def tuned(model: str, way: str, tiny: bool, device: str) -> dict[str, Any]:
    """The plan, the oracle's verdict on every larger size worth trying, and windows trained at the plan."""
    import torch

    import autoaccum
    from autoaccum import devices, oom
    from autoaccum.data import batches
    from autoaccum.plan import arithmetic
    from autoaccum.plan.arithmetic import micro_batches
    from autoaccum.window import accumulation

    backend = devices.get(device)
    backend.prepare()
    target = 24 if tiny else TARGET
    limit = backend.held_bytes() + 300 * MIB if tiny else CAP
    job = make(model, way, tiny, device)
    started = time.perf_counter()
    plan = autoaccum.tune(job, target_batch=target, memory_limit=limit)
    row: dict[str, Any] = {"plan": plan.as_dict(), "tuning_seconds": time.perf_counter() - started}
    loop, batch = autoaccum.Accumulator(job, plan), job.batch_of(target)
    took: list[float] = []
    with backend.capped(plan.budget_bytes + plan.headroom_bytes), backend.watch() as watch:
        for _ in range(3 if tiny else 30):
            backend.synchronize()
            began = time.perf_counter()
            rescued = loop.step(batch).rescued
            backend.synchronize()
            took.append(time.perf_counter() - began)
            row["rescued"] = row.get("rescued") or (str(rescued) if rescued else None)
            if sum(took) > 4:
                break
        row |= {"windows": len(took), "samples_per_second": target / statistics.median(took[1:] or took), "peak_bytes": watch.peak_bytes()}
    job.optimizer.zero_grad()
    smallest = 2 if model == "conv net" else 1
    row["oracle"] = {}
    if way == "compiled":  # every size would be compiled anew, longer than a case may take
        return row
    for size in [each for each in arithmetic.candidate_sizes(target, smallest=smallest) if each >= plan.micro_batch]:
        sizes = micro_batches(target, math.ceil(target / size))
        backend.release()
        try:
            with backend.capped(plan.budget_bytes):
                for _ in range(2):
                    whole = job.batch_of(sizes[0])
                    pieces = [(batches.resize(whole, each), each) for each in sizes[:2]]
                    accumulation.run(job, job.loss, pieces, samples=sum(each for _, each in pieces), device=torch.device(device), scaler=job.scaler)
            row["oracle"][size] = True
        except Exception as error:
            if oom.verdict(error) == "not":
                raise
            row["oracle"][size] = False
            del error
            job.optimizer.zero_grad()
    fitting = [size for size, fits in row["oracle"].items() if fits]
    row["oracle_steps"] = math.ceil(target / max(fitting)) if fitting else None
    return row


def oracle(network: str) -> dict[str, Any]:
    """The largest size of which two micro-batches train under the cap, by bisection in one process whose cache is emptied."""
    import torch
    from networks import LARGER
    from work import Work

    build, samples = LARGER[network]
    torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.get_device_properties(0).total_memory)

    def trains(size: int) -> bool:
        torch.cuda.empty_cache()
        work = Work(TARGET, 2, samples, build, place="cuda")
        try:
            work.train((size, size))
        except torch.OutOfMemoryError:
            return False
        return True

    low, high = 0, TARGET + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if trains(middle) else (low, middle)
    return {"largest": low}


def peer(name: str, system: str, network: str, tiny: bool, device: str, sites: str) -> dict[str, Any]:
    """One system on the card; "missing" where its package is not here."""
    if sites and (Path(sites) / name).is_dir():
        sys.path.insert(0, str(Path(sites) / name))
        if name == "koila":  # torch has imported NVIDIA's module of that name, in which the part is missing that koila wants
            sys.modules.pop("pynvml", None)
    import contestant
    import torch
    from networks import LARGER, NETWORKS
    from work import Work

    adapter = contestant.adapter(name)
    build, samples = (NETWORKS if tiny else LARGER)[network]
    target, limit = (16, 0) if tiny else (TARGET, CAP)
    if limit:
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    if name == "autoaccum" and limit:  # its limit holds what the process takes beside its allocator, the others' cap does not
        from autoaccum import devices
        from autoaccum.devices.budget import ASSUMED_OUTSIDE

        outside = devices.get(device).memory().outside_bytes
        limit += ASSUMED_OUTSIDE if outside is None else outside
    work = Work(
        target, 2 if tiny else 10, samples, build, limit_bytes=limit or contestant.held("VmRSS") + GIB, place=device, from_host="from the host" in system
    )
    row = contestant.outcome(adapter.run, system, work)
    return {"missing": row["error"]} if (row["error"] or "").startswith(("ModuleNotFoundError", "ImportError", "PackageNotFoundError")) else row


# -- the run --


def machine(device: str) -> dict[str, Any]:
    """The card, the driver and the versions, without touching the card."""
    import torch

    told: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "when": time.strftime("%Y-%m-%d")}
    for package in ("torchvision", "timm", "accelerate", "lightning", "transformers", "triton"):
        try:
            told[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            told[package] = None
    if device != "cpu":
        asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
        card, total, driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip().split(", ")
        told |= {"card": card, "total_mib": int(total), "driver": driver, "cuda": torch.version.cuda}
    return told


def imported() -> None:
    """All that a case may need, so that forks have it."""
    for name in ("torch", "torch._dynamo", "torchvision", "timm", "transformers", "accelerate", "lightning", "workloads", "recorder", "estimate_published", "contestant", "networks", "autoaccum.tuner.in_place"):  # fmt: skip
        try:
            __import__(name)
        except ImportError as missing:
            click.echo(f"not here: {missing}")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.GPT2LMHeadModel, transformers.BertForMaskedLM, transformers.T5ForConditionalGeneration, transformers.LlamaForCausalLM, transformers.Trainer  # noqa: B018 - lazy


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--minutes", default=9.0, show_default=True, help="No case is begun after that, and none goes on.")
@click.option("--parts", default=",".join(PARTS), show_default=True)
@click.option("--only", default="", help="Of memory's cases those whose name begins with one of these, separated by commas.")
@click.option("--predictions", type=click.Path(path_type=Path, exists=True), default=PREDICTIONS)
@click.option("--sites", default="", help="Folder of folders, each with packages for the peer of its name.")
@click.option("--workers", default=10, show_default=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="Small networks and targets, to try this file out.")
@click.option("--case", "words", hidden=True)
def main(output: Path, minutes: float, parts: str, only: str, predictions: Path, sites: str, workers: int, device: str, tiny: bool, words: str | None) -> None:
    if words is not None:
        print(json.dumps(do(tuple(json.loads(words)), tiny=tiny, device=device, sites=sites, beside=output.parent)))
        return
    began = time.monotonic()
    ends = began + 60 * minutes
    os.environ.update(_SURROUNDED)
    here = machine(device)
    predicted = json.loads(predictions.read_text())
    document = (
        json.loads(output.read_text())
        if output.exists()
        else {"schema": "autoaccum.gpu/3", "machine": here, "cap_bytes": CAP, "target": TARGET, "runs": [], "rows": {}}
    )
    if document["machine"].get("card") != here.get("card"):
        raise click.ClickException(f"{output} was begun on {document['machine'].get('card')}, this is {here.get('card')}: give another output")
    document["runs"].append({"when": time.strftime("%Y-%m-%d %H:%M"), "parts": parts, "predictions_commit": predicted.get("commit")})
    imported()
    click.echo(f"{time.monotonic() - began:.0f} s: imported")
    heads = tuple(each.strip() for each in only.split(",") if each.strip())
    asked = [
        case for case in cases(parts.split(","), predicted, lambda name: not heads or name.startswith(heads))
        if case.name not in document["rows"] or "failed" in document["rows"][case.name]
    ]  # fmt: skip
    if device == "cpu":
        asked = [case for case in asked if case.words[0] in ("tune", "peer", "frameworks", "unmeasured")]

    written = 0.0

    def done(case: Case, row: dict[str, Any]) -> None:
        nonlocal written
        for name in _LONG:
            if name in row:
                _put_beside(output, f"{case.name} {name}", row.pop(name))
        document["rows"][case.name] = {**row, "run": len(document["runs"]) - 1}
        told = {key: row.get(key) for key in ("micro_batch", "largest", "samples_per_second", "missing", "code") if row.get(key)}
        told |= {"failed": row["failed"][-1]} if row.get("failed") else {}
        if told or case.alone:
            click.echo(f"{time.monotonic() - began:5.0f} s  {case.name}  {row['took_s']} s  {str(told)[:400]}")
        if time.monotonic() - written > 2:
            _write(output, document)
            written = time.monotonic()

    def in_a_fork(words: tuple[str, ...]) -> dict[str, Any]:
        return do(words, tiny=tiny, device=device, sites=sites, beside=output.parent)

    def anew(words: tuple[str, ...]) -> dict[str, Any]:
        more = ["--sites", sites, "--device", device, *(["--tiny"] if tiny else [])]
        command = [sys.executable, __file__, "--output", str(output), "--case", json.dumps(words), *more]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found: dict[str, Any] = json.loads(told.splitlines()[-1])
        return found

    room = (here.get("total_mib", 0) - 5000) * MIB
    how = in_a_fork
    if device == "cuda":
        first: dict[str, Any] = {}
        forks.run([Case("probe", ("probe",))], in_a_fork, lambda _, row: first.update(row), ends=ends, room_bytes=room, workers=1)
        click.echo(f"{time.monotonic() - began:.0f} s: {first}")
        if "device" not in first:
            click.echo("a fork of this process cannot use the card: every case imports everything itself")
            how = anew
    left = forks.run(asked, how, done, ends=ends, room_bytes=room, workers=workers)
    _write(output, document)
    if left:
        click.echo(f"{minutes:g} minutes are over; {len(left)} cases are left, of {len(asked)}: run it again to go on from {left[0].name!r}")


def _write(output: Path, document: dict[str, Any]) -> None:
    beside = output.with_suffix(".new")  # a run that is killed leaves a whole file
    beside.write_text(json.dumps(document, indent=1) + "\n")
    beside.replace(output)


def _put_beside(output: Path, key: str, text: str) -> None:
    number = 0
    while (path := output.with_name(f"{output.stem}-long-{number}.jsonl")).exists() and path.stat().st_size > _FILE_BYTES - len(text):
        number += 1
    with path.open("a") as file:
        file.write(json.dumps([key, text]) + "\n")


if __name__ == "__main__":
    main()
