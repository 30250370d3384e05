"""The command line. Each command parses, calls one function, and prints: stdout is the answer, stderr is talk."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import traceback as traces
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click

from autoaccum import cache, drawing, estimating, explaining, forecasting, formats, oom, profiles, progress, report, tuning
from autoaccum.errors import AutoaccumError, JobFailed, OutOfMemory, UsageError, in_short
from autoaccum.job import Source, source
from autoaccum.launched import launched
from autoaccum.line import Wish
from autoaccum.plan import Plan
from autoaccum.reading import Equivalence
from autoaccum.version import __version__

_EPILOG = "Exit codes: 0 done, 2 wrong usage or bad input, 3 does not fit, 4 device trouble, 5 the job itself failed, 130 interrupted."


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.version_option(__version__, message="autoaccum %(version)s")
def cli() -> None:
    """You name the effective batch; autoaccum finds how much of it fits on the device at hand and accumulates the rest, exactly.

    Try: autoaccum tune --target-batch 120
    """


def _shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that tune, check and train have in common."""
    options = [
        click.argument("job", required=False),
        click.option("-b", "--target-batch", type=int, help="The effective batch: samples that one optimizer step sees."),
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
        click.option(
            "--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Draw what was tried: .png, .svg, .pdf (needs matplotlib)."
        ),
        click.option("--no-cache", is_flag=True, help="Neither use nor keep readings of earlier runs (autoaccum cache list)."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document, failures included."),
        click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.json", help="Also write the plan as JSON."),
        click.option(
            "--format",
            "form",
            type=click.Choice(["text", "json", "env", *formats.FORMATS]),
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
    """Every device here: total, free, held by us and by others, and the limit that binds."""
    from autoaccum import devices as found

    listed = found.list()
    click.echo(report.as_json(report.devices_document(listed)) if as_json else report.devices(listed))


@cli.command(epilog=_EPILOG)
@_shared
@click.pass_obj
def tune(rest: list[str] | None, /, **given: Any) -> None:
    """Find the fewest accumulation steps that fit, and print the plan.

    JOB is file.py[:make_job] or package.module[:make_job], a function that returns an autoaccum.Job; left out,
    it is the built-in demo. What follows -- is the file's own arguments, or, without a JOB, a command:

    autoaccum tune -b 120 -- python train.py --batch-size {micro_batch} --accum {accumulation_steps}
    """
    asked = _Asked(rest, **given)
    asked.answer(asked.tuned())


@cli.command(epilog=_EPILOG)
@_shared
@click.option("-m", "--micro-batch", type=int, help="The size to rehearse.")
@click.option(
    "--equivalence", is_flag=True, help="Compare a split batch's gradient with the whole one's; needs neither -b nor -m, and exits with 0 whatever it finds."
)
@click.pass_obj
def check(rest: list[str] | None, /, micro_batch: int | None, equivalence: bool, **given: Any) -> None:
    """Rehearse one given micro-batch; say by how much it fits or not. Or say whether splitting changes the gradient."""
    if equivalence and micro_batch is None:
        _Asked(rest, **{**given, "target_batch": given["target_batch"] or 1}).compared()
        return
    if micro_batch is None:
        raise UsageError("Missing option '-m' / '--micro-batch': the size to rehearse")
    if given["objective"] == "throughput":
        raise UsageError("check rehearses one size, so there is nothing to choose from: leave --objective out")
    asked = _Asked(rest, **given)
    asked.answer(asked.checked(micro_batch), asked.equivalence() if equivalence else None)


@cli.command(epilog=_EPILOG)
@_shared
@click.option("-e", "--epochs", type=click.IntRange(min=1), default=1, show_default=True)
@click.pass_obj
def train(rest: list[str] | None, /, epochs: int, **given: Any) -> None:
    """Tune, then train with the accumulating loop. A demonstration and a smoke test, not a trainer."""
    asked = _Asked(rest, **given)
    if asked.command:
        raise UsageError("train needs a JOB that builds the model: a command trains by itself")
    asked.alone("train runs in one process", "in a script of your own, autoaccum.tune and Accumulator run on every rank (examples/ddp.py)")
    if asked.form not in ("text", "json"):
        raise UsageError(f"train prints text or json: use tune for --format {asked.form}")
    planned = asked.tuned()
    asked.trained(planned, epochs)


@cli.command(epilog=_EPILOG)
@click.argument("job", required=False)
@click.option("-b", "--target-batch", type=int, help="The effective batch: samples that one optimizer step sees.")
@click.option(
    "-g",
    "--gpu",
    "gpus",
    multiple=True,
    metavar="NAME|SIZE",
    help="A card (t4, a100-80gb) or a size (24GiB); may be repeated. Up to eight also get their largest micro-batch.",
)
@click.option("--all-gpus", is_flag=True, help="Every card that is known: autoaccum profiles list.")
@click.option("--headroom", metavar="SIZE|PERCENT", default="3%", show_default=True, help="Keep this much of the budget free.")
@click.option("--max-micro-batch", type=int, metavar="M", help="Consider no larger micro-batch.")
@click.option("--equal", is_flag=True, help="Equal micro-batches only, as most frameworks need.")
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
    settings: tuple[str, ...],
    timeline: Path | None,
    as_json: bool,
    output: Path | None,
    quiet: bool,
    traceback: bool,
) -> int:
    """The same plan for GPUs that are not here: simulated, no hardware needed."""
    if target_batch is None:
        raise UsageError("Missing option '-b' / '--target-batch': the effective batch")
    if bool(gpus) == all_gpus:
        raise UsageError("name the cards with --gpu NAME, or take --all-gpus" + (", not both" if gpus else "; `autoaccum profiles list` shows them"))
    if timeline is not None and (len(gpus) != 1 or timeline.suffix not in (".png", ".svg", ".pdf", ".pickle")):
        raise UsageError(f"--timeline draws one card's window: give one --gpu and a file that ends in .png, .svg, .pdf or .pickle, not {str(timeline)!r}")
    for path in (output, timeline):
        if path is not None:
            _writable(path)
    if timeline is not None and timeline.suffix != ".pickle":
        drawing.ready(timeline)
    names = profiles.names() if all_gpus else list(gpus)
    wish = Wish(target_batch, None, headroom, max_micro_batch, equal)
    found = estimating.estimate_source(
        source(job, settings, rest or ()), wish, names, said=_said_nothing if quiet else _said, timeline=gpus[0] if timeline is not None else None
    )
    click.echo(report.as_json(found.as_dict()) if as_json else found.explain())
    if output is not None:
        output.write_text(report.as_json(found.as_dict()) + "\n")
    if timeline is not None:
        drawing.draw(found, timeline)
    return 3 if gpus and not all(each.fits for each in found.gpus) else 0


@cli.command(epilog=_EPILOG)
@click.argument("job", required=False)
@click.option("-b", "--target-batch", type=int, help="The effective batch: samples that one optimizer step sees, over all ranks.")
@click.option("-g", "--gpus", metavar="LIST", help='The cards, ranks in that order: "2*a100-80gb,4*t4".')
@click.option("--fixed", metavar="SIZE", help="Without a JOB: weights, gradients, optimizer's state and DDP's buckets.")
@click.option("--per-sample", metavar="SIZE", help="Without a JOB: what each sample of a micro-batch adds.")
@click.option("--parameters", type=float, metavar="N", help="How many there are (124e6).")
@click.option("--flops-per-sample", type=float, metavar="N", help="Floating point operations of forward and backward (870e9).")
@click.option("--bytes-per-sample", type=float, metavar="N", help="Bytes that forward and backward move (9e9).")
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
        _writable(output)
    by_hand = given["fixed"] is not None or given["per_sample"] is not None
    if job is None and not by_hand:
        raise UsageError("fleet needs a JOB whose memory is simulated, or --fixed SIZE and --per-sample SIZE (say `demo` as JOB for the built-in demo)")
    origin = None if job is None else source(job, settings, rest or ())
    found = forecasting.fleet(gpus, target_batch=target_batch, job=origin, said=_said_nothing if quiet else _said, **given)
    click.echo(report.as_json(found.as_dict()) if as_json else found.explain())
    if output is not None:
        found.plan().save(output)


@cli.group(name="profiles")
def profiles_() -> None:
    """GPU data files: what is known of cards that are not here."""


@profiles_.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def list_(as_json: bool) -> None:
    """Every card that is known."""
    found = [profiles.load(name) for name in profiles.names()]
    click.echo(report.as_json({"schema": "autoaccum.profiles/1", "gpus": [profiles.document(each) for each in found]}) if as_json else report.profiles(found))


@profiles_.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def show(name: str, as_json: bool) -> None:
    """One card, each number with its source. NAME may be a file of your own, NAME.toml."""
    found = profiles.read(Path(name)) if name.endswith(".toml") else profiles.load(name)
    click.echo(report.as_json({"schema": "autoaccum.profile/1", **profiles.document(found)}) if as_json else report.profile(found))


@profiles_.command()
@click.option("-d", "--device", default="cuda", show_default=True, help="cuda or cuda:INDEX.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.toml", help="Write it there instead of to stdout.")
def record(device: str, output: Path | None) -> None:
    """Measure the card that is here and write its data file."""
    from autoaccum import recording  # torch, and a card

    text = profiles.written(recording.record(device))
    if output is None:
        click.echo(text, nl=False)
    else:
        _writable(output)
        output.write_text(text)


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


class _Asked:
    """What the options of one call say together."""

    def __init__(
        self,
        rest: list[str] | None,
        *,
        job: str | None,
        target_batch: int | None,
        device: str,
        memory_limit: str | None,
        headroom: str,
        max_micro_batch: int | None,
        equal: bool,
        largest: bool,
        objective: Literal["fewest-steps", "throughput"],
        settings: tuple[str, ...],
        timeout: float | None,
        plot: Path | None,
        no_cache: bool,
        as_json: bool,
        output: Path | None,
        form: str,
        quiet: bool,
        traceback: bool,
    ) -> None:
        if target_batch is None:
            raise UsageError("Missing option '-b' / '--target-batch': the effective batch")
        self.form, self.output, self.quiet, self.device = "json" if as_json else form, output, quiet, device
        if as_json and form not in ("text", "json"):
            raise UsageError(f"--json and --format {form} both say how to print: give one")
        self.memory_limit, self.cache, self.plot = memory_limit, not no_cache, plot
        if plot is not None:
            drawing.ready(plot)
            _writable(plot, "--plot")
        self.virtual = device.removeprefix("virtual:") if device.startswith("virtual:") else None
        self.wish = Wish(target_batch, memory_limit, headroom, max_micro_batch, equal or form in formats.FORMATS, largest, timeout, objective=objective)
        if output is not None:
            _writable(output)
        if rest == [] and job is None:
            raise UsageError("nothing follows `--`: give the command there, or leave `--` out")
        self.command = rest if job is None and rest else None
        if self.command and self.virtual is not None:
            raise UsageError("--device virtual: needs a JOB that builds the model: a command cannot be simulated")
        if self.virtual is not None:
            profiles.load(self.virtual)  # an unknown card is told before anything is built
        if self.virtual is not None and objective == "throughput":
            raise UsageError("--objective throughput needs a device that is here: a simulated card has no clock")
        if self.command and (settings or largest):
            raise UsageError("--set and --largest are for a JOB: a command gets its arguments in its own words, and equal micro-batches")
        if self.form not in ("text", "json") and job is None and not self.command:
            raise UsageError(f"--format {form} without a JOB would plan the built-in demo: say `demo` as JOB if that is meant")
        self.source: Source = source(job, settings, rest or ())

    def alone(self, verb: str, instead: str) -> None:
        """Raises `UsageError` under torchrun, where every rank would do the same."""
        if (told := launched()) is not None:
            raise UsageError(f"{verb}, and torchrun started {told.world_size}: {instead}")

    def tuned(self) -> Plan:
        if self.form == "env":
            self.alone("--format env tells the numbers of one process", "write the plan with -o FILE.json, and autoaccum.Plan.load it on every rank")
        if self.command:
            self.alone("a command is tried in one process", "run autoaccum without torchrun")
        with self._talking() as talk:
            return (
                tuning.tune_command(self.command, self.wish, **talk) if self.command else tuning.tune_source(self.source, self.wish, cache=self.cache, **talk)
            )

    def checked(self, micro_batch: int) -> Plan:
        self.alone("check rehearses on one device", "run it without torchrun")
        if micro_batch < 1:
            raise UsageError(f"--micro-batch must be at least 1, not {micro_batch}")
        if self.wish.largest or (self.wish.max_micro_batch or micro_batch) < micro_batch:
            raise UsageError(f"check rehearses the one size {micro_batch}: leave --largest and a smaller --max-micro-batch out")
        with self._talking() as talk:
            if self.command:
                return tuning.check_command(self.command, micro_batch, self.wish, **talk)
            return tuning.check_source(self.source, micro_batch, self.wish, **talk)

    def answer(self, planned: Plan, found: Equivalence | None = None) -> None:
        if planned.rank:
            return  # one plan, told once
        if self.output is not None:
            planned.save(self.output)
        if self.plot is not None:
            planned.plot(self.plot)
        if self.form == "json":
            click.echo(report.as_json({**planned.as_dict(), **({"equivalence": found.as_dict()} if found is not None else {})}))
            return
        if self.form in formats.FORMATS:
            click.echo(report.as_json(formats.FORMATS[self.form](planned)))
            if self.form in formats.LOADER_SIZED:
                _said(f"the DataLoader's batch_size is {planned.micro_batch}\n")
            return
        click.echo({"text": report.text, "env": report.env}[self.form](planned))
        columns = shutil.get_terminal_size().columns
        if self.form == "text" and sys.stdout.isatty() and columns >= _WIDE:
            click.echo("\n".join(explaining.chart(planned, columns)))
        if found is not None and self.form == "text":
            click.echo(f"splitting: {found}")

    def equivalence(self) -> Equivalence:
        if self.virtual is not None:
            raise UsageError("--equivalence needs values, and a simulated card has none: ask with --device cpu")
        if self.command:
            raise UsageError("--equivalence needs a JOB that builds the model: a command's loss is out of reach")
        return tuning.compare_source(self.source, self.wish, device=self.device, said=_said_nothing if self.quiet else _said)

    def compared(self) -> None:
        if self.output is not None or self.plot is not None or self.form not in ("text", "json"):
            raise UsageError("check --equivalence alone makes no plan: leave --output, --plot and --format out, or give -b and -m")
        found = self.equivalence()
        click.echo(report.as_json(found.as_dict()) if self.form == "json" else str(found))

    def trained(self, planned: Plan, epochs: int) -> None:
        from autoaccum import training  # torch, which only training needs in this process

        if self.output is not None:
            planned.save(self.output)
        if self.plot is not None:
            planned.plot(self.plot)
        if self.form == "text":
            click.echo(report.text(planned))
        if self.virtual is not None and not self.quiet:
            _said("training on the CPU; what its tensors take is charged to the card, in the sizes of CPU kernels\n")
        run = []
        with _stdout_for_us() as answer:
            for epoch in training.train(
                self.source, planned, epochs=epochs, memory_limit=self.memory_limit, virtual=self.virtual, say=_said_nothing if self.quiet else _said
            ):
                run.append(epoch)
                if self.form == "text":
                    answer(f"epoch {epoch.number}  loss {epoch.loss:.6f}  {epoch.steps} step{'s' if epoch.steps != 1 else ''} of {planned.target_batch}")
            if self.form == "json":
                answer(report.as_json({**planned.as_dict(), "epochs": [vars(epoch) for epoch in run]}))

    @contextmanager
    def _talking(self) -> Iterator[dict[str, Any]]:
        quiet = self.quiet or ((told := launched()) is not None and told.rank > 0)
        with progress.shown(quiet=quiet) as drawn:
            yield {"device": self.device, "progress": drawn, "said": _said_nothing if quiet else _said}


_WIDE = 100  # columns of a terminal that has room for a chart


def _writable(output: Path, option: str = "--output") -> None:
    """Raises `UsageError` where the file could not be written in the end."""
    folder = output.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"{option} {str(output)!r}: there is no folder {str(folder)!r}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{option} {str(output)!r} cannot be written: {error.strerror}") from None


def _said(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _said_nothing(text: str) -> None: ...


@contextmanager
def _stdout_for_us() -> Iterator[Callable[[str], None]]:
    """While inside, what the job prints goes to stderr, and stdout is left to the answer."""
    sys.stdout.flush()
    answer = os.fdopen(os.dup(1), "w")
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield lambda text: print(text, file=answer, flush=True)
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        answer.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and ends the process with its exit code."""
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's; nobody here needs NumPy
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    words = list(sys.argv[1:] if arguments is None else arguments)
    # click would swallow the `--`: what follows it is not ours to parse.
    ours, rest = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, None)
    wants_json = "--json" in ours or any(a == "--format=json" or (a == "--format" and b == "json") for a, b in zip(ours, [*ours[1:], ""]))
    sys.exit(_run(ours, rest, wants_json, "--traceback" in ours))


def _run(ours: list[str], rest: list[str] | None, wants_json: bool, whole: bool) -> int:
    try:
        code = cli.main(args=ours, prog_name="autoaccum", obj=rest, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as nothing:
        click.echo(nothing.format_message(), err=True)
        return 2
    except click.ClickException as wrong:
        return _failed(UsageError(wrong.format_message()), wants_json, whole)
    except AutoaccumError as error:
        return _failed(error, wants_json, whole)
    except (KeyboardInterrupt, click.Abort):
        if wants_json:
            click.echo(report.as_json({**report.error(AutoaccumError("interrupted")), "error": "KeyboardInterrupt", "exit_code": 130}))
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:  # the reader of our stdout went away; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:  # the job's own, raised while it trains in this process
        if oom.is_oom(error):
            return _failed(OutOfMemory(f"training ran out of memory: {error}"), wants_json, whole)
        return _failed(JobFailed(str(error), kind=type(error).__name__, text=in_short(error), whole=traces.format_exc()), wants_json, whole)


def _failed(error: AutoaccumError, wants_json: bool, whole: bool) -> int:
    if wants_json:
        click.echo(report.as_json(report.error(error)))
    if isinstance(error, JobFailed) and error.text:
        click.echo((error.whole if whole else error.text).rstrip(), err=True)
    kind = f"{error.kind}: " if isinstance(error, JobFailed) and error.kind else ""
    click.echo(f"autoaccum: {kind}{error}", err=True)
    return error.exit_code
