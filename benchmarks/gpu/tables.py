"""The README's tables of what a card measured, from `gpu.json` and the predictions in `benchmarks/results`."""

from __future__ import annotations

import json
import statistics
from typing import Any

import virtual
import workloads

RESULTS = virtual.ROOT / "benchmarks" / "results"
FIGURES = ("requested", "allocated", "reserved")
ELASTIC = "+benchmark"


def predicted(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"gpu_virtual_{name}.json").read_text())
    return found


def peaks(document: dict[str, Any]) -> str:
    """Measured peaks beside predictions, in groups."""
    measured = {name[2:]: row for name, row in document["rows"].items() if name.startswith("D ") and "reserved" in row}
    first, before, now = predicted("first"), predicted("predictions"), predicted("now")

    def of(document: dict[str, Any], networks: dict[str, Any], *, elastic: bool = False) -> dict[str, dict[str, int]]:
        return {key: each for key, each in document["peaks"].items() if key.split()[0] in networks and key in measured and (ELASTIC in key) == elastic}

    groups = {
        "{} networks, predicted before any card was seen": of(first, workloads.LEARNT),
        "{} others, predicted with what those had shown": of(before, workloads.JUDGED),
        "of these all but T5": {key: each for key, each in of(before, workloads.JUDGED).items() if not key.startswith("t5")},
        "all {}, with rules chosen on these very rows": of(now, workloads.BATCHES),
        "cuDNN's benchmark mode, likewise chosen on them": of(now, workloads.BATCHES, elastic=True),
    }
    lines = ["| | jobs | requested: median error | 90th percentile | reserved: median | 90th percentile | worst | too low |", "| --- |" + " --- |" * 7]
    for name, rows in groups.items():
        errors = {what: [each[what] / measured[key][what] - 1 for key, each in rows.items()] for what in FIGURES}
        requested, reserved = ([abs(error) for error in errors[what]] for what in ("requested", "reserved"))
        low = sum(error < 0 for error in errors["reserved"]) / len(reserved)
        cells = [f"{100 * each:.2f}%" for each in (statistics.median(requested), _tenth(requested))]
        cells += [f"{100 * each:.1f}%" for each in (statistics.median(reserved), _tenth(reserved), max(reserved))]
        lines.append(f"| {name.format(len({key.split()[0] for key in rows}))} | {len(rows)} | {' | '.join(cells)} | {low:.0%} |")
    machine = document["machine"]
    networks = sorted({key.split()[0] for key in measured})
    lines += [
        "",
        f"{machine['card']}, driver {machine['driver']}, torch {machine['torch']}; {', '.join(networks)}; SGD, AdamW and fused AdamW in fp32 and bf16, with fp16 and a "
        "scaler, clipping, checkpointing, channels last, chosen kernels of attention. Peaks of the allocator; requested: without rounding and fragments.",
    ]
    return "\n".join(lines)


def _tenth(values: list[float]) -> float:
    return sorted(values)[int(0.9 * (len(values) - 1))]


def boundaries(document: dict[str, Any]) -> str:
    """The largest micro-batch under a cap beside the predicted one."""
    before = predicted("predictions")["boundaries"]
    rows: dict[str, list[tuple[str, int, int, int]]] = {}
    for key, each in before.items():
        measured = document["rows"].get(f"E {key}", {})
        if "largest" in measured:
            name, _, cap = key.split()
            rows.setdefault(name, []).append((cap, measured["largest"], each["hard_largest"], each["largest"]))
    lines = ["| | under, GiB | largest that trains | predicted | predicted without retries |", "| --- | --- | --- | --- | --- |"]
    for name, found in rows.items():
        columns = [", ".join(f"{each[at]:,}" for each in found) for at in (1, 2, 3)]
        judged = " (not seen before)" if name in workloads.JUDGED else ""
        caps = ", ".join(each[0].removesuffix("GiB") for each in found)
        lines.append(f"| {name}{judged} | {caps} | {' | '.join(columns)} |")
    every = [each for found in rows.values() for each in found]
    ran = [
        next((probe for probe in document["rows"][f"E {key}"]["probes"] if probe[0] == each["largest"]), None)
        for key, each in before.items()
        if each["largest"] and "largest" in document["rows"].get(f"E {key}", {})
    ]
    never = [key for key in before if "largest" not in document["rows"].get(f"E {key}", {})]
    alone, flushed, out = (
        sum(probe is not None and (probe[1], bool(probe[2])) == verdict for probe in ran) for verdict in ((True, False), (True, True), (False, False))
    )
    off = [abs(hard - real) / max(real, 1) for _, real, hard, _ in every]
    exact = sum(real == hard for _, real, hard, _ in every)
    lines += [
        "",
        f"{len(every)} boundaries of {len(before)} that were predicted, each seen twice in fresh processes: {exact} predicted to the sample, "
        f"{sum(each <= 0.02 for each in off)} within 2%, the worst {max(off):.0%} off. The size that is recommended is predicted to leave the allocator's cache alone: "
        f"{alone + flushed + out} of them ran, {alone} did leave it alone, {flushed} flushed it, {out} ran out of memory; in {sum(soft <= real for _, real, _, soft in every)} "
        f"of {len(every)} it is no larger than what trained. Predicted and never run: {', '.join(f'{key.split()[0]} under {key.split()[-1]} GiB' for key in never)}.",
    ]
    return "\n".join(lines)


