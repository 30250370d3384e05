"""autoaccum and its peers on the same work, each as its real package in an environment of its own.

    python benchmarks/side_by_side.py --output benchmarks/results/side_by_side.json [--only NAME ...] [--again]

Rules: the same model, loss, data and optimizer for all, the same limit, each system's defaults as documented (what an adapter in
`peers/` does is its documentation's recipe), every system in fresh processes, several runs, medians. A system that only finds a
size then trains by the plain loop in `target // size` steps; one whose way is to adapt while it trains, trains its own way.

`policy`: simulated devices of known truth (`simulated.py`). `real`: two networks on a CPU, memory limited by the system (RLIMIT_DATA) to so
much more than the process held when everything was imported and had run once; one thread, glibc's allocator set steady for all,
because with its defaults no two runs agree. The oracle tries sizes in fresh processes. Systems that cannot take part are listed with why.
A run that was cut short goes on from its output.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import contestant

from autoaccum import devices

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENVIRONMENTS = ROOT / ".venv" / "peers"
NETWORKS, TARGET, ROOM_MIB = ("conv net", "transformer"), 192, 96
WINDOWS = (50, 3, 3)  # that are trained in each run: the first asks whether the answer survives, all of them what the search takes
STEADY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}
SURROUNDED = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def adapters() -> dict[str, ModuleType]:
    """By file name. They import their packages only when they run."""
    return {path.stem: contestant.adapter(path.stem) for path in sorted((HERE / "peers").glob("*.py"))}


def installed(name: str, adapter: ModuleType) -> tuple[Path, str | None]:
    """The interpreter of an adapter's own environment, and why it could not be made. torch is installed once, for all."""
    if name == "autoaccum":
        return Path(sys.executable), None
    torch, own = ENVIRONMENTS / "torch", ENVIRONMENTS / name
    python = own / "bin" / "python"
    marker, asked = own / "installed", " ".join((*adapter.PACKAGES, *getattr(adapter, "ALONE", ())))
    if not marker.exists() or marker.read_text() != asked:
        venv.create(own, with_pip=True, clear=True)
        packages = next((own / "lib").glob("python*")) / "site-packages"
        (packages / "torch.pth").write_text(str(next((torch / "lib").glob("python*")) / "site-packages") + "\n")
        for words in (adapter.PACKAGES, ("--no-deps", *getattr(adapter, "ALONE", ()))):
            if len(words) > (words[:1] == ("--no-deps",)):
                done = _pip(python, *words)
                if done.returncode:
                    return python, f"pip install {' '.join(words)}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}"
        marker.write_text(asked)
    return python, None


