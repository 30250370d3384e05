"""`Simulation`: the `Rehearser` of a card that is not here.

It traces a job once or twice and replays the tapes for every size and card. The search uses it in the same way as a `Rehearser` that runs real trials.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from autoaccum.data import tokens
from autoaccum.devices import Budget, Facts, Memory, make_budget
from autoaccum.plan import arithmetic
from autoaccum.plan import micro_batches as cut
from autoaccum.probe import Equivalence, Limits, Reading, Subject, refusals, variation
from autoaccum.simulate import (
    Allocator,
    Card,
    CardFacts,
    Margin,
    Profile,
    Replayed,
    Settings,
    Tape,
    held_at,
    margin_of,
    profiles,
    replay,
    settings_from_environment,
    tape_as_json,
)
from autoaccum.trace import OperatorWork
from autoaccum.units import in_words
from autoaccum.virtual.estimate import Estimate
from autoaccum.virtual.phantom import Phantom
from autoaccum.virtual.roofline import traced_curves
from autoaccum.virtual.tapes import PIECES, JobTapes
from autoaccum.window import Job, PhaseCallback, batch_norms, fingerprint, per_token

_SIZES = 1 << 36  # the search ends at this micro-batch


class Simulation:
    """Runs simulated trials of jobs on one card that is not here.

    approximate: the reason why CPU tensors are traced; "" if CUDA tensors are traced.
    """

    enforces = True

    def __init__(self, jobs: Sequence[Job], profile: Profile, limits: Limits, *, approximate: str = "", on_phase: PhaseCallback | None = None) -> None:
        jobs = tuple(map(per_token, jobs)) if limits.per_token else jobs
        self._jobs, self._limits, self._on_phase = jobs, limits, on_phase
        self._norms = tuple(dict.fromkeys(name for job in jobs for name in batch_norms(job.model)))
        self._remarks = self._job_remarks(approximate)
        self._fingerprint = fingerprint(jobs)
        self._gradient_bytes = max(job.gradient_bytes() for job in jobs)
        phantom = Phantom(jobs, "cpu" if approximate else "cuda", engine=limits.engine, world=limits.world)
        if phantom.rank is not None:
            self._gradient_bytes = phantom.rank.gradient_bytes
            self._remarks = (*self._remarks, *phantom.rank.remarks)
        self._traced = JobTapes(phantom, 2 if self._norms else 1)
        self._approximate = bool(approximate)
        self._peaks: dict[Any, Replayed] = {}
        self._works: tuple[tuple[int, list[OperatorWork]], ...] | None = None  # of two sizes
        self.use(profile)

    def use(self, profile: Profile) -> None:
        """Switches to another card. The tapes are kept."""
        self._profile = profile
        self._settings = settings_from_environment() if profile.backend in ("cuda", "rocm") else Settings()
        fraction = self._settings.memory_fraction
        self._available = min(profile.available_bytes, int(fraction * profile.total_bytes) if fraction is not None else profile.available_bytes)
        self._card = self._traced.alike(card_of(profile))

    # -- as a Rehearser --

    def subject(self) -> Subject:
        kind = "cuda" if self._profile.backend == "rocm" else self._profile.backend
        facts = Facts(kind, None if kind == "mps" else 0, self._profile.name, None)
        return Subject(facts, self._gradient_bytes, self._fingerprint, self._norms, 0, "", (*self._remarks, *self._card_remarks()), predicted=True)

    def budget(self, *, limited: bool = True) -> Budget:
        profile = self._profile
        memory = Memory(profile.total_bytes, self._available, 0, profile.context_bytes, (), "physical" if self._settings.memory_fraction is None else "cap")
        budget = make_budget(memory, kind="cuda", limit_bytes=self._limits.memory_bytes if limited else None, headroom=self._limits.headroom)
        bucket_bytes = self._gradient_bytes if self._limits.buckets else 0
        return replace(budget, budget_bytes=budget.budget_bytes - bucket_bytes, bucket_bytes=bucket_bytes)

    def measure(self, micro_batches: Sequence[int], *, full: bool = False, limited: bool = True, windows: int = 2) -> Reading:
        """One simulated trial. With `full` it traces exactly this window, twice; otherwise it computes the tape from two traces."""
        started = time.perf_counter()
        if self._on_phase is not None:
            self._on_phase("batch", 0)
        largest, steps = micro_batches[0], len(micro_batches)
        if not full:
            self._traced.about(self._card, largest, steps)
            self._traced.anchored(self._card, largest, steps)
        tape = self._on_card(self._traced.exactly(self._card, micro_batches, twice=True) if full else self._traced.about(self._card, largest, steps))
        allowed = self.budget(limited=limited).budget_bytes
        replayed = replay(tape, Allocator(self._profile.total_bytes, available_bytes=allowed, settings=self._settings, name=self._profile.name))
        over = replayed.retries > 0
        phase = tape.phase_at(replayed.failed_at).phase if replayed.failed_at is not None else "step"
        return Reading(
            largest,
            steps,
            "oom" if replayed.failed_at is not None else "over-budget" if over else "fits",
            phase if phase in ("forward", "backward", "clip", "step") else "batch",
            replayed.peak_reserved_bytes,
            time.perf_counter() - started,
            base_bytes=replayed.base_bytes + (self._gradient_bytes if steps > 1 else 0) if replayed.failed_at is None else None,
            # The search fits its line to reserved bytes, because the budget counts reserved bytes.
            activation_bytes=replayed.peak_reserved_bytes if replayed.failed_at is None else None,
            full=full,
            shapes=self._traced.phantom.shapes(largest),
            remarks=(*self._traced.remarks, *((self._margin_remark(tape),) if full else ()), *(self._grown(replayed, allowed) if full or steps == 1 else ())),
            least_bytes=tape.requested_peak(),
        )

    def _grown(self, replayed: Replayed, allowed: int) -> tuple[str, ...]:
        """A warning if the two whole windows of a tape end with unlike memory."""
        if replayed.failed_at is not None:
            return ()
        return variation.growth_remark(replayed.ends_bytes[-2:], allowed - replayed.peak_reserved_bytes, shared_with_host=False)

    def _margin_remark(self, tape: Tape) -> str:
        return f"simulated, not measured, and without the margin for it that autoaccum estimate keeps: {self._margin(tape).provenance}"

    def _margin(self, tape: Tape) -> Margin:
        return margin_of(tape.operators, approximate=self._approximate or self._profile.backend not in ("cuda", "rocm"))

    def evaluate(self, samples: int, trained: int) -> Reading:
        """One simulated trial of an evaluation, traced at exactly this size."""
        started = time.perf_counter()
        tape = self._on_card(self._traced.phantom.evaluation_tape(samples, trained, self._card))
        replayed = replay(
            tape, Allocator(self._profile.total_bytes, available_bytes=self.budget().budget_bytes, settings=self._settings, name=self._profile.name)
        )
        fits = replayed.failed_at is None
        return Reading(
            samples,
            1,
            "fits" if fits else "oom",
            "evaluate",
            replayed.peak_reserved_bytes,
            time.perf_counter() - started,
            base_bytes=replayed.base_bytes if fits else None,
            activation_bytes=replayed.peak_reserved_bytes if fits else None,
        )

    def sample_tokens(self) -> int:
        return tokens.per_sample(self._traced.phantom.batch(2), 2)

    def compare(self, samples: int) -> Equivalence | None:
        return None  # simulated weights have no values to compare

    def conditions(self) -> None:
        """None: simulated trials cost almost nothing, so they are not cached."""

    def fresh(self) -> None:
        """Does nothing: every simulated trial starts from the same state."""

    # -- for estimates over many cards --

    def estimate(self, target: int, *, most: int | None = None, equal: bool = False, both: bool = True) -> Estimate:
        """The estimate for the current card. both: also search the largest micro-batch, without and with flushes of the cache."""
        smallest = 2 if self._norms else 1
        candidates = arithmetic.candidate_sizes(target, smallest=smallest, most=most, equal=equal)
        if not candidates:
            raise refusals.nothing_allowed(target, most, self._norms)
        # A window in one piece is first tried in two, which hold gradients. For many cards it uses PIECES, which are traced anyway.
        pieces_of_all = 2 if both else PIECES

        def steps_of(size: int) -> int:
            return pieces_of_all if size == target else math.ceil(target / max(size, 1))

        first = candidates[-1] if both else candidates[0]  # the line goes through the first size that is tried
        margin = self._margin(self._traced.about(self._card, first, steps_of(first)))
        allowed = self.budget().budget_bytes

        def high(size: int, steps: int) -> float:
            return self._peak(size, steps) * (1 + margin.high)

        answer = 0
        for _ in range(12):  # until the line is confirmed at the answer
            answer = _largest(candidates, lambda size: high(size, steps_of(size)) <= allowed)
            if not answer or self._traced.anchored(self._card, answer, steps_of(answer)):
                break
        while answer and high(answer, steps_of(answer)) > allowed:  # the line has changed since
            answer = max((size for size in candidates if size < answer), default=0)
        one_piece_allowed = candidates[-1] == target
        # In one piece no gradients are held between micro-batches, so it may fit although two halves do not.
        fits_in_one = one_piece_allowed and high(target, pieces_of_all) - self._gradient_bytes <= allowed and high(target, 1) <= allowed
        if fits_in_one:
            answer = target
        elif answer == target:
            answer = _largest(candidates[:-1], lambda size: high(size, math.ceil(target / size)) <= allowed)
        size = answer or candidates[0]
        steps = math.ceil(target / size)
        sizes = cut(target, steps)
        tape = self._on_card(self._traced.about(self._card, size, steps))
        replayed = self._replayed(size, steps)
        parts = held_at(tape, replayed.peak_event)
        # Memory that only the running step holds is not optimizer state: state is still held at the end.
        temporary = max(parts["optimizer"] - held_at(tape, len(tape.events) - 1)["optimizer"], 0)
        parts = {**parts, "optimizer": parts["optimizer"] - temporary, "step": temporary}
        searched = both and self._jobs[0].split is None
        return Estimate(
            gpu=self._profile.label,
            name=self._profile.name,
            total_bytes=self._profile.total_bytes,
            budget_bytes=allowed,
            fits=bool(answer),
            micro_batch=sizes[0] if answer else None,
            accumulation_steps=steps if answer else None,
            micro_batches=sizes if answer else (),
            peak_bytes=replayed.peak_reserved_bytes,
            peak_interval_bytes=(int(replayed.peak_reserved_bytes * (1 - margin.low)), int(replayed.peak_reserved_bytes * (1 + margin.high))),
            breakdown={**parts, "context": self._profile.context_bytes, "unused": max(replayed.peak_reserved_bytes - sum(parts.values()), 0)},
            largest_micro_batch=self._anchored_most(lambda micro_batch: self._peak(micro_batch, 2) <= self._available) if searched else None,
            hard_largest_micro_batch=self._anchored_most(self._survives) if searched else None,
            estimated=tuple(name for name, figure in self._profile.figures() if figure.estimated),
            margin=margin.provenance,
            warnings=(*self._remarks, *self._card_remarks(), *self._traced.remarks, *self._routed(sizes, allowed, traced=both)),
            measured_at=self._traced.phantom.shapes(size),
        )

    def _routed(self, sizes: Sequence[int], allowed: int, *, traced: bool) -> tuple[str, ...]:
        """For a mixture of experts: the peak if tokens are split in the worst way. The estimate itself is for an even split.

        traced: False for many cards, where one more trace for each would take long.
        """
        phantom = self._traced.phantom
        if not phantom.experts:
            return ()
        if not traced:
            return (f"tokens were taken to be split evenly over {phantom.experts} experts: name up to eight cards to see the worst split",)
        pieces = tuple(sizes[:PIECES])
        tape = self._on_card(phantom.tape([pieces[:1], pieces], self._card, uneven=True))
        peak = replay(tape, Allocator(settings=replace(self._settings, memory_fraction=None))).peak_reserved_bytes
        return (
            f"tokens were taken to be split evenly over {phantom.experts} experts; if the first experts get all that they can get, an upper bound, the same "
            f"micro-batches of {sizes[0]} take {in_words(peak)}" + ("" if peak <= allowed else ", more than the budget"),
        )

    # -- the same as plain documents, for another process --

    def estimated(self, gpu: str, target: int, **request: Any) -> dict[str, Any]:
        """`estimate` on the card of that name, as a dictionary."""
        self.use(profiles.load(gpu))
        return self.estimate(target, **request).as_dict()

    def taped(self, sizes: Sequence[int]) -> dict[str, Any]:
        """The tape of a window on the current card, as a dictionary. If `sizes` is empty, the tape is of the smallest micro-batch."""
        return tape_as_json(self._on_card(self._traced.exactly(self._card, sizes or (self._traced.shortest,))).without_nothing())

    def timed(self, gpu: str, most: int) -> dict[str, Any]:
        """The time curves of the job on the card of that name, as a dictionary. most: the largest micro-batch.

        "curves": the slow, the middle and the fast one, each the seconds of a micro-step, of a sample and of a window's end. "parameters" and
        "gradient_bytes": of all parameters that are stepped.
        """
        self.use(profiles.load(gpu))
        if self._works is None:
            least = 2 if self._norms else 1
            self._works = tuple((size, self._traced.phantom.work(size, self._card)) for size in (2 * least, 4 * least))
        curves = traced_curves(self._profile, most, *self._works)
        return {
            "parameters": sum(parameter.numel() for job in self._jobs for parameter in job.stepped()),
            "gradient_bytes": sum(job.gradient_bytes() for job in self._jobs),
            "curves": [[curve.step_seconds, curve.sample_seconds, curve.window_seconds] for curve in curves],
        }

    def _peak(self, size: int, steps: int) -> int:
        return self._replayed(size, steps).peak_reserved_bytes

    def _replayed(self, size: int, steps: int) -> Replayed:
        pieces = min(steps, PIECES)
        key = (
            self._card,
            self._settings,
            self._profile.cublas_workspace.value,
            self._profile.parallel,
            size,
            pieces,
            self._traced.anchor(self._card, size, pieces),
        )
        if key not in self._peaks:
            self._peaks[key] = replay(
                self._on_card(self._traced.about(self._card, size, steps)), Allocator(settings=replace(self._settings, memory_fraction=None))
            )
        return self._peaks[key]

    def _survives(self, size: int) -> bool:
        profile = self._profile
        allocator = Allocator(profile.total_bytes, available_bytes=self._available, settings=self._settings)
        return replay(self._on_card(self._traced.about(self._card, size, 2)), allocator).failed_at is None

    def _on_card(self, tape: Tape) -> Tape:
        return tape.on(self._profile.cublas_workspace.value, *self._profile.parallel)

    def _anchored_most(self, fits: Callable[[int], bool]) -> int | None:
        """`_most`, repeated until the line is confirmed at the answer.

        None where every size must be traced, as for losses that work in chunks: a search far above the plan would take minutes.
        """
        for _ in range(12):
            if self._traced.changes_with_size(self._card):
                return None
            answer = self._most(fits)
            if not answer or self._traced.anchored(self._card, answer, 2):
                break
        return answer

    def _most(self, fits: Callable[[int], bool]) -> int:
        """The largest size that fits; 0 if none fits. The search starts at a line's guess, moves in growing steps, then bisects.

        It also tries sizes above the answer, because memory is not monotone.
        """
        least = 2 if self._norms else 1
        near, far = 16, 256
        slope = max((self._peak(far, 2) - self._peak(near, 2)) / (far - near), 1.0)
        size = int(min(max((self._available - self._peak(near, 2)) / slope + near, least), _SIZES))
        step = max(size // 64, 1)
        if fits(size):
            while size < _SIZES and fits(size + step):
                size, step = size + step, step * 2
            low, high = size, size + step
        else:
            while size - step >= least and not fits(size - step):
                size, step = size - step, step * 2
            low, high = size - step, size
            if low < least:
                low = least if high > least and fits(least) else 0
        while high - max(low, least - 1) > 1 and low:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        ahead = low + 1
        while low and ahead <= low + (40 if self._traced.anchor(self._card, ahead, 2) else 4) and self._requested_peak(ahead) <= self._available:
            low = ahead if fits(ahead) else low
            ahead += 1
        return low

    def _requested_peak(self, size: int) -> int:
        return self._traced.about(self._card, size, 2).requested_peak()

    def _job_remarks(self, approximate: str) -> tuple[str, ...]:
        messages = []
        if not all(job.model.training for job in self._jobs):
            messages.append("the model is in eval mode and was simulated so: call model.train() if that is how it trains")
        if approximate:
            messages.append(f"approximate: traced on CPU tensors, because {approximate}")
        if any(isinstance(module, torch.nn.RNNBase) for job in self._jobs for module in job.model.modules()):
            messages.append("recurrent layers are simulated step by step, which takes more than cuDNN's fused kernels do: an upper bound")
        if self._jobs[0].wants_closure:
            messages.append(
                f"{self._jobs[0].wants_closure} steps by values, which a simulated card does not have: its whole history is counted, its line search is not"
            )
        if torch.backends.cudnn.benchmark and any(isinstance(module, torch.nn.modules.conv._ConvNd) for job in self._jobs for module in job.model.modules()):
            messages.append("cudnn.benchmark is on: while cuDNN tries out kernels it takes up to all that is free, so the peak of a real card may be any")
        if any(job.is_compiled for job in self._jobs):
            messages.append("a compiled model was simulated as it is written: what the compiler fuses may take less, and sometimes more")
        return tuple(messages)

    def _card_remarks(self) -> tuple[str, ...]:
        profile = self._profile
        messages = []
        if profile.backend == "mps":
            messages.append(f"{profile.name}: Apple's allocator has rules of its own; simulated with CUDA's")
        elif profile.backend in ("rocm", "xpu"):
            messages.append(f"{profile.name}: kernels of {profile.backend} take other workspaces; simulated with CUDA's")
        if profile.backend == "cuda" and profile.capability < 80 and any(job.autocast is torch.bfloat16 for job in self._jobs):
            messages.append(f"{profile.name} has no bfloat16 of its own: it runs, slowly, and attention in its plain form; float16 with a GradScaler suits it")
        return tuple(messages)


def card_of(profile: Profile) -> Card:
    """The properties of a card that change a tape. Cards with equal properties share their traces."""
    # The size of cuBLAS's workspace changes only its own block, so `Tape.on` sets it before the replay.
    facts = CardFacts(profile.name, profile.total_bytes, *profile.parallel)
    return Card(profile.capability, benchmark=bool(torch.backends.cudnn.benchmark), facts=facts)


def _largest(candidates: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest candidate that fits; 0 if none fits. It also tries the two above the answer, because memory is not monotone."""
    if candidates and fits(candidates[-1]):  # common on a large card; it saves the traces of windows with many pieces
        return candidates[-1]
    low, high = -1, len(candidates) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if fits(candidates[middle]):
            low = middle
        else:
            high = middle
    for near in (low + 2, low + 3):
        if low >= 0 and near < len(candidates) and fits(candidates[near]):
            low = near
    return candidates[low] if low >= 0 else 0