def plans(document: dict[str, Any]) -> str:
    """`tune` under a cap, beside the oracle."""
    lines = [
        "| 512 samples, 8 GiB | window | peak / budget | oracle: fewest steps | seconds | trials | windows trained | samples a second |",
        "| --- |" + " --- |" * 7,
    ]
    for name, row in document["rows"].items():
        if not name.startswith("tune ") or "plan" not in row:
            continue
        plan = row["plan"]
        trained = f"{row['windows']}" + (", rescued" if row.get("rescued") else "")
        lines.append(
            f"| {name.removeprefix('tune ').replace(' checkpointed', ', ' + _CHECKPOINTED[name.split()[1]])} | {plan['micro_batch']} x {plan['accumulation_steps']} | {row['peak_bytes'] / plan['budget_bytes']:.2f} | {row['oracle_steps'] or ''} "
            f"| {row['tuning_seconds']:.1f} | {len(plan['trials'])} | {trained} | {row['samples_per_second']:,.0f} |"
        )
    return "\n".join([*lines, "", _where(document)])


# What `everything.make` checkpoints in its two jobs.
_CHECKPOINTED = {"gpt": "each block checkpointed", "conv": "checkpointed as a whole"}


def peers(document: dict[str, Any]) -> str:
    """The systems under the same cap. Samples a second are told only where every system was fed in the same way.

    Raises `SystemExit` if the rows say that they were not.
    """
    told = {name: row.get("fed") for name, row in document["rows"].items() if name.startswith("peers ") and row.get("sizes") and "from the host" not in name}
    fed = set(told.values())
    if len(fed) > 1:
        raise SystemExit(f"no table of peers is made: they were fed differently ({', '.join(f'{name}: {how}' for name, how in told.items())})")
    is_fed_alike = fed not in ({None}, set())
    largest = {name.removeprefix("oracle "): row["largest"] for name, row in document["rows"].items() if name.startswith("oracle ")}
    columns = ["window", "seconds", "10 windows", *(["samples a second"] if is_fed_alike else [])]
    heads = [f"{network}, {most} fit by bisection: {' | '.join(columns)}" for network, most in largest.items()]
    lines = [
        f"| 512 samples, 8 GiB | {' | '.join(heads)} | model unchanged | random numbers unchanged |",
        "| --- |" + " --- |" * (len(columns) * len(largest) + 2),
    ]
    systems = dict.fromkeys(name.removeprefix("peers ").rsplit(", ", 1)[0] for name in document["rows"] if name.startswith("peers "))
    for system in sorted(systems, key=lambda each: (not each.startswith("autoaccum"), each.lower())):
        cells, ran = [], []
        for network in largest:
            row = document["rows"].get(f"peers {system}, {network}", {})
            if not row.get("sizes"):
                cells += [row.get("missing") or "not measured", *[""] * (len(columns) - 1)]
                continue
            window = f"{row['sizes'][0]} x {row['steps']}" + ("" if row["effective"] == document["target"] else f" = {row['effective']}")
            rate = f"{row['samples_per_second']:,.0f}" if row["samples_per_second"] else ""
            cells += [window, f"{row['seconds']:.1f}", "yes" if row["survives"] else "out of memory", *([rate] if is_fed_alike else [])]
            ran.append(row)
        cells += ["yes" if all(row[what] for row in ran) else "no" for what in ("state_unchanged", "random_unchanged")]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _where(document)])


def _where(document: dict[str, Any]) -> str:
    machine = document["machine"]
    packages = ", ".join(f"{each} {machine[each]}" for each in ("accelerate", "lightning", "transformers") if machine.get(each))
    return f"{machine['card']}, driver {machine['driver']}, torch {machine['torch']}, {packages}."


def main() -> None:
    document = json.loads((RESULTS / "gpu.json").read_text())
    for make in (peaks, boundaries, plans, peers):
        print(f"{make(document)}\n")


if __name__ == "__main__":
    main()
