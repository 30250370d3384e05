"""What is left of a user's state when something fails: exceptions, signals and out-of-memory anywhere, hostile files, odd options.

    python benchmarks/faults.py [--tunes 6000] [--windows 4000] [--files 2000] [--options 2000] [--ranks 60] [--output benchmarks/results/faults.json]

Five parts, all from one seed. *Tunes*: something is raised, or a signal arrives, at a random moment of a random phase while a job is tuned
in place; afterwards weights, buffers, optimizer, gradients, modes, random numbers and RLIMIT_DATA are compared, bit by bit, and the exception
that arrives must be the one that was raised. *Windows*: memory runs out at random micro-steps of training, once to three times a window;
the parameters afterwards must be those of an undisturbed run to 1e-12. *Ranks*: one of two is ended by a signal at a random moment; the
other must end with our own error, and with the weights of its last whole window. *Files*: plans, profiles and remembered readings that are
cut, bent, nested or not text at all: read or refused with one of our own errors. *Options*: random combinations of the options of the command
line with hostile values: exit code 0, 2, 3 or 4 and at most one line of error. Nothing may take longer than its timeout of 20 seconds.
A violation is printed with the seed of its case and counted; the exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import platform
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import nn

import autoaccum
from autoaccum.cli import commands
from autoaccum.probe import cache
from autoaccum.simulate import profiles
from tests.digest import digest
from tests.plans import by_hand
from tests.ranked import in_ranks

SECONDS = 20


class Own(Exception):
    """A user's own exception, which cannot be pickled."""

    def __init__(self, what):
        super().__init__(what)
        self.where = lambda: what


KINDS = [
    lambda: ValueError("no such label"),
    lambda: KeyError("labels"),
    lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 9x16)"),
    lambda: RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    lambda: MemoryError(),
    lambda: RuntimeError("could not create a primitive"),
    lambda: OSError(5, "Input/output error"),
    lambda: StopIteration(),
    lambda: AssertionError(),
    lambda: Own("of the user"),
    lambda: SystemExit(3),
    lambda: KeyboardInterrupt(),
]
PLACES = ["loss", "backward", "batch", "step", "module"]


