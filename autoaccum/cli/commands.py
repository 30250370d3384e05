"""The commands of the command line.

Each parses its options, calls one function, and prints the answer on stdout. All other text goes to stderr.
"""

from __future__ import annotations

import io
import os
import sys
import traceback as traces
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from autoaccum import oom
from autoaccum.cli import report
from autoaccum.cli.options import CallOptions, writable, write_file, write_nothing, write_stderr
from autoaccum.errors import AutoaccumError, JobFailed, NothingFits, OutOfMemory, UsageError, in_short, without_middle
from autoaccum.plan import framework_arguments
from autoaccum.probe import Request, cache
from autoaccum.simulate import profiles
from autoaccum.tuner import stages
from autoaccum.version import __version__
from autoaccum.window import parse_source

_EPILOG = "Exit codes: 0 done, 2 wrong usage or bad input, 3 does not fit, 4 device trouble, 5 the job itself failed, 130 interrupted."


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(__version__, message="autoaccum %(version)s")
def cli() -> None:
    """You name the effective batch; autoaccum finds how much of it fits on the device at hand and accumulates the rest, exactly.

    Try: autoaccum tune --target-batch 120
    """


def _cards(context: click.Context, option: click.Parameter, begun: str) -> list[str]:
    """The values of --gpu that a shell offers: the last name of a list with commas, completed."""
    before, comma, last = begun.rpartition(",")
    return [before + comma + name for name in profiles.names() if name.startswith(last)]


