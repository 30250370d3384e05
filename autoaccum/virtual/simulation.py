"""Trials of a job on cards that are not here: traced once or twice, replayed for every size and every card.

A `reading.Rehearser`, as a real rehearsal is: the search does not know that nothing runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from autoaccum.devices import Budget, Facts, Memory, make_budget
from autoaccum.plan import arithmetic
from autoaccum.plan import micro_batches as cut
from autoaccum.probe import Equivalence, Limits, Reading, Subject, refusals
from autoaccum.simulate import (
    Allocator,
    Card,
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
from autoaccum.virtual.advice import with_advice
from autoaccum.virtual.estimate import Estimate
from autoaccum.virtual.phantom import Phantom
from autoaccum.virtual.tapes import PIECES, JobTapes
from autoaccum.window import Job, PhaseCallback, batch_norms, fingerprint, is_compiled

_SIZES = 1 << 36  # no larger micro-batch is looked for


class Simulation:
    """Rehearses jobs on one card that is not here. `approximate`: why it is not CUDA tensors that are traced, or ""."""

    enforces = True

    def __init__(self, jobs: Sequence[Job], profile: Profile, limits: Limits, *, approximate: str = "", on_phase: PhaseCallback | None = None) -> None:
        self._jobs, self._limits, self._on_phase = jobs, limits, on_phase
        self._norms = tuple(dict.fromkeys(name for job in jobs for name in batch_norms(job.model)))
        self._remarks = self._first_remarks(approximate)
        self._fingerprint = fingerprint(jobs)
        self._gradient_bytes = max(job.gradient_bytes() for job in jobs)
        # Compared on the CPU where the weights have their values; here they have none.
        self._traced = JobTapes(Phantom(jobs, "cpu" if approximate else "cuda"), 2 if self._norms else 1)
        self._approximate = bool(approximate)
        self._peaks: dict[Any, Replayed] = {}
        self.use(profile)

    def use(self, profile: Profile) -> None:
        """Goes on with another card."""
        self._profile = profile
        self._settings = settings_from_environment() if profile.backend in ("cuda", "rocm") else Settings()
        fraction = self._settings.memory_fraction
        self._available = min(profile.available_bytes, int(fraction * profile.total_bytes) if fraction is not None else profile.available_bytes)
        self._card = self._traced.alike(card_of(profile))

    # -- as a Rehearser --

    def subject(self) -> Subject:
        kind = "cuda" if self._profile.backend == "rocm" else self._profile.backend
        facts = Facts(kind, None if kind == "mps" else 0, self._profile.name, None)
        return Subject(facts, self._gradient_bytes, self._fingerprint, self._norms, 0, "", (*self._remarks, *self._of_the_card()), predicted=True)

    def budget(self, *, limited: bool = True) -> Budget:
        profile = self._profile
        memory = Memory(profile.total_bytes, self._available, 0, profile.context_bytes, (), "physical" if self._settings.memory_fraction is None else "cap")
        found = make_budget(memory, kind="cuda", limit_bytes=self._limits.memory_bytes if limited else None, headroom=self._limits.headroom)
        bucket_bytes = self._gradient_bytes if self._limits.buckets else 0
        return replace(found, budget_bytes=found.budget_bytes - bucket_bytes, bucket_bytes=bucket_bytes)

    def measure(self, micro_batches: Sequence[int], *, full: bool = False, limited: bool = True, windows: int = 2) -> Reading:
        """One simulated trial; `full` traces the very window, and any smaller trial takes it from two traces."""
        started = time.perf_counter()
        if self._on_phase is not None:
            self._on_phase("batch", 0)
        largest, steps = micro_batches[0], len(micro_batches)
        if not full:
            self._traced.about(self._card, largest, steps)
            self._traced.anchored(self._card, largest, steps)
        tape = self._on_card(self._traced.exactly(self._card, micro_batches, twice=True) if full else self._traced.about(self._card, largest, steps))
        allowed = self.budget(limited=limited).budget_bytes
        ran = replay(tape, Allocator(self._profile.total_bytes, available_bytes=allowed, settings=self._settings, name=self._profile.name))
        over = ran.retries > 0
        phase = tape.phase_at(ran.failed_at).phase if ran.failed_at is not None else "step"
        return Reading(
            largest,
            steps,
            "oom" if ran.failed_at is not None else "over-budget" if over else "fits",
            phase if phase in ("forward", "backward", "clip", "step") else "batch",
            ran.peak_reserved_bytes,
            time.perf_counter() - started,
            base_bytes=ran.base_bytes + (self._gradient_bytes if steps > 1 else 0) if ran.failed_at is None else None,
            # The search's line is one of what is reserved: that is what the budget counts.
            activation_bytes=ran.peak_reserved_bytes if ran.failed_at is None else None,
            full=full,
            shapes=self._traced.phantom.shapes(largest),
            remarks=(*self._traced.remarks, *((self._how_far(tape),) if full else ())),
            least_bytes=tape.requested_peak(),
        )

    def _how_far(self, tape: Tape) -> str:
        return f"simulated, not measured, and without the margin for it that autoaccum estimate keeps: {self._margin(tape).provenance}"

    def _margin(self, tape: Tape) -> Margin:
        return margin_of(tape.operators, approximate=self._approximate or self._profile.backend not in ("cuda", "rocm"))

    def compare(self, samples: int) -> Equivalence | None:
        return None

    def conditions(self) -> None:
        """Simulated trials cost next to nothing."""

    def fresh(self) -> None:
        """Every trial starts afresh already."""

    # -- for estimates over many cards --

    def estimate(self, target: int, *, most: int | None = None, equal: bool = False, both: bool = True) -> Estimate:
        """The plan for the present card. both: also the largest micro-batch at all, without and with flushes of the cache."""
        smallest = 2 if self._norms else 1
        candidates = arithmetic.candidate_sizes(target, smallest=smallest, most=most, equal=equal)
        if not candidates:
            raise refusals.nothing_allowed(target, most, self._norms)
        # A window in one piece is measured in two, which hold gradients; for many cards in more, which are traced anyway.
        pieces_of_all = 2 if both else PIECES

        def steps_of(size: int) -> int:
            return pieces_of_all if size == target else math.ceil(target / max(size, 1))

        first = candidates[-1] if both else candidates[0]  # the line is drawn through the first that is asked for: a few cards' answer, or many's
        margin = self._margin(self._traced.about(self._card, first, steps_of(first)))
        allowed = self.budget().budget_bytes

        def high(size: int, steps: int) -> float:
            return self._peak(size, steps) * (1 + margin.high)

        found = 0
        for _ in range(12):  # until the line is anchored where the answer lies
            found = _largest(candidates, lambda size: high(size, steps_of(size)) <= allowed)
            if not found or self._traced.anchored(self._card, found, steps_of(found)):
                break
        while found and high(found, steps_of(found)) > allowed:  # the line moved under it
            found = max((size for size in candidates if size < found), default=0)
        whole = candidates[-1] == target
        # In one piece no gradients are held between micro-batches, so it may fit where two halves do not.
        in_one = whole and high(target, pieces_of_all) - self._gradient_bytes <= allowed and high(target, 1) <= allowed
        if in_one:
            found = target
        elif found == target:
            found = _largest(candidates[:-1], lambda size: high(size, math.ceil(target / size)) <= allowed)
        size = found or candidates[0]
        steps = math.ceil(target / size)
        sizes = cut(target, steps)
        tape = self._on_card(self._traced.about(self._card, size, steps))
        ran = self._replayed(size, steps)
        held = held_at(tape, ran.peak_event)
        # What a step takes while it runs is no state: that is still there at the end.
        passing = max(held["optimizer"] - held_at(tape, len(tape.events) - 1)["optimizer"], 0)
        held = {**held, "optimizer": held["optimizer"] - passing, "step": passing}
        return Estimate(
            gpu=self._profile.label,
            name=self._profile.name,
            total_bytes=self._profile.total_bytes,
            budget_bytes=allowed,
            fits=bool(found),
            micro_batch=sizes[0] if found else None,
            accumulation_steps=steps if found else None,
            micro_batches=sizes if found else (),
            peak_bytes=ran.peak_reserved_bytes,
            peak_interval_bytes=(int(ran.peak_reserved_bytes * (1 - margin.low)), int(ran.peak_reserved_bytes * (1 + margin.high))),
            breakdown={**held, "context": self._profile.context_bytes, "unused": max(ran.peak_reserved_bytes - sum(held.values()), 0)},
            largest_micro_batch=self._anchored_most(lambda each: self._peak(each, 2) <= self._available) if both and self._jobs[0].split is None else None,
            hard_largest_micro_batch=self._anchored_most(self._survives) if both and self._jobs[0].split is None else None,
            estimated=tuple(name for name, figure in self._profile.figures() if figure.estimated),
            margin=margin.provenance,
            warnings=(*self._remarks, *self._of_the_card(), *self._traced.remarks),
            measured_at=self._traced.phantom.shapes(size),
        )

    # -- the same, told to another process --

    def estimated(self, gpu: str, target: int, **request: Any) -> dict[str, Any]:
        """`estimate` on the card of that name, with advice, as a plain document."""
        self.use(profiles.load(gpu))
        return with_advice(self.estimate(target, **request), self._jobs).as_dict()

    def taped(self, sizes: Sequence[int]) -> dict[str, Any]:
        """The tape of a window on the present card, as a plain document; where nothing fits, of the smallest micro-batch."""
        return tape_as_json(self._on_card(self._traced.exactly(self._card, sizes or (self._traced.shortest,))).without_nothing())

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

    def _anchored_most(self, fits: Callable[[int], bool]) -> int:
        """As `_most`, until the line is anchored where the answer lies."""
        for _ in range(12):
            found = self._most(fits)
            if not found or self._traced.anchored(self._card, found, 2):
                break
        return found

    def _most(self, fits: Callable[[int], bool]) -> int:
        """The largest size of all that fits, from a line's guess by growing steps, then by halving; 0 for none.

        Neighbours are looked at, because memory is not monotone.
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
        while low and ahead <= low + 40 and self._least(ahead) <= self._available:
            low = ahead if fits(ahead) else low
            ahead += 1
        return low

    def _least(self, size: int) -> int:
        return self._traced.about(self._card, size, 2).requested_peak()

    def _first_remarks(self, approximate: str) -> tuple[str, ...]:
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
        if is_compiled(self._jobs):
            messages.append("a compiled model was simulated as it is written: what the compiler fuses may take less, and sometimes more")
        return tuple(messages)

    def _of_the_card(self) -> tuple[str, ...]:
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
    """What of a card decides on a tape: cards alike in it share their traces."""
    # The workspace's size changes nothing else on a tape: it is put in when that is replayed.
    return Card(profile.capability, benchmark=bool(torch.backends.cudnn.benchmark))


def _largest(candidates: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest candidate that fits, 0 for none; the two above the answer are looked at, because memory is not monotone."""
    if candidates and fits(candidates[-1]):  # which is often so on a large card, and spares the traces of windows of many pieces
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
