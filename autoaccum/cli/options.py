"""`CallOptions`: the options of one call. It checks them together, calls the tuner, and prints the answer on stdout."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from autoaccum import files, tuner
from autoaccum.cli import report
from autoaccum.command import copies_of
from autoaccum.distributed import launched
from autoaccum.errors import UsageError, in_brief
from autoaccum.plan import Plan, chart, framework_arguments
from autoaccum.probe import Equivalence, Request
from autoaccum.simulate import profiles
from autoaccum.window import Source, parse_source

_WIDE = 100  # columns; a narrower terminal gets no chart


class CallOptions:
    """The options of one call. Raises `UsageError` if they do not fit together."""

    def __init__(
        self,
        rest: list[str] | None,
        *,
        job: str | None,
        target_batch: int | None,
        target_tokens: int | None,
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
        evaluate: bool = False,
        what_if: bool = False,
        world: int | None = None,
        trial_seconds: float | None = None,
        set_files: tuple[str, ...] = (),
    ) -> None:
        if target_batch is None and target_tokens is None:
            raise UsageError("Missing option '-b' / '--target-batch': the effective batch (or --target-tokens, in tokens)")
        self.form, self.output, self.quiet, self.device = "json" if as_json else form, output, quiet, device
        if as_json and form not in ("text", "json"):
            raise UsageError(f"--json and --format {form} both say how to print: give one")
        self.memory_limit, self.cache, self.plot = memory_limit, not no_cache, plot
        if plot is not None:
            from autoaccum.cli import timeline_picture

            timeline_picture.ready(plot)
            writable(plot, "--plot")
        self.virtual = device.removeprefix("virtual:") if device.startswith("virtual:") else None
        self.request = Request(
            target_batch,
            memory_limit,
            headroom,
            max_micro_batch,
            equal or form in framework_arguments.FORMATS or (form == "env" and target_tokens is None),  # which have room for two numbers
            largest,
            timeout,
            objective=objective,
            evaluate=evaluate,
            target_tokens=target_tokens,
            trial_s=trial_seconds,
        )
        if output is not None:
            writable(output)
        if rest == [] and job is None:
            raise UsageError("nothing follows `--`: give the command there, or leave `--` out")
        self.command = rest if job is None and rest else None
        if self.command is None and (world, trial_seconds, set_files) != (None, None, ()):
            raise UsageError("--world, --trial-seconds and --set-file are for a command after `--`; a JOB runs under torchrun, and its trials take two windows")
        if self.command is None and (placed := next((word for word in rest or () if "{micro_batch}" in word or "{accumulation_steps}" in word), None)):
            raise UsageError(
                f"{placed!r} stands after `--` beside JOB {job!r}, which gets its micro-batches from us: leave it out, or leave JOB out to tune the command"
            )
        if world is not None and world < 1:
            raise UsageError(f"--world must be at least 1, not {world}")
        self.of_command: dict[str, Any] = {"world": world, "copies": copies_of(set_files)}
        if self.command and self.virtual is not None:
            raise UsageError("--device virtual: needs a JOB that builds the model: a command cannot be simulated")
        if self.virtual is not None:
            profiles.load(self.virtual)  # raises for an unknown card before the job is built
        if self.virtual is not None and objective == "throughput":
            raise UsageError("--objective throughput needs a device that is here: a simulated card has no clock")
        if what_if and (self.command or self.virtual is not None or launched() is not None or form not in ("text", "json")):
            raise UsageError(
                "--what-if builds a JOB with changes and measures each on one device that is here, in text or JSON; for a card that is not here: "
                "autoaccum estimate JOB --what-if --gpu NAME"
            )
        self.what_if = what_if
        if self.command and evaluate:
            raise UsageError("--evaluate is for a JOB: of a command, autoaccum sees only that it trains; tune its evaluation by a run of its own")
        if self.command and (settings or largest):
            raise UsageError("--set and --largest are for a JOB: a command gets its arguments in its own words, and equal micro-batches")
        if self.form not in ("text", "json") and job is None and not self.command:
            raise UsageError(f"--format {form} without a JOB would plan the built-in demo: say `demo` as JOB if that is meant")
        self.source: Source = parse_source(job, settings, rest or ())

    def alone(self, verb: str, instead: str) -> None:
        """Raises `UsageError` under torchrun, because every rank would do the same."""
        if (launch := launched()) is not None:
            raise UsageError(f"{verb}, and torchrun started {launch.world_size}: {instead}")

    def tuned(self) -> Plan:
        if self.form == "env":
            self.alone("--format env tells the numbers of one process", "write the plan with -o FILE.json, and autoaccum.Plan.load it on every rank")
        if self.command:
            self.alone("a command is tried in one process", "run autoaccum without torchrun")
        with self._callbacks() as callbacks:
            return (
                tuner.tune_command(self.command, self.request, **self.of_command, **callbacks)
                if self.command
                else tuner.tune_source(self.source, self.request, cache=self.cache, **callbacks)
            )

    def changed(self, planned: Plan | None) -> Sequence[tuner.ChangedPlan]:
        """The job with changes that make it need less memory, each tuned."""
        with self._callbacks() as callbacks:
            return tuner.tune_changed(self.source, self.request, planned, **callbacks)

    def checked(self, micro_batch: int, windows: int = 2) -> Plan:
        self.alone("check rehearses on one device", "run it without torchrun")
        if micro_batch < 1:
            raise UsageError(f"--micro-batch must be at least 1, not {micro_batch}")
        if self.request.largest or (self.request.max_micro_batch or micro_batch) < micro_batch:
            raise UsageError(f"check rehearses the one size {micro_batch}: leave --largest and a smaller --max-micro-batch out")
        with self._callbacks() as callbacks:
            if self.command and windows != 2:
                raise UsageError("--windows is for a JOB: a command decides by itself how many steps it runs")
            if self.virtual is not None and windows != 2:
                raise UsageError("--windows runs real windows, and a simulated card runs none: leave it out, growth is seen in two")
            if self.command:
                return tuner.check_command(self.command, micro_batch, self.request, **self.of_command, **callbacks)
            return tuner.check_source(self.source, micro_batch, self.request, windows=windows, **callbacks)

    def answer(self, planned: Plan, found: Equivalence | None = None, changed: Sequence[tuner.ChangedPlan] | None = None) -> None:
        if planned.rank:
            return  # all ranks have the same plan, so only rank 0 prints it
        if self.output is not None:
            planned.save(self.output)
        if self.plot is not None:
            planned.plot(self.plot)
        if self.form == "json":
            more: dict[str, Any] = {"equivalence": found.as_dict()} if found is not None else {}
            more |= {"what_if": [row.as_dict() for row in changed]} if changed is not None else {}
            print(report.as_json({**planned.as_dict(), **more}), flush=True)
            return
        if self.form in framework_arguments.FORMATS:
            print(report.as_json(framework_arguments.FORMATS[self.form](planned)), flush=True)
            if self.form in framework_arguments.LOADER_SIZED:
                write_stderr(f"the DataLoader's batch_size is {planned.micro_batch}\n")
            return
        print({"text": report.text, "env": report.env}[self.form](planned), flush=True)
        columns = shutil.get_terminal_size().columns
        if self.form == "text" and sys.stdout.isatty() and columns >= _WIDE:
            print("\n".join(chart(planned, columns)), flush=True)
        if changed is not None:
            print(report.changed(changed), flush=True)
        if found is not None and self.form == "text":
            print(f"splitting: {found}", flush=True)

    def equivalence(self) -> Equivalence:
        if self.virtual is not None:
            raise UsageError("--equivalence needs values, and a simulated card has none: ask with --device cpu")
        if self.command:
            raise UsageError("--equivalence needs a JOB that builds the model: a command's loss is out of reach")
        return tuner.compare_source(self.source, self.request, device=self.device, on_output=write_nothing if self.quiet else write_stderr)

    def compared(self) -> None:
        if self.output is not None or self.plot is not None or self.form not in ("text", "json"):
            raise UsageError("check --equivalence alone makes no plan: leave --output, --plot and --format out, or give -b and -m")
        equivalence = self.equivalence()
        print(report.as_json(equivalence.as_dict()) if self.form == "json" else str(equivalence), flush=True)

    def trained(self, planned: Plan, epochs: int) -> None:
        from autoaccum.cli.epochs import train  # imports torch, which only training needs in this process

        if self.output is not None:
            planned.save(self.output)
        if self.plot is not None:
            planned.plot(self.plot)
        if self.form == "text":
            print(report.text(planned), flush=True)
        if self.virtual is not None and not self.quiet:
            write_stderr("training on the CPU; what its tensors take is charged to the card, in the sizes of CPU kernels\n")
        epochs_run = []
        with _reserved_stdout() as answer:
            for epoch in train(
                self.source,
                planned,
                epochs=epochs,
                memory_limit=self.memory_limit,
                virtual=self.virtual,
                on_output=write_nothing if self.quiet else write_stderr,
            ):
                epochs_run.append(epoch)
                if self.form == "text":
                    answer(f"epoch {epoch.number}  loss {epoch.loss:.6f}  {epoch.steps} step{'s' if epoch.steps != 1 else ''} of {planned.target_batch}")
            if self.form == "json":
                answer(report.as_json({**planned.as_dict(), "epochs": [vars(epoch) for epoch in epochs_run]}))

    @contextmanager
    def _callbacks(self) -> Iterator[dict[str, Any]]:
        quiet = self.quiet or ((launch := launched()) is not None and launch.rank > 0)
        with tuner.shown(quiet=quiet) as callback:
            yield {"device": self.device, "progress": callback, "on_output": write_nothing if quiet else write_stderr}


def writable(output: Path, option: str = "--output") -> None:
    """Raises `UsageError` if the file cannot be written."""
    if why := files.why_not_writable(output):
        raise UsageError(f"{option} {in_brief(output)}{'' if why.startswith('there is') else ' cannot be written'}: {why}")


def write_file(output: Path, text: str, option: str = "--output") -> None:
    """Writes what a command answered into a file too. Raises `UsageError` if it cannot be written; then nothing of it is left."""
    try:
        files.write_text(output, text)
    except OSError as error:
        raise UsageError(f"{option} {in_brief(output)} cannot be written: {error.strerror or error}; nothing was left there") from error


def write_stderr(text: str) -> None:
    """Writes the text that a job prints to stderr, at once."""
    sys.stderr.write(text)
    sys.stderr.flush()


def write_nothing(text: str) -> None:
    """Discards the text. It replaces `write_stderr` with --quiet."""


@contextmanager
def _reserved_stdout() -> Iterator[Callable[[str], None]]:
    """A context manager: inside, the job's output goes to stderr. It yields a function that prints the answer on stdout."""
    sys.stdout.flush()
    answer = os.fdopen(os.dup(1), "w")
    original = os.dup(1)
    os.dup2(2, 1)
    try:
        yield lambda text: print(text, file=answer, flush=True)
    finally:
        sys.stdout.flush()
        os.dup2(original, 1)
        os.close(original)
        answer.close()