def _shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that tune, check and train share."""
    options = [
        click.argument("job", required=False),
        click.option("-b", "--target-batch", type=int, help="The effective batch: samples that one optimizer step sees."),
        click.option("--target-tokens", type=int, metavar="N", help="The effective batch in tokens, instead of samples."),
        click.option("-d", "--device", default="auto", show_default=True, help="auto, cpu, cuda[:INDEX], mps, xpu, or simulated: virtual:NAME, virtual:SIZE."),
        click.option("--memory-limit", metavar="SIZE", help="Use no more than this (512MiB, 2GiB); enforced while probing, on the CPU too."),
        click.option("--headroom", metavar="SIZE|PERCENT", default="3%", show_default=True, help="Keep this much of the budget free."),
        click.option("--max-micro-batch", type=int, metavar="M", help="Try no larger micro-batch."),
        click.option("--equal", is_flag=True, help="Equal micro-batches only, as most frameworks need."),
        click.option("--largest", is_flag=True, help="Search the exact largest micro-batch, not only those that save a step."),
        click.option(
            "--objective",
            type=click.Choice(["fewest-steps", "throughput"]),
            default="fewest-steps",
            show_default=True,
            help="throughput: time smaller micro-batches, too, and take the fastest.",
        ),
        click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A keyword argument for the job's function; may be repeated."),
        click.option("--timeout", type=float, metavar="SECONDS", help="A trial that takes longer counts as not fitting."),
        click.option("--world", type=int, metavar="N", help="Of a command: the ranks that it runs on, if that cannot be seen. The target is over all of them."),
        click.option("--trial-seconds", type=float, metavar="N", help="For a command: a trial that is within the limit after N seconds fits, and is ended."),
        click.option(
            "--set-file",
            "set_files",
            multiple=True,
            metavar="FILE:KEY=VALUE",
            help="Of a command: a configuration file, of which each trial gets a copy with this value, such as config.yaml:train.batch={micro_batch}.",
        ),
        click.option(
            "--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Draw what was tried: .png, .svg, .pdf (needs matplotlib)."
        ),
        click.option("--no-cache", is_flag=True, help="Neither use nor keep readings of earlier runs (autoaccum cache list)."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document, failures included."),
        click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.json", help="Also write the plan as JSON."),
        click.option(
            "--format",
            "form",
            type=click.Choice(["text", "json", "env", *framework_arguments.FORMATS]),
            default="text",
            show_default=True,
            help="How to print the plan; for frameworks as JSON, of equal micro-batches.",
        ),
        click.option("-q", "--quiet", is_flag=True, help="No progress and none of the job's output on stderr."),
        click.option("--traceback", is_flag=True, help="Show whole tracebacks of the job's failures."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def devices(as_json: bool) -> None:
    """Every device here: total, free, held by us and by others, and which limit applies."""
    from autoaccum import devices as found

    listed = found.list()
    click.echo(report.as_json(report.devices_document(listed)) if as_json else report.devices(listed))


@cli.command("report")
@click.argument("plan", required=False, type=click.Path(dir_okay=False, path_type=Path), metavar="[PLAN.json]")
def report_of_fault(plan: Path | None) -> None:
    """What to give with a report of a fault: versions, devices, and a plan if there is one. As one JSON document."""
    import platform

    from autoaccum import devices as found
    from autoaccum.plan import Plan
    from autoaccum.tuner import versions

    told = None if plan is None else Plan.load(plan).as_dict()
    surroundings = {"python": platform.python_version(), "system": platform.platform(), **versions()}
    click.echo(report.as_json({**report.devices_document(found.list()), "schema": "autoaccum.report/1", "versions": surroundings, "plan": told}))


@cli.command(epilog=_EPILOG)
@_shared
@click.option("--evaluate", is_flag=True, help="Also search the largest batch for evaluation: the loss, forward only, with the optimizer's state resident.")
@click.option("--what-if", is_flag=True, help="Also tune the job with changes that make it need less memory, each measured here.")
@click.pass_obj
def tune(rest: list[str] | None, /, **given: Any) -> None:
    """Find the fewest accumulation steps that fit, and print the plan.

    JOB is file.py[:make_job] or package.module[:make_job], a function that returns an autoaccum.Job; left out,
    it is the built-in demo. What follows -- goes to the file as its arguments; without a JOB it is a command:

    autoaccum tune -b 120 -- python train.py --batch-size {micro_batch} --accum {accumulation_steps}

    {scratch} is a folder of each trial's own, for what the command writes.
    """
    call = CallOptions(rest, **given)
    try:
        planned = call.tuned()
    except NothingFits as error:
        if call.what_if:
            rows = call.changed(None)
            error.what_if = [row.as_dict() for row in rows]
            if call.form == "text":
                click.echo(report.changed(rows))
        elif call.command is None and call.virtual is None and "What would help" in str(error):
            error.args = (f"{error}; --what-if measures what each change gains",)
        raise
    call.answer(planned, changed=call.changed(planned) if call.what_if else None)


@cli.command(epilog=_EPILOG)
@_shared
@click.option("-m", "--micro-batch", type=int, help="The size to rehearse.")
@click.option("--windows", type=click.IntRange(min=2, max=1_000_000), default=2, show_default=True, help="Run so many windows, and report memory that grows.")
@click.option(
    "--equivalence", is_flag=True, help="Compare a split batch's gradient with the whole one's; needs neither -b nor -m, and exits with 0 whatever it finds."
)
@click.pass_obj
def check(rest: list[str] | None, /, micro_batch: int | None, windows: int, equivalence: bool, **given: Any) -> None:
    """Rehearse one given micro-batch; say by how much it fits or not. Or say whether splitting changes the gradient."""
    if equivalence and micro_batch is None:
        CallOptions(rest, **{**given, "target_batch": given["target_batch"] or 1}).compared()
        return
    if given["target_tokens"] is not None:
        raise UsageError("check rehearses a window of samples: give --target-batch instead of --target-tokens")
    if micro_batch is None:
        raise UsageError("Missing option '-m' / '--micro-batch': the size to rehearse")
    if given["objective"] == "throughput":
        raise UsageError("check rehearses one size, so there is nothing to choose from: leave --objective out")
    call = CallOptions(rest, **given)
    call.answer(call.checked(micro_batch, windows), call.equivalence() if equivalence else None)


@cli.command(epilog=_EPILOG)
@_shared
@click.option("-e", "--epochs", type=click.IntRange(min=1), default=1, show_default=True)
@click.pass_obj
def train(rest: list[str] | None, /, epochs: int, **given: Any) -> None:
    """Tune, then train with the accumulating loop. A demonstration and a smoke test, not a trainer."""
    call = CallOptions(rest, **given)
    if call.command:
        raise UsageError("train needs a JOB that builds the model: a command trains by itself")
    call.alone("train runs in one process", "in a script of your own, autoaccum.tune and Accumulator run on every rank (examples/ddp.py)")
    if call.form not in ("text", "json"):
        raise UsageError(f"train prints text or json: use tune for --format {call.form}")
    plan = call.tuned()
    call.trained(plan, epochs)


@cli.command(epilog=_EPILOG)
@click.argument("job", required=False)
@click.option("-b", "--target-batch", type=int, help="The effective batch: samples that one optimizer step sees.")
@click.option(
    "-g",
    "--gpu",
    "gpus",
    multiple=True,
    metavar="NAME|SIZE",
    shell_complete=_cards,
    callback=lambda context, option, names: tuple(name.strip() for each in names for name in each.split(",")),
    help="A card (t4, a100-80gb) or a size (24GiB), or several with commas; may be repeated. Up to eight also get their largest micro-batch.",
)
@click.option("--all-gpus", is_flag=True, help="Every card that is known: autoaccum profiles list.")
@click.option("--headroom", metavar="SIZE|PERCENT", default="3%", show_default=True, help="Keep this much of the budget free.")
@click.option("--max-micro-batch", type=int, metavar="M", help="Consider no larger micro-batch.")
@click.option("--equal", is_flag=True, help="Equal micro-batches only, as most frameworks need.")
@click.option("--what-if", is_flag=True, help="Also trace it with changes that make it need less memory.")
@click.option("--world", type=int, default=1, metavar="N", help="Of that many equal cards which train together, one; the target is that of all.")
@click.option("--shard", metavar="ddp|fsdp2|zero1|zero2|zero3", help="What copies or divides their state.  [default: ddp]")
@click.option("--length", type=int, metavar="TOKENS", help="Tokens of a sample, for hf:config.json.")
@click.option("--lora", metavar="r=16[,alpha=32,targets=q_proj+v_proj]", help="Train LoRA matrices alone, for hf:config.json.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A keyword argument for the job's function; may be repeated.")
@click.option(
    "--timeline", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help=".png, .svg, .pdf: a picture. .pickle: for PyTorch's memory viewer."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, failures included.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.json", help="Also write the document.")
@click.option("-q", "--quiet", is_flag=True, help="None of the job's output on stderr.")
@click.option("--traceback", is_flag=True, help="Show whole tracebacks of the job's failures.")
@click.pass_obj
def estimate(
    rest: list[str] | None,
    /,
    job: str | None,
    target_batch: int | None,
    gpus: tuple[str, ...],
    all_gpus: bool,
    headroom: str,
    max_micro_batch: int | None,
    equal: bool,
    what_if: bool,
    world: int,
    shard: str | None,
    length: int | None,
    lora: str | None,
    settings: tuple[str, ...],
    timeline: Path | None,
    as_json: bool,
    output: Path | None,
    quiet: bool,
    traceback: bool,
) -> int:
    """The same plan for GPUs that are not here: simulated, no hardware needed.

    JOB is as in tune, or hf:path/to/config.json: a configuration file of Transformers, without weights.
    """
    if target_batch is None:
        raise UsageError("Missing option '-b' / '--target-batch': the effective batch")
    if bool(gpus) == all_gpus:
        raise UsageError("name the cards with --gpu NAME, or take --all-gpus" + (", not both" if gpus else "; `autoaccum profiles list` shows them"))
    if timeline is not None and len(gpus) != 1:
        raise UsageError(f"--timeline draws one card's window: give one --gpu, not {'--all-gpus' if all_gpus else len(gpus)}")
    if timeline is not None and timeline.suffix not in (".png", ".svg", ".pdf", ".pickle"):
        raise UsageError(f"--timeline {str(timeline)!r} must be a file that ends in .png, .svg, .pdf or .pickle")
    for option, path in (("--output", output), ("--timeline", timeline)):
        if path is not None:
            writable(path, option)
    from autoaccum.cli import timeline_picture  # here, as below: --help does without
    from autoaccum.virtual import estimate_source

    if timeline is not None and timeline.suffix != ".pickle":
        timeline_picture.ready(timeline)
    names = profiles.names() if all_gpus else list(gpus)
    request = Request(target_batch, None, headroom, max_micro_batch, equal)
    if what_if and len(names) > 4:
        raise UsageError(f"--what-if traces nine changed jobs for each card: name up to four cards with --gpu, not {len(names)}")
    of_configuration = {name: value for name, value in (("length", length), ("lora", lora)) if value is not None}
    if of_configuration and not (job or "").startswith("hf:"):
        raise UsageError(f"--{' and --'.join(of_configuration)} belong to JOB hf:path/to/config.json: give your own job's with --set")
    source = parse_source(job, settings, rest or ())
    with stages(quiet=quiet) as on_stage:
        estimates = estimate_source(
            replace(source, settings={**source.settings, **of_configuration}),
            request,
            names,
            on_output=write_nothing if quiet else write_stderr,
            on_stage=on_stage,
            timeline=gpus[0] if timeline is not None else None,
            what_if=what_if,
            world=world,
            shard=shard,
        )
    click.echo(report.as_json(estimates.as_dict()) if as_json else estimates.explain())
    if output is not None:
        write_file(output, report.as_json(estimates.as_dict()) + "\n")
    if timeline is not None:
        timeline_picture.draw(estimates, timeline)
        if not quiet:
            click.echo(f"drawn: {timeline}", err=True)
    return 3 if gpus and not all(card.fits for card in estimates.gpus) else 0


@cli.command(epilog=_EPILOG)
@click.argument("job", required=False)
@click.option("-b", "--target-batch", type=int, help="The effective batch: samples that one optimizer step sees, over all ranks.")
@click.option("-g", "--gpus", metavar="LIST", help='The cards, ranks in that order: "2*a100-80gb,4*t4".')
@click.option("--fixed", metavar="SIZE", help="Without a JOB: weights, gradients, optimizer's state and DDP's buckets.")
@click.option("--per-sample", metavar="SIZE", help="Without a JOB: what each sample of a micro-batch adds.")
@click.option("--parameters", type=float, metavar="N", help="How many there are (124e6).")
@click.option("--flops-per-sample", type=float, metavar="N", help="Floating point operations of forward and backward (870e9).")
@click.option("--bytes-per-sample", type=float, metavar="N", help="Bytes that forward and backward move (9e9).")
@click.option("--times", multiple=True, metavar="FILE", help="Measured seconds: a plan of tune -o, or gpu,micro_batch,seconds in a table; may be repeated.")
@click.option("--link", metavar="SIZE", help="Bytes per second of the slowest link between ranks (6GB).")
@click.option("--dtype", help="Of the arithmetic: fp32, tf32, fp16, bf16; by default bf16 where all cards have it, else fp16.")
@click.option("--headroom", metavar="SIZE|PERCENT", default="3%", show_default=True, help="Keep this much of each card free.")
@click.option("--max-micro-batch", type=int, metavar="M", help="Consider no larger micro-batch.")
@click.option("--equal", is_flag=True, help="The same share and micro-batches on every rank.")
@click.option("--lockstep", is_flag=True, help="The same number of micro-steps on every rank, as sharded parameters need.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A keyword argument for the job's function; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, failures included.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.json", help="Also write a plan that ranks load: Plan.load.")
@click.option("-q", "--quiet", is_flag=True, help="None of the job's output on stderr.")
@click.option("--traceback", is_flag=True, help="Show whole tracebacks of the job's failures.")
@click.pass_obj
def fleet(
    rest: list[str] | None,
    /,
    job: str | None,
    target_batch: int | None,
    gpus: str | None,
    settings: tuple[str, ...],
    as_json: bool,
    output: Path | None,
    quiet: bool,
    traceback: bool,
    **given: Any,
) -> None:
    """One data-parallel job on unlike GPUs that are not here: every rank's share, micro-batches and steps.

    autoaccum fleet -b 480 --gpus "2*a100-80gb,4*t4" --fixed 2.31GiB --per-sample 1.25GiB
    """
    if target_batch is None:
        raise UsageError("Missing option '-b' / '--target-batch': the effective batch")
    if gpus is None:
        raise UsageError('name the cards: --gpus "2*a100-80gb,4*t4"; `autoaccum profiles list` shows them')
    if output is not None:
        writable(output)
    by_hand = given["fixed"] is not None or given["per_sample"] is not None
    if job is None and not by_hand:
        raise UsageError("fleet needs a JOB whose memory is simulated, or --fixed SIZE and --per-sample SIZE (say `demo` as JOB for the built-in demo)")
    origin = None if job is None else parse_source(job, settings, rest or ())
    from autoaccum.virtual import forecaster

    forecast = forecaster.fleet(gpus, target_batch=target_batch, job=origin, on_output=write_nothing if quiet else write_stderr, **given)
    click.echo(report.as_json(forecast.as_dict()) if as_json else forecast.explain())
    if output is not None:
        forecast.plan().save(output)


@cli.command(epilog=_EPILOG)
@click.option("-d", "--device", default="cuda:0", show_default=True, help="cuda or cuda:INDEX.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("autoaccum-selfcheck.json"),
    show_default=True,
    metavar="FILE.json",
    help="All figures. A run that was cut short goes on from it.",
)
@click.option("--minutes", type=float, metavar="N", help="Begin no measurement later than that.")
@click.option("--json", "as_json", is_flag=True, help="Print the document.")
@click.option("--tried-out", is_flag=True, hidden=True, help="Small jobs on any device, for tests.")
def selfcheck(device: str, output: Path, minutes: float | None, as_json: bool, tried_out: bool) -> int:
    """Compare the card that is here with what autoaccum says of it, in about five minutes.

    Exits with 0 if all is as it should be, with 3 if something is off, with 4 if there is no CUDA card.
    """
    if minutes is not None and not minutes > 0:
        raise UsageError(f"--minutes must be more than 0, not {minutes}")
    writable(output)
    from autoaccum.selfcheck import run_selfcheck

    found = run_selfcheck(device, output, tiny=tried_out, minutes=minutes, on_measured=lambda name, _: write_stderr(f"measured: {name}\n"))
    click.echo(report.as_json(found.as_dict()) if as_json else found.explain())
    return 0 if found.is_good else 3


@cli.group(name="profiles")
def profiles_() -> None:
    """GPU data files: what is known of cards that are not here."""


@profiles_.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def list_(as_json: bool) -> None:
    """Every card that is known."""
    cards = [profiles.load(name) for name in profiles.names()]
    click.echo(report.as_json({"schema": "autoaccum.profiles/1", "gpus": [profiles.document(card) for card in cards]}) if as_json else report.profiles(cards))


@profiles_.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def show(name: str, as_json: bool) -> None:
    """One card, each number with its source. NAME may be a file of your own, NAME.toml."""
    card = profiles.read(Path(name)) if name.endswith(".toml") else profiles.load(name)
    click.echo(report.as_json({"schema": "autoaccum.profile/1", **profiles.document(card)}) if as_json else report.profile(card))


@profiles_.command()
@click.option("-d", "--device", default="cuda", show_default=True, help="cuda or cuda:INDEX.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.toml", help="Write it there instead of to stdout.")
def record(device: str, output: Path | None) -> None:
    """Measure the card that is here and write its data file."""
    from autoaccum.devices import calibrate  # imports torch, and needs a card

    text = profiles.written(calibrate(device))
    if output is None:
        click.echo(text, nl=False)
    else:
        writable(output)
        write_file(output, text)


@cli.group(name="cache")
def cache_() -> None:
    """Readings of earlier runs, which make the next one of the same job on the same device shorter."""


@cache_.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def remembered(as_json: bool) -> None:
    """Every job that is remembered."""
    click.echo(report.as_json({"schema": "autoaccum.cache/1", "folder": str(cache.folder()), "jobs": cache.documents()}) if as_json else cache.listed())


@cache_.command()
def clear() -> None:
    """Forget all readings."""
    click.echo(f"{cache.clear()} forgotten")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and ends the process with its exit code."""
    _open_streams()
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # a warning of torch; autoaccum needs no NumPy
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    words = list(sys.argv[1:] if arguments is None else arguments)
    # click removes the `--`, so it is split off here: the words after it are not options of autoaccum.
    own, rest = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, None)
    wants_json = "--json" in own or any(a == "--format=json" or (a == "--format" and b == "json") for a, b in zip(own, [*own[1:], ""]))
    sys.exit(_run(own, rest, wants_json, "--traceback" in own))


