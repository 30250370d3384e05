"""Makes the tables of measurements in README and docs, and two pictures, from the raw results; nothing of them is typed by hand.

    python benchmarks/report.py [--check]

Each table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. Under a table whose results are older than the last change of
the code that they measure (by git's history) stands a line that says so. Needs matplotlib.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SEARCHING = ("autoaccum/probe", "autoaccum/tuner", "autoaccum/plan/arithmetic.py", "autoaccum/window", "autoaccum/loop/rescue.py", "autoaccum/data/batches.py", "autoaccum/devices/cpu.py")  # fmt: skip


def policy(document: dict[str, Any]) -> str:
    """Simulated devices: what was found, what it took, and whether it holds."""
    lines = [
        "| | answer trains | size / largest that fits (worst) | trials | out of memory | samples | seconds | target exact | micro-steps / fewest |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for system, found in policies(document).items():
        lines.append(
            f"| {system} | {found['trains']} of {found['asked']} | {found['ratio']:.2f} ({found['worst']:.2f}) | {found['trials']:.0f} | {found['ooms']:.0f} "
            f"| {found['samples']:.0f} | {found['seconds']:.0f} | {found['exact']} of {found['targets']} | {found['over_fewest']:.2f} |"
        )
    lines += [f"| {name.removesuffix(', simulated')} | {why} | | | | | | | |" for name, why in document["cannot"].items() if name.endswith(", simulated")]
    return "\n".join(lines)


def policies(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every system's figures over the scenarios. A run that is missing, because the system died, counts as failed.

    A size counts if training went through with it, else it is 0. Where nothing fits, saying so is right, and handing over a size wrong.
    """
    import simulated

    found = {}
    for system in in_order(document["policy"]):
        rows = {(row["scenario"], row["target"]): row for row in document["policy"][system] if "scenario" in row}
        largest, trains, asked, exact, targets, over = [], 0, [], 0, 0, []
        for scenario in simulated.SCENARIOS:
            row = rows.get((scenario.name, scenario.asked), {})
            asked.append(row)
            alone = row.get("steps") == 1  # of such a window no gradients lie beside it
            truth = scenario.largest(scenario.asked, alone=alone)
            trains += bool(row) and (row["survives"] if truth else bool(row["error"]) and not row["handed_over"])
            if truth:
                largest.append(min(row["micro_batch"], truth) / truth if row.get("survives") else 0.0)
            for target in simulated.TARGETS:
                fewest = scenario.fewest(target)
                if not fewest or target > (scenario.samples or target):
                    continue
                targets += 1
                row = rows.get((scenario.name, target), {})
                exact += row.get("exact", False)
                if row.get("exact"):
                    over.append(row["steps"] / fewest)
        ran = [row for row in asked if row]
        found[system] = {
            "ratio": statistics.median(largest), "worst": min(largest), "trains": trains, "asked": len(asked), "exact": exact, "targets": targets,
            "over_fewest": statistics.mean(over) if over else math.nan,
            **{what: statistics.median(row[what] or 0 for row in ran) if ran else math.nan for what in ("trials", "ooms", "samples", "seconds")},
        }  # fmt: skip
    return found


def real(document: dict[str, Any]) -> str:
    """Real memory of a CPU: both networks in a row each."""
    networks = document["asked"]["networks"]
    heads = [f"{network}, {document['oracle'][network]['largest']} fit: window | seconds | {document['asked']['windows'][0]} windows" for network in networks]
    lines = [f"| | {' | '.join(heads)} | model unchanged | random numbers unchanged |", "| --- |" + " --- |" * (3 * len(networks) + 2)]
    for system, found in reals(document).items():
        cells = []
        for network in networks:
            each = found[network]
            cells += [each["refused"], "", ""] if "refused" in each else [each["window"], f"{each['seconds']:.1f}" if each["lives"] else "", each["survives"]]
        ran = [found[network] for network in networks if found[network].get("lives")]
        cells += [("yes" if all(each[what] for each in ran) else "no") if ran else "" for what in ("state", "random")]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    lines += [f"| {name} | {why} |" + " |" * (3 * len(networks) + 1) for name, why in document["cannot"].items() if not name.endswith(", simulated")]
    return "\n".join(lines)