class Net(nn.Module):
    """BatchNorm, dropout, a plain attribute that forward changes, a tied weight."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop, self.last = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.Linear(12, 6)
        self.last.weight = nn.Parameter(self.first.weight.detach().T.clone())
        self.register_buffer("seen", torch.zeros(1), persistent=False)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


class Trap:
    """Springs at the n-th visit of a place."""

    def __init__(self, place, after, make):
        self.place, self.left, self.make, self.sprung = place, after, make, None

    def visit(self, place):
        if place == self.place:
            self.left -= 1
            if self.left == 0:
                INJECTED["tunes"] += 1
                self.sprung = self.make()
                raise self.sprung


INJECTED = Counter()  # of this process; what springs in a copy of it is counted where it springs again, and signals below


class Alarm(Exception):
    """A signal of the user's, turned into an exception as a scheduler's handler does."""


def job_with(trap, rng):
    torch.manual_seed(rng.randrange(1000))
    model = Net()
    optimizer = rng.choice([torch.optim.SGD, torch.optim.AdamW])(model.parameters(), lr=0.01)
    if rng.random() < 0.5:  # a state from before
        nn.functional.mse_loss(model(torch.randn(4, 6)), torch.randn(4, 6)).backward()
        optimizer.step()
    if rng.random() < 0.5:
        optimizer.zero_grad()

    def loss(model, batch):
        trap.visit("loss")
        output = model(batch)
        trap.visit("module")
        output.register_hook(lambda grad: trap.visit("backward"))
        return output.square().mean()

    def make(samples):
        trap.visit("batch")
        random.random()
        return torch.randn(samples, 6)

    optimizer.register_step_pre_hook(lambda *_: trap.visit("step"))
    job = autoaccum.Job(model, optimizer, loss, make, max_grad_norm=1.0 if rng.random() < 0.3 else None)
    return job


def held(job):
    return digest(job.model, job.optimizer), resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGINT)


def tune_case(seed):
    """One tune with one fault. Returns (outcome, violation or "")."""
    rng = random.Random(seed)
    by_signal = rng.random() < 0.3
    trap = Trap(rng.choice(PLACES), 10**9 if by_signal else rng.randint(1, 12), rng.choice(KINDS))
    job = job_with(trap, rng)
    limit = rng.choice([None, None, "1GiB"])
    before = held(job)
    number = rng.choice([signal.SIGINT, signal.SIGALRM])
    if by_signal:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT) if number == signal.SIGINT else _raise_alarm())
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0005, 0.06))
    raised = None
    try:
        autoaccum.tune(job, target_batch=rng.choice([7, 12, 24]), memory_limit=limit, equal=rng.random() < 0.2)
    except BaseException as error:
        raised = error
        INJECTED["tunes"] += by_signal and trap.sprung is None
    finally:
        if by_signal:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
    after = held(job)
    name = "fine" if raised is None else type(raised).__name__
    if before[0] != after[0]:
        return name, f"the state changed ({trap.place}, {name}, limit {limit})"
    if before[1:] != after[1:]:
        return name, f"RLIMIT_DATA or the handler of SIGINT changed ({before[1:]} -> {after[1:]})"
    # An out-of-memory is an outcome; everything else arrives as it was raised. In a copy of the process it was another object of the same kind.
    if trap.sprung is not None and raised is not None and not isinstance(raised, (autoaccum.AutoaccumError, type(trap.sprung))):
        return name, f"raised {trap.sprung!r}, arrived {raised!r}"
    if by_signal and raised is not None and not isinstance(raised, (KeyboardInterrupt, Alarm, autoaccum.AutoaccumError)):
        return name, f"a signal arrived as {raised!r}"
    return name, ""


def _raise_alarm():
    raise Alarm


def window_case(seed):
    """Six windows with injected out-of-memory beside the same windows without."""
    rng = random.Random(seed)
    target, most = rng.randint(4, 30), rng.randint(2, 9)
    data = torch.randn(6 * target, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    micro_steps = Counter()

    def run(chance):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        draws = random.Random(seed + 1)

        def trip(place):
            if chance and draws.random() < chance:
                micro_steps[place] += 1
                INJECTED["windows"] += 1
                raise draws.choice(KINDS[3:7])()

        def loss(model, batch):
            trip("forward")
            output = model(batch)
            output.register_hook(lambda grad: trip("backward"))
            return output.square().sum(), len(batch)

        job = autoaccum.Job(model, optimizer, loss, ())
        loop = autoaccum.Accumulator(job, by_hand(job, target, most), grow_after=2)
        for index in range(6):
            loop.step(data[index * target : (index + 1) * target])
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    clean = run(0.0)
    try:
        disturbed = run(rng.choice([0.01, 0.03, 0.06]))
    except Exception as error:  # one sample at a time and still refused: raised, with the weights of the last whole window
        if micro_steps and any("cannot be cut smaller" in note for note in getattr(error, "__notes__", ())):
            return "gave up", ""
        return type(error).__name__, f"raised {error!r}"
    difference = float((clean - disturbed).norm() / clean.norm())
    return f"{'rescued' if micro_steps else 'undisturbed'}", "" if difference < 1e-12 else f"parameters differ by {difference:.1e}"


def bent(rng, text):
    """A text with something wrong in it, as bytes."""
    ways = [
        lambda: text[: rng.randrange(len(text))].encode(),
        lambda: bytes(rng.randrange(256) for _ in range(rng.randrange(2000))),
        lambda: ("[" * rng.randrange(1, 200_000) + "]" * 10).encode(),
        lambda: (('{"a":' * 50_000) + "1" + "}" * 50_000).encode(),
        lambda: text.replace(rng.choice(["1", "12", "null", '"', ":", "{", "true"]), rng.choice(["", "-1", "1e999", "NaN", "[]", '"x"', "9" * 5000])).encode(),
        lambda: b"",
        lambda: b"\xff\xfe" + text.encode("utf-16"),
        lambda: json.dumps(rng.choice([None, 1, "x", [], {}, [[]], {"schema": "autoaccum.plan/1"}, {"schema": "autoaccum.readings/1", "kept": 7}])).encode(),
        lambda: text.encode() * rng.randrange(2, 50),
        lambda: text.replace("cpu", "\x1b[2J\x07" * 3).encode(),
    ]
    return rng.choice(ways)()


def file_case(seed, folder, samples):
    rng = random.Random(seed)
    kind = rng.choice(["plan", "profile", "cache"])
    content = bent(rng, samples[kind])
    path = folder / {"plan": "plan.json", "profile": "card.toml", "cache": "0" * 16 + ".json"}[kind]
    path.write_bytes(content)
    try:
        if kind == "plan":
            plan = autoaccum.Plan.load(path)
            plan.explain()
        elif kind == "profile":
            profiles.read(path)
        else:
            shown = cache.listed()
            if any(not letter.isprintable() and letter != "\n" for letter in shown):
                return kind, "control characters are printed"
            cache.clear()
        return f"{kind} read", ""
    except autoaccum.AutoaccumError as error:
        return f"{kind} refused", "" if len(str(error)) < 3000 else "a sentence of more than 3000 letters"
    except Exception as error:
        return kind, f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


VALUES = [
    "",
    "0",
    "-1",
    "1",
    "7",
    "12",
    "1e3",
    "nan",
    "inf",
    "9" * 30,
    "x",
    "\0",
    "é" * 40,
    "../..",
    "/dev/zero",
    "12 GiB",
    "3%",
    "100%",
    "0.5",
    "=",
    "a=b",
    "{micro_batch}",
]
OPTIONS = ["-b", "--target-tokens", "-d", "--memory-limit", "--headroom", "--max-micro-batch", "--objective", "--set", "--timeout", "--format", "--world", "--trial-seconds",
           "--set-file", "-m", "--windows", "-g", "--gpus", "--fixed", "--per-sample", "--parameters", "--link", "--dtype"]  # fmt: skip
FLAGS = ["--equal", "--largest", "--json", "-q", "--evaluate", "--no-cache", "--lockstep", "--all-gpus", "--nonsense"]
VERBS = ["tune", "check", "estimate", "fleet", "profiles show", "profiles list", "cache list", "devices", "train", "nonsense"]


def option_case(seed):
    """One call of the command line in this process, on values that end before anything is measured, as far as they do."""
    rng = random.Random(seed)
    words = rng.choice(VERBS).split()
    if rng.random() < 0.5:
        words.append(rng.choice(["demo", "nowhere.py", "no.module", "", "demo:x"]))
    words += [word for _ in range(rng.randrange(4)) for word in (rng.choice(OPTIONS), rng.choice(VALUES))]
    words += [rng.choice(FLAGS) for _ in range(rng.randrange(3))]
    words += ["--target-batch", rng.choice(VALUES) if rng.random() < 0.3 else "12"]
    rest = rng.choice([None, None, [], ["true"], ["true", "{micro_batch}"], ["nothing-there", "{micro_batch}"]])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = commands._run(words, rest, "--json" in words, False)
    told = [line for line in err.getvalue().splitlines() if line.startswith("autoaccum: ")]
    shown = " ".join(words)[:300]
    if code not in (0, 2, 3, 4):
        return str(code), f"exit code {code} of {shown!r} -- {rest}: {err.getvalue()[-300:]}"
    if code and len(told) != 1:
        return str(code), f"{len(told)} sentences for {shown!r}: {err.getvalue()[-300:]}"
    if code and "--json" in words and not _is_json(out.getvalue()):
        return str(code), f"no JSON document for {shown!r}"
    return str(code), ""


def _is_json(text):
    try:
        json.loads(text)
        return True
    except ValueError:
        return False


def ranks_case(seed):
    """A rank of two is ended by a signal at a random moment of training: the other ends with our error, with the weights of its last whole window."""
    drawn = random.Random(seed)
    victim, seconds, careful = drawn.randrange(2), drawn.uniform(0.001, 0.6), drawn.choice([None, 3, 0])
    told = in_ranks("killed_after", victim, seconds, careful, world=2)[1 - victim]
    if told is None:
        return "ended without a word", "the other rank told nothing"
    INJECTED["ranks"] += 1
    if told["raised"] != "RanksDisagree":
        return told["raised"], f"{told['raised']}: {told['message'][:300]}"
    return "RanksDisagree", "" if told["intact"] else f"the weights are not those of window {told['windows']}"


def part(name, cases, case):
    """Runs a part and returns its record."""
    outcomes, violations, slowest, started = Counter(), [], 0.0, time.monotonic()
    for seed in range(cases):
        began = time.monotonic()
        try:
            outcome, violation = case(seed)
        except BaseException as error:  # of the case itself
            if isinstance(error, KeyboardInterrupt) and name != "tunes":
                raise
            outcome, violation = "escaped", f"{type(error).__name__}: {error}: {traceback.format_exc()[-600:]}"
        seconds = time.monotonic() - began
        slowest = max(slowest, seconds)
        outcomes[outcome] += 1
        if seconds > SECONDS:
            violation = violation or f"took {seconds:.0f} s"
        if violation:
            violations.append({"seed": seed, "what": violation})
            print(f"{name} {seed}: {violation}", file=sys.stderr, flush=True)
    record = {
        "cases": cases,
        "violations": len(violations),
        "examples": violations[:20],
        "outcomes": dict(outcomes.most_common()),
        "injected": INJECTED[name],
        "seconds": round(time.monotonic() - started, 1),
        "slowest_case_seconds": round(slowest, 2),
    }
    print(f"{name}: {cases} cases, {len(violations)} violations, {record['seconds']} s", file=sys.stderr, flush=True)
    return record


def run(tunes, windows, hostile_files, options, ranks):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import logging

    logging.getLogger("autoaccum").setLevel(logging.ERROR)
    gc.collect()
    gc.freeze()  # every tune and every rescue collects garbage, and what was imported is none
    found = {"tunes": part("tunes", tunes, tune_case), "windows": part("windows", windows, window_case), "ranks": part("ranks", ranks, ranks_case)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["AUTOACCUM_CACHE_DIR"] = name
        model = nn.Linear(2, 1)
        job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, batch: model(batch).mean(), torch.ones(4, 2))
        samples = {
            "plan": json.dumps(by_hand(job, 12, 4).as_dict()),
            "profile": (profiles.folder() / "t4.toml").read_text(),
            "cache": json.dumps({"schema": "autoaccum.readings/1", "job": "demo", "written": "2026-01-01T00:00:00", "key": {"device": "cpu"}, "kept": []}),
        }
        found["files"] = part("files", hostile_files, lambda seed: file_case(seed, folder, samples))
        os.chdir(folder)
        found["options"] = part("options", options, option_case)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tunes", type=int, default=6000)
    parser.add_argument("--windows", type=int, default=4000)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--options", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=60)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    output = None if given.output is None else given.output.absolute()
    found = run(given.tunes, given.windows, given.files, given.options, given.ranks)
    found["versions"] = {"autoaccum": autoaccum.__version__, "torch": torch.__version__, "python": platform.python_version(), "machine": platform.processor() or platform.machine()}  # fmt: skip
    text = json.dumps(found, indent=1)
    print(text)
    if output is not None:
        output.write_text(text + "\n")
    sys.exit(1 if any(found[name]["violations"] for name in ("tunes", "windows", "files", "options", "ranks")) else 0)


if __name__ == "__main__":
    main()