def _pip(python: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def with_torch() -> None:
    """The one environment that the others look into."""
    own = ENVIRONMENTS / "torch"
    if not (own / "installed").exists():
        venv.create(own, with_pip=True, clear=True)
        done = _pip(own / "bin" / "python", "torch", "numpy")
        if done.returncode:
            raise click.ClickException(done.stderr)
        (own / "installed").touch()


def versions(python: Path, adapter: ModuleType) -> dict[str, str]:
    """Of what the adapter asks for, and torch."""
    names = [
        "torch",
        *(word.split("<")[0] for word in (*getattr(adapter, "ALONE", ())[:1], *adapter.PACKAGES[:2])),
        *(("autoaccum",) if not adapter.PACKAGES else ()),
    ]
    program = "import importlib.metadata as m, json, sys\nfound = {}\nfor name in sys.argv[1:]:\n    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\nprint(json.dumps(found))"
    found: dict[str, str] = json.loads(subprocess.run([str(python), "-c", program, *names], capture_output=True, text=True, check=True).stdout)
    return found


def told(python: Path, name: str, system: str, contest: str, timeout_s: float, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What one process of a contestant says; a last line with "died" if it ended badly."""
    command = [str(python), str(HERE / "contestant.py"), name, system, contest]
    environment = {**os.environ, **SURROUNDED, **(STEADY if contest != "policy" else {})}
    try:
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=environment, timeout=timeout_s, check=False)
        out, died = done.stdout, f"ended with {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:200]}" if done.returncode else None
    except subprocess.TimeoutExpired as late:
        out, died = (late.stdout or b"").decode() if isinstance(late.stdout, bytes) else late.stdout or "", f"took longer than {timeout_s:.0f} s"
    yield from (json.loads(line.removeprefix("told:")) for line in out.splitlines() if line.startswith("told:"))
    if died:
        yield {"died": died}


def trains(network: str, size: int) -> bool:
    """Whether windows of two micro-batches of a size run by hand, in a fresh process."""
    found = list(
        told(
            ENVIRONMENTS / "torch" / "bin" / "python", "textbook", "plain", "plain", 300, {"network": network, "size": size, "windows": 3, "room_mib": ROOM_MIB}
        )
    )
    return bool(found and found[-1].get("survives"))


def oracle(network: str, pool: ThreadPoolExecutor) -> dict[str, Any]:
    """The largest size that trains: bisected, then every size from ten below to ten above it."""
    low, high = 1, TARGET
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if trains(network, middle) else (low, middle)
    around = range(max(low - 10, 1), low + 11)
    verdicts = dict(zip(around, pool.map(lambda size: trains(network, size), around)))
    return {"largest": max(size for size, fits in verdicts.items() if fits), "verdicts": verdicts}


def text(document: dict[str, Any]) -> str:
    """JSON with a line for every run."""
    lines = json.dumps(document, indent=1)
    return re.sub(r"\n {3,}", " ", lines) + "\n"


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Raw results as JSON; a run that was cut short goes on from there.")
@click.option("--only", multiple=True, help="Adapters to run, by file name.")
@click.option("--again", is_flag=True, help="Begin anew.")
def main(output: Path, only: tuple[str, ...], again: bool) -> None:
    asked_of_all = {"target": TARGET, "windows": list(WINDOWS), "room_mib": ROOM_MIB, "networks": list(NETWORKS)}
    document = json.loads(output.read_text()) if output.exists() and not (again and not only) else {}
    if document.get("asked", asked_of_all) != asked_of_all:
        raise click.ClickException(f"{output} was measured with {document['asked']}, not {asked_of_all}: begin anew with --again")
    document |= {"schema": "autoaccum.side_by_side/1", "asked": asked_of_all}
    for part in ("systems", "cannot", "policy", "real", "oracle"):
        document.setdefault(part, {})
    now = {
        "machine": {
            "machine": platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "processor": devices.get("cpu").facts.name,
        },
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip(),
    }
    document = {**now, **document}  # of the first rows; those that are added later say where and when in "later"

    def measured(system: str) -> None:
        if any(document[name] != now[name] for name in now):
            document.setdefault("later", {})[system] = now

    def keep() -> None:
        beside = output.with_suffix(".new")  # a run that is killed leaves a whole file
        beside.write_text(text(document))
        beside.replace(output)

    with_torch()
    chosen = {name: each for name, each in adapters().items() if not only or name in only}
    for system in (system for each in chosen.values() for system in each.SYSTEMS if again):
        document["policy"].pop(system, None), document["real"].pop(system, None)
    with ThreadPoolExecutor(4) as pool:  # pip waits for the network most of the time
        made = dict(zip(chosen, pool.map(lambda each: installed(*each), chosen.items())))
    contestants = []
    for name, adapter in chosen.items():
        python, why = made[name]
        document["cannot"].pop(name, None)
        if why is not None:
            document["cannot"][name] = why
            continue
        document["systems"][name] = {"names": adapter.SYSTEMS, "versions": versions(python, adapter)}
        contestants += [(name, adapter, system, python) for system in adapter.SYSTEMS]
    keep()

    def policy(contestant: tuple[str, ModuleType, str, Path]) -> tuple[str, list[dict[str, Any]]]:
        name, _, system, python = contestant
        return system, list(told(python, name, system, "policy", 1200, {}))

    waiting = [
        each
        for each in contestants
        if (each[2] not in document["policy"] or any("died" in row for row in document["policy"][each[2]])) and not hasattr(each[1], "WHY_NOT_SIMULATED")
    ]
    document["cannot"] |= {f"{system}, simulated": adapter.WHY_NOT_SIMULATED for _, adapter, system, _ in contestants if hasattr(adapter, "WHY_NOT_SIMULATED")}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # its clock is simulated, so that two may run at once
        for system, rows in pool.map(policy, waiting):
            document["policy"][system] = rows
            measured(system)
            click.echo(f"policy  {system:36} {len(rows)} runs, {sum(bool(row.get('survives')) for row in rows)} survive")
            keep()
        for network in NETWORKS:
            if network not in document["oracle"]:
                document["oracle"][network] = oracle(network, pool)
                click.echo(f"oracle  {network}: {document['oracle'][network]['largest']}")
                keep()
    for run, windows in enumerate(WINDOWS):  # the systems in turn, so that a busy minute does not fall on one alone
        for network in NETWORKS:
            for name, _, system, python in contestants:
                rows = document["real"].setdefault(system, [])
                if sum(row["network"] == network for row in rows) > run:
                    continue
                asked = {"network": network, "target": TARGET, "windows": windows, "room_mib": ROOM_MIB}
                row = {"network": network, "windows": windows, "error": "said nothing"} | {
                    key: each for found in told(python, name, system, "real", 400, asked) for key, each in found.items()
                }
                rows.append(row)
                measured(system)
                click.echo(f"real    {system:36} {network:12} {row.get('micro_batch', '-'):>5} of {document['oracle'][network]['largest']}  "
                           f"{row.get('seconds') or 0:6.1f} s  {'survives' if row.get('survives') else 'does not survive'}  {row.get('died') or row.get('refused') or row.get('error') or ''}")  # fmt: skip
                keep()
    keep()


if __name__ == "__main__":
    main()