def reals(document: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """By system and network: medians of the runs. It lives if every run went through, the first of which trains longest."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    target, runs = document["asked"]["target"], len(document["asked"]["windows"])
    for system in in_order(document["real"]):
        found[system] = {}
        for network in document["asked"]["networks"]:
            rows = [row for row in document["real"][system] if row["network"] == network]
            ran = [row for row in rows if row.get("sizes")]
            if not ran:
                why = next((str(row.get("refused") or row.get("died") or row.get("error")) for row in rows), "did not run")
                found[system][network] = {"refused": "refuses a CPU" if "on GPU" in why else "fails: " + why.split(":")[0]}
                continue
            middle = sorted(ran, key=lambda row: row["micro_batch"])[len(ran) // 2]
            through = sum(bool(row.get("survives")) for row in rows)
            found[system][network] = {
                "share": middle["micro_batch"] / document["oracle"][network]["largest"], "exact": all(row.get("exact") for row in rows),
                "seconds": statistics.median(row["seconds"] for row in ran), "steps": middle["steps"], "lives": through == runs,
                "window": f"{middle['sizes'][0]} x {middle['steps']}" if len(set(middle["sizes"])) == 1 else " + ".join(map(str, middle["sizes"])),
                "survives": "yes" if through == runs else "out of memory" if not through else f"{through} of {runs} runs",
                "state": all(row["state_unchanged"] for row in ran), "random": all(row["random_unchanged"] for row in ran),
            }  # fmt: skip
            if middle["effective"] != target:
                found[system][network]["window"] += f" = {middle['effective']}"
    return found


def in_order(systems: dict[str, Any]) -> list[str]:
    """Ours first, the others by name."""
    return sorted(systems, key=lambda name: (not name.startswith("autoaccum"), name.lower()))


def _loop(document: dict[str, Any]) -> str:
    import loop

    return loop.table(document)


def _loss_forms(document: dict[str, Any]) -> str:
    import loss_forms

    return loss_forms.table(document)


def _longest(document: dict[str, Any]) -> str:
    import longest_sample

    return longest_sample.table(document)


def _published(document: dict[str, Any]) -> str:
    import estimate_published

    return estimate_published.table(document)


def _on_a_card(table: str) -> Callable[[dict[str, Any]], str]:
    """One of `gpu/tables.py`, which reads what else it needs."""

    def make(_: dict[str, Any]) -> str:
        sys.path.append(str(ROOT / "benchmarks" / "gpu"))
        import tables

        made: str = getattr(tables, table)(json.loads((RESULTS / "gpu.json").read_text()))
        return made

    return make


def _elastic(document: dict[str, Any]) -> str:
    """What is left of runs in which a worker was killed."""
    killed = [row for row in document["rows"] if row["killed_in"] is not None]
    early = sum(row["killed_in"] == "before the first window" for row in killed)
    good = sum(row["good"] for row in killed)
    return (
        f"In {len(killed)} runs of it over three gloo ranks a random worker was killed at a random moment, {early} times before the first window and {len(killed) - early} times in one "
        f"(`benchmarks/elastic.py`): {good} ended after all {document['undisturbed']['windows']} windows, with parameters within "
        f"{max(row['difference'] for row in killed if row['difference'] is not None):.0e} of one process's, the longest in {max(row['seconds'] for row in killed):.0f} s "
        f"where an undisturbed run took {document['undisturbed']['seconds']:.0f} s."
    )


def _first_step(document: dict[str, Any]) -> str:
    """Seconds until the first optimizer step, with and without a plan that is learned."""
    lines = ["| | plain loop | plain loop, same allocator | learning | `tune` first |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row['case']}, {row['limit_mib']} MiB | {row['plain_s']:.2f} s | {row['plain_steady_s']:.2f} s | {row['learning_s']:.2f} s | {row['tune_s']:.1f} s |"
        for row in document["rows"]
    ]
    return "\n".join(lines)


def _learned_ranks(document: dict[str, Any]) -> str:
    """What became of many runs of ranks that learn."""
    ended = document["ended_with_an_error_on_every_rank"]
    rest = f"; in {ended} a rank ran out of memory after shares had settled, and all three ended with an error" if ended else ""
    return (
        f"Of {document['runs']} runs of three gloo ranks with speeds, limits and an out-of-memory drawn anew for each (`benchmarks/learned_ranks.py`), "
        f"{document['good']} ended with the parameters of whole windows in one process{rest}; none hung, and the slowest took {document['slowest_s']:.0f} s. Where memory "
        f"limited no rank, a window with the shares learned in ten windows takes {document['ratio_without_limits']:.2f} of the time of the best shares (median)."
    )


def _replanning(document: dict[str, Any]) -> str:
    """What becomes of a run in which a rank slows down."""
    shares = [" + ".join(map(str, document[name])) for name in ("shares_before", "shares_after")]
    return (
        f"A rank of three slowed to a third of its speed in mid-run (`benchmarks/replanning.py`): {document['windows_until_shares_changed']} windows later the shares "
        f"went from {shares[0]} to {shares[1]}, and a window takes {document['after_over_best']:.2f} of the time that it takes with the best plan for the slowed ranks; "
        f"with the old shares it took {document['window_seconds_with_the_old_shares'] / document['window_seconds_of_the_best_plan']:.2f} of it."
    )


def _sharded(document: dict[str, Any]) -> str:
    """Sharded models over unlike cards, by rule."""
    lines = [
        "| model | even batches | ours, gathered in each micro-step | ours, kept gathered | ours with the best of the cards | uneven shards |",
        "| --- " * 6 + "|",
    ]

    def told(seconds: float | None) -> str:
        return "does not fit" if seconds is None else f"{seconds:.1f} s"

    for row in document["rows"]:
        best = "does not fit" if "best" not in row else f"{row['best_s']:.1f} s ({row['best']})"
        lines.append(f"| {row['model']} | {told(row['even'])} | {told(row['lockstep'])} | {told(row['gathered'])} | {best} | {told(row['cephalo'])} |")
    return "\n".join(lines)


def _all_cards(document: dict[str, Any]) -> str:
    """What it costs to ask for all known cards."""
    lines = ["| | cards | seconds | processor seconds | largest process |", "| --- " * 5 + "|"]
    for row in document["rows"]:
        mib = row["largest_process_bytes"] / 2**20
        lines.append(f"| {row['model']} | {row['cards']} | {row['seconds']:.0f} | {row['processor_seconds']:.0f} | {mib:.0f} MiB |")
    return "\n".join(lines)


def _sources(brackets: dict[str, Any]) -> str:
    """Every source of peaks or verdicts that others published, with what was made from it and what judges it."""
    peaks, t4 = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("estimate_published", "published_t4"))
    xmem, language = peaks["xmem"], peaks["xmem"]["language_models"]["before_backward"]
    rows = (
        (
            "xMem, convolutional nets",
            "RTX 3060, 4060",
            "one, of when some nets stop summing by sample",
            xmem["convolutions"],
            xmem["xmem_itself"],
            "xMem, all its rows",
        ),
        ("xMem, language models", "RTX 3060, 4060", "none", language, xmem["dnnmem"], "DNNMem, all of xMem's rows"),
        ("GPUMemNet, timm models", "40 GB", "what benchmark mode takes, from other rows", peaks["timm"]["leave_one_model_out"], None, ""),
        (
            "fitcheck, LoRA in fp16",
            "T4",
            "two, of softmax and of cuBLASLt",
            t4["plain weights"]["reserved"],
            t4["plain weights"]["fitcheck itself, its total"],
            "fitcheck",
        ),
        ("fitcheck, QLoRA", "T4", "none", t4["nf4"]["reserved"], t4["nf4"]["fitcheck itself, its total"], "fitcheck"),
    )
    lines = ["| source | card | rules made with it | rows | median | nine of ten | worst | another system there |", "| --- " * 8 + "|"]
    for source, card, made, ours, theirs, name in rows:
        other = "" if theirs is None else f"{name}: {theirs['median_percent']:.1f}%, {theirs['p90_percent']:.1f}%"
        lines.append(
            f"| {source} | {card} | {made} | {ours['rows']} | {ours['median_percent']:.1f}% | {ours['p90_percent']:.1f}% | {ours['worst_percent']:.0f}% | {other} |"
        )
    count, held = brackets["rows"], brackets["both"]
    return "\n".join(lines) + (
        f"\n\ntimm's published training benchmark on an RTX 3090 says of each model at which batch it trained and that the next one ran out: of {count} models, "
        f"{brackets['fits_where_it_trained']} were told to fit at the first, {brackets['does_not_fit_where_it_ran_out']} not to fit at the second, {held} both "
        f"({held / count:.0%}; `benchmarks/timm_brackets.py`)."
    )


def _families(document: dict[str, Any]) -> str:
    """Which model families trace, by library and task."""
    lines = ["| library, task | families that train on the CPU | of them traced |", "| --- " * 3 + "|"]
    for kind, counts in document["by_kind"].items():
        lines.append(f"| {kind.replace('_', ' ')} | {counts['train_on_cpu']} | {counts['trace']} |")
    return "\n".join(lines)


def _planners(document: dict[str, Any]) -> str:
    """Published runs over unlike nodes: seconds of every plan, forecast and measured, and our shares."""

    def named(nodes: list[str]) -> str:
        return ", ".join(f"{nodes.count(node)} of {' '.join(reversed(node.replace('-', ' ').rsplit('x', 1)))}" for node in dict.fromkeys(nodes))

    lines = ["| nodes | samples | plan | measured | forecast | error |", "| --- " * 6 + "|"]
    for plan in document["plans"]:
        lines.append(
            f"| {named(plan['nodes'])} | {plan['target']} | {plan['plan']} | {plan['measured_s']:.1f} s | {plan['forecast_s']:.1f} s | {plan['error_percent']:+.1f}% |"
        )
    lines += ["", "| nodes | even split | best plan known | our shares, forecast | gap closed |", "| --- " * 5 + "|"]
    for fleet in document["fleets"]:
        even = f"{fleet['measured_even_s']:.1f} s" if fleet["measured_even_s"] else f"not run (forecast {fleet['forecast_even_s']:.1f} s)"
        closed = "" if fleet["gap_to_best_plan_closed_percent"] is None else f"{fleet['gap_to_best_plan_closed_percent']}%"
        ours = fleet["corrected_ours_s"] or fleet["forecast_ours_s"]
        lines.append(
            f"| {named(fleet['nodes'])} | {even} | {fleet['best_plan_s']:.1f} s, {fleet['best_plan']} | {ours:.1f} s ({' + '.join(map(str, fleet['shares']))}) | {closed} |"
        )
    return "\n".join(lines)


def _fine_tuning(document: dict[str, Any]) -> str:
    """Runs on a T4: our errors and those of who measured them."""
    lines = ["| | rows | median error | 90th percentile | worst |", "| --- | --- | --- | --- | --- |"]
    for weights, what in (("plain weights", "LoRA, weights in fp16"), ("nf4", "QLoRA, weights in 4 bits")):
        for name, label in (
            ("reserved", "reserved peak"),
            ("allocated", "allocated peak"),
            ("fitcheck itself, its total", "fitcheck's own total, beside reserved"),
        ):
            each = document[weights][name]
            lines.append(f"| {what}: {label} | {each['rows']} | {each['median_percent']:.1f}% | {each['p90_percent']:.1f}% | {each['worst_percent']:.1f}% |")
    return "\n".join(lines)


# name -> its raw results, what makes the table of them, and the code that they measure
# The six of whom both are known: how targets were hit (`policy`), and the gradient's error (`loop`).
_BOTH = (
    ("autoaccum", "autoaccum", "autoaccum"),
    ("by hand, the largest batch by doubling and bisection", "textbook", "by hand"),
    ("Accelerate", "Accelerate", "accelerate"),
    ("Composer", "Composer", "composer"),
    ("HF Trainer", "HF Trainer", "transformers"),
    ("Lightning", "Lightning, power", "lightning"),
)


def summary(document: dict[str, Any]) -> str:
    """Six systems: how often the target was hit, whether the answer trains, and the worst error of the gradient."""
    errors = json.loads((RESULTS / "loop.json").read_text())["gradient_errors"]
    found = policies(document)
    lines = ["| | target hit exactly | answer trains | worst gradient error |", "| --- | --- | --- | --- |"]
    for shown, searched, looped in _BOTH:
        each, worst = found[searched], max(errors[looped].values())
        lines.append(
            f"| {shown} | {each['exact']} of {each['targets']} | {each['trains']} of {each['asked']} | {f'{worst:.2f}' if worst > 1e-3 else f'{worst:.0e}'} |"
        )
    return "\n".join(lines)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str], tuple[str, ...]]] = {
    "summary": ("side_by_side.json", summary, (*SEARCHING, "benchmarks/simulated.py", "benchmarks/contestant.py", "benchmarks/work.py", "benchmarks/peers")),
    "policy": ("side_by_side.json", policy, (*SEARCHING, "benchmarks/simulated.py", "benchmarks/contestant.py", "benchmarks/work.py", "benchmarks/peers")),
    "real": ("side_by_side.json", real, (*SEARCHING, "benchmarks/networks.py", "benchmarks/contestant.py", "benchmarks/work.py", "benchmarks/peers")),
    "loop": ("loop.json", _loop, ("autoaccum/loop/accumulator.py", "autoaccum/window", "autoaccum/data/prefetch.py")),
    "loss forms": ("loss_forms.json", _loss_forms, ("autoaccum/loop/accumulator.py", "autoaccum/window", "autoaccum/integrations", "benchmarks/loss_forms.py")),
    "longest sample": ("longest_sample.json", _longest, ("autoaccum/data/lengths.py", "autoaccum/integrations/huggingface.py", *SEARCHING)),
    "peaks on a card": ("gpu_virtual_now.json", _on_a_card("peaks"), ("autoaccum/simulate", "autoaccum/virtual/phantom.py")),
    "boundaries on a card": ("gpu.json", _on_a_card("boundaries"), ("benchmarks/gpu/workloads.py",)),
    "plans on a card": ("gpu.json", _on_a_card("plans"), (*SEARCHING, "autoaccum/devices/cuda.py")),
    "peers on a card": ("gpu.json", _on_a_card("peers"), (*SEARCHING, "autoaccum/devices/cuda.py", "benchmarks/work.py", "benchmarks/peers")),
    "elastic": ("elastic.json", _elastic, ("autoaccum/loop/progress.py", "autoaccum/data/windows.py")),
    "first step": ("first_step.json", _first_step, ("autoaccum/loop/learner.py", "autoaccum/loop/accumulator.py", "benchmarks/first_step.py")),
    "learned ranks": ("learned_ranks.json", _learned_ranks, ("autoaccum/loop/learner.py", "autoaccum/distributed/pace.py")),
    "replanning": ("replanning.json", _replanning, ("autoaccum/distributed/pace.py", "autoaccum/distributed/fleet.py", "autoaccum/loop/accumulator.py")),
    "sharded": ("sharded_fleets.json", _sharded, ("autoaccum/distributed/shares.py", "benchmarks/sharded_fleets.py")),
    "planners": (
        "fleet_planners.json",
        _planners,
        ("autoaccum/distributed/fleet.py", "autoaccum/distributed/shares.py", "autoaccum/distributed/speed_curves.py"),
    ),
    "sources": ("timm_brackets.json", _sources, ("autoaccum/simulate", "autoaccum/virtual/phantom.py")),
    "families": ("families.json", _families, ("autoaccum/trace",)),
    "all cards": ("all_cards.json", _all_cards, ("autoaccum/trace", "autoaccum/simulate", "autoaccum/virtual")),
    "published fine-tuning": ("published_t4.json", _fine_tuning, ("autoaccum/simulate", "autoaccum/virtual/phantom.py", "autoaccum/trace")),
    "published peaks": ("estimate_published.json", _published, ("autoaccum/simulate", "autoaccum/virtual/phantom.py")),
}


def last_change(*paths: str) -> int:
    """When git saw any of these last, in seconds; now, if one has changed since, and 0 where there is no history."""
    asked = ["git", "-C", str(ROOT)]
    if subprocess.run([*asked, "status", "--porcelain", "--", *paths], capture_output=True, text=True, check=False).stdout.strip():
        return 2**62
    told = subprocess.run([*asked, "log", "-1", "--format=%ct", "--", *paths], capture_output=True, text=True, check=False).stdout.strip()
    return int(told or 0)


def measured_at(file: str) -> int:
    """When results were measured, in seconds: the time of the commit that they name, else of the file's last change. Rows that were added
    later do not make the others newer."""
    commit = json.loads((RESULTS / file).read_text()).get("commit")
    if isinstance(commit, str):
        told = subprocess.run(["git", "-C", str(ROOT), "show", "-s", "--format=%ct", commit], capture_output=True, text=True, check=False).stdout.strip()
        if told.isdigit():
            return int(told)
    return last_change(f"benchmarks/results/{file}")


def tables(*, marked: bool = True) -> dict[str, str]:
    """Every table as it should stand in README and docs; marked: with the line under those that are older than their code."""
    found = {}
    for name, (file, make, code) in TABLES.items():
        text = make(json.loads((RESULTS / file).read_text()))
        if marked and last_change(*code) > measured_at(file):
            day = time.strftime("%Y-%m-%d", time.gmtime(measured_at(file)))
            text += f"\n\n*Measured on {day}; the code that it measures has changed since.*"
        found[name] = text
    return found


def pages() -> list[Path]:
    """The README and the pages of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def page_of(name: str) -> Path:
    """The page with the place of a table. Raises `ClickException` where there is none."""
    found = next((page for page in pages() if f"<!-- table: {name} -->" in page.read_text()), None)
    if found is None:
        raise click.ClickException(f"no page has a place for the table {name!r}: <!-- table: {name} -->")
    return found


def put(text: str, name: str, table: str) -> str:
    """A page with a table in its place. Raises `ClickException` where there is none."""
    place = re.compile(rf"(<!-- table: {re.escape(name)} -->\n)(?:(?!<!-- table).)*?(<!-- end of table -->)", re.S)
    if not place.search(text):
        raise click.ClickException(f"no page has a place for the table {name!r}: <!-- table: {name} -->")
    return place.sub(lambda found: found[1] + table + "\n" + found[2], text)


def pictures(document: dict[str, Any]) -> None:
    """What was found against what it took: simulated devices, and real memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import simulated

    grey = "#777777"
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), grey)
    with plt.rc_context(ink):
        figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
        _named(axes, {system: (each["samples"], each["exact"] / each["targets"], True) for system, each in policies(document).items()})
        axes.set_xlabel("samples run before the first optimizer step of training, median")
        axes.set_ylabel("targets hit exactly, and trained")
        axes.set_ylim(-0.05, 1.2)
        axes.set_title(f"Simulated devices: {len(simulated.SCENARIOS)} scenarios, targets of {', '.join(map(str, simulated.TARGETS))}", fontsize=10, loc="left")
        _save(figure, "side_by_side_policy.png")
        found = reals(document)
        networks = document["asked"]["networks"]
        figure, panels = plt.subplots(1, len(networks), figsize=(10, 4.2), layout="constrained", sharey=True)
        for panel, network in zip(panels, networks):
            _named(
                panel,
                {
                    system: (each[network]["seconds"], each[network]["share"], each[network]["exact"])
                    for system, each in found.items()
                    if each[network].get("lives")
                },
            )
            panel.axhline(1, color=grey, linewidth=0.8, linestyle=":")
            panel.set_title(f"{network}, what survives; filled = the target exactly", fontsize=10, loc="left")
            panel.set_xlabel("seconds until training begins, median")
            panel.margins(x=0.3, y=0.12)
        panels[0].set_ylabel("micro-batch / largest that fits")
        _save(figure, "side_by_side_real.png")


def _named(axes: Any, points: dict[str, tuple[float, float, bool]]) -> None:
    """A dot for every system, filled or not; those that lie on each other share a label."""
    wide = max(x for x, _, _ in points.values())
    labels: list[tuple[float, float, list[str]]] = []
    for system, (x, y, filled) in points.items():
        colour = "#D55E00" if system.startswith("autoaccum") else "#0072B2"
        axes.scatter(x, y, s=45, facecolors=colour if filled else "none", edgecolors=colour, zorder=3)
        near = next((each for each in labels if abs(each[0] - x) < 0.12 * wide and abs(each[1] - y) < 0.04), None)
        if near is None:
            labels.append((x, y, [system.replace(", largest=True, headroom=0", ", largest")]))
        else:
            near[2].append(system)
    for x, y, names in labels:
        for line, name in enumerate(reversed(names)):
            colour = "#D55E00" if name.startswith("autoaccum") else "#0072B2"
            axes.annotate(name, (x, y), xytext=(7, 4 + 10 * line), textcoords="offset points", fontsize=8, color=colour, va="bottom")


def _save(figure: Any, name: str) -> None:
    for each in figure.axes:
        for side in ("top", "right"):
            each.spines[side].set_visible(False)
    figure.savefig(RESULTS / name, dpi=130, transparent=True)


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; fail where README and docs do not say what the results say.")
def main(check: bool) -> None:
    for name, made in tables(marked=not check).items():
        page = page_of(name)
        text = page.read_text()
        if check and made not in text:
            raise click.ClickException(f"{page.name}'s table {name!r} is not that of the results: run python benchmarks/report.py")
        if name in ("policy", "real", "loop") and not check:
            click.echo(f"{made}\n")
        if not check:
            page.write_text(put(text, name, made))
    if not check:
        pictures(json.loads((RESULTS / "side_by_side.json").read_text()))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "benchmarks"))
    main()