def _here() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the current folder was deleted: go to one that is there (cd ~), and start again") from None


def _open_streams() -> None:
    """Makes stdin, stdout and stderr usable where they are closed or cannot show every letter."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which a pipe would get otherwise
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "r" if descriptor == 0 else "w", closefd=False))  # noqa: SIM115 # open as long as the process runs
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _run(own: list[str], rest: list[str] | None, wants_json: bool, full_traceback: bool) -> int:
    try:
        _here()
        code = cli.main(args=own, prog_name="autoaccum", obj=rest, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        return _failed(UsageError(_in_a_line(error.format_message())), wants_json, full_traceback)
    except AutoaccumError as error:
        return _failed(error, wants_json, full_traceback)
    except (KeyboardInterrupt, click.Abort):
        if wants_json:
            click.echo(report.as_json({**report.error(AutoaccumError("interrupted")), "error": "KeyboardInterrupt", "exit_code": 130}))
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:  # the reader of stdout has closed it; without this, Python reports the error again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:  # an error of the job, which trains in this process
        if oom.is_oom(error):
            return _failed(OutOfMemory(f"training ran out of memory: {error}"), wants_json, full_traceback)
        return _failed(JobFailed(str(error), kind=type(error).__name__, text=in_short(error), whole=traces.format_exc()), wants_json, full_traceback)


def _in_a_line(text: str) -> str:
    """A message of the parser, without the middle of what was typed if that is very long."""
    return text if len(text) <= 1000 else f"{text[:400]}...{text[-100:]}"


def _failed(error: AutoaccumError, wants_json: bool, full_traceback: bool) -> int:
    if wants_json:
        click.echo(report.as_json(report.error(error)))
    if isinstance(error, JobFailed) and error.text:
        click.echo(without_middle((error.whole if full_traceback else error.text).rstrip()), err=True)
    kind = f"{error.kind}: " if isinstance(error, JobFailed) and error.kind else ""
    click.echo(without_middle(f"autoaccum: {kind}{error}"), err=True)
    return error.exit_code
