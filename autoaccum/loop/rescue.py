"""Out of memory in mid-training: the same window, smaller, exactly.

When forward or backward runs out of memory, what the window changed is put back (see `rewinding`), and it runs again
in smaller micro-batches. Once an optimizer has begun to step, weights have changed and nothing can be repeated.
"""

from __future__ import annotations

import logging
import mmap
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from autoaccum import oom
from autoaccum.data import Cut, Window
from autoaccum.devices import Device
from autoaccum.distributed import AGAIN, CANNOT, VoidWindow, WindowVote
from autoaccum.errors import noted
from autoaccum.plan import Plan, arithmetic, window_notation
from autoaccum.units import MIB
from autoaccum.window import Job, PhaseCallback, WindowResult, WindowStart, batch_norms, forget

log = logging.getLogger("autoaccum")
Sizes = Callable[[int], Sequence[int]]  # a window's micro-batches, none larger than the given


class Attempt(Protocol):
    """Runs a window's micro-batches, and says where it is."""

    def __call__(self, cut: Cut, *, on_phase: PhaseCallback) -> WindowResult: ...


_BALLAST_BYTES = 16 * MIB


@dataclass(frozen=True)
class Rescued:
    """What a rescue changed. `str` of it is the line that is logged.

    phase: forward, backward or clip; index: of the micro-batch, from 0. before, after: micro-batches of the window, as it
    was first and as it ran in the end. attempts: how often it ran out of memory.
    kept_bytes: what did not come back after the failure, beyond what was held before the window.
    """

    phase: str
    index: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    attempts: int
    kept_bytes: int

    def __str__(self) -> str:
        more = "" if self.attempts == 1 else f", and in {self.attempts - 1} smaller size{'s' if self.attempts > 2 else ''}"
        kept = f"; {self.kept_bytes / MIB:.0f} MiB did not come back" if self.kept_bytes > 16 * MIB else ""
        return (
            f"out of memory in {self.phase} of micro-batch {self.index + 1} of {window_notation(self.before)}{more}: "
            f"the window ran again, whole, as {window_notation(self.after)}; micro-batches stay at {max(self.after)} or less{kept}"
        )


class Rescuer:
    """Runs windows, and those that run out of memory again in smaller micro-batches.

    micro_batch: the most a micro-batch may hold now: the plan's, less after a rescue.
    grow_after: windows without trouble after which a size that a rescue left is tried again, twice as many after each
    time that it was still too much; None for never. together: whether other ranks run a part of the same windows.
    """

    def __init__(self, jobs: Sequence[Job], device: Device, plan: Plan, *, enabled: bool, grow_after: int | None, together: bool = False) -> None:
        self._together = together
        self._jobs, self._device, self._plan, self._enabled, self._grow_after = jobs, device, plan, enabled, grow_after
        # A rank without a share may still be handed samples of others.
        self.micro_batch = plan.micro_batch or (plan.fleet.curves[plan.rank].most if plan.fleet is not None else 0)
        self._left: list[int] = []  # sizes that rescues have left, to grow back to
        self._windows = self._quiet_windows = self._held_bytes = 0
        self._grew = self._failed = False
        self._phase, self._index = "forward", 0
        self._ballast = Ballast(device if enabled else None)
        if enabled:
            self._start = WindowStart(jobs)

    def begin(self) -> None:
        """Called before a window, also one that several jobs run in turn: counts, and grows back where that is due."""
        self._quiet_windows = 0 if self._failed else self._quiet_windows + 1
        self._windows += 1
        self._failed = False
        if self._left and self._grow_after is not None and self._quiet_windows >= self._grow_after:
            self.micro_batch, self._quiet_windows, self._grew = self._left.pop(), 0, True
            log.info("trying micro-batches of %d again, after %d windows without trouble", self.micro_batch, self._grow_after)
        if self._enabled and (self._windows <= 2 or self._windows % 64 == 0):  # optimizers make their state at the first step
            self._held_bytes = self._device.live_bytes()

    def run(self, whole: Window, sizes: Sizes, attempt: Attempt, crossing: WindowVote | None = None) -> tuple[WindowResult, Rescued | None]:
        """One job's window. sizes: micro-batches for a given most. attempt: runs them, up to the optimizer's step. crossing: what `attempt`
        does with other ranks.

        Raises what `attempt` raised where it is no out-of-memory, where the optimizer had begun to step, and
        where not even the smallest micro-batch runs; an out-of-memory with a note that says which. Over ranks, raises `sync.Void` with
        all as it was before the window where a rank cannot hold one sample of it.
        """
        before, at_first, left_at_first = whole.runs_as(sizes(self.micro_batch)), self.micro_batch, len(self._left)
        cut = whole.cut(sizes(self.micro_batch), most=self.micro_batch)
        outside = sys.exc_info()[1]  # what the caller is handling, if anything: none of our business
        if self._enabled:
            self._start.note()
        failures: list[tuple[str, int]] = []
        ran, kept_bytes = None, 0
        while ran is None:
            self._phase, self._index = "forward", 0
            votes: int | None = None  # what the other ranks wait to hear of this one
            others: VoidWindow | None = None
            try:
                ran = attempt(cut, on_phase=self._on_phase)
            except VoidWindow as void:
                others = void
                forget(void, self._jobs, outside)
            except Exception as error:
                self._ballast.drop()  # first of all: what follows takes memory, too
                if not self._is_oom(error, outside):
                    raise
                again = self._smaller(whole, sizes) if self._redone(crossing) else None
                if again is None:
                    why = self._why_not()
                    self.micro_batch, self._left = at_first, self._left[:left_at_first]
                    if crossing is None or not (self._redone(crossing) and crossing.votes):
                        noted(error, why)
                        if self._enabled and self._phase not in self._final(crossing):
                            self._start.put_back()
                        raise
                    votes = CANNOT
                else:
                    failures.append((self._phase, self._index))
                    cut = again
                    votes = AGAIN if crossing is not None and crossing.redone == "together" else None
                forget(error, self._jobs, outside)
            finally:
                self._ballast.take()
            if ran is None:
                # Not in the handler: there the exception, and through it the failed window, is still held.
                self._start.put_back()
                self._device.release()
                kept_bytes = self._device.live_bytes() - self._held_bytes
                if crossing is not None:
                    self._agree(crossing, votes, others)
        if not failures:
            return ran, None
        if self._grew and self._grow_after is not None:
            self._grow_after *= 2  # it is still too much: try less often
        self._failed, self._grew = True, False
        rescued = Rescued(*failures[0], before, whole.runs_as(sizes(self.micro_batch)), len(failures), kept_bytes)
        log.warning("%s", rescued)
        return ran, rescued

    def _agree(self, crossing: WindowVote, votes: int | None, others: VoidWindow | None) -> None:
        """Tells the other ranks, and raises `Void` where one of them, or this one, cannot hold a sample."""
        if votes is not None:
            try:
                crossing.vote(votes)
            except VoidWindow as void:
                others = void
        if others is not None or votes is not None:
            crossing.void()
        if others is not None and others.out:
            self._failed = True
            raise others

    def _redone(self, crossing: WindowVote | None) -> bool:
        """Whether this rank may run the window again after what just failed."""
        if not self._enabled or self._phase in self._final(crossing):
            return False
        return crossing is None or crossing.redone != "never"

    def _final(self, crossing: WindowVote | None) -> tuple[str, ...]:
        """Phases after which nothing can be repeated: weights may have changed, or gradients have crossed."""
        return ("step",) if crossing is None else ("sync", "clip", "step")

    def _smaller(self, whole: Window, sizes: Sizes) -> Cut | None:
        """The window in the next smaller micro-batches that make a difference to it; None where there are none."""
        smallest = 2 if any(batch_norms(job.model) for job in self._jobs) else 1  # which forbids a sample alone
        now = whole.runs_as(sizes(self.micro_batch))
        for most in arithmetic.candidate_sizes(self._plan.share, smallest=smallest)[::-1]:
            then = whole.runs_as(sizes(most))
            if most >= self.micro_batch or max(then) >= max(now) or min(then) < min(smallest, *now):
                continue
            try:
                cut = whole.cut(sizes(most), most=most)
            except Exception:  # batches that cannot be cut came as micro-batches, or the user's splitter failed
                return None
            self._left.append(self.micro_batch)
            self.micro_batch = most
            return cut
        return None

    def _why_not(self) -> str:
        where = f"autoaccum: ran out of memory in {self._phase} of micro-batch {self._index + 1}, of at most {self.micro_batch} samples"
        if self._phase == "step":
            return "autoaccum: ran out of memory in the optimizer's step: weights may have changed, so the window was not run again; load your last checkpoint"
        if self._phase in ("sync", "clip") or (self._together and self._enabled):
            return f"{where}, where gradients cross ranks, so no rank can repeat it alone: start again from your last checkpoint, with more headroom"
        return f"{where}; the window cannot be cut smaller" if self._enabled else where

    def _is_oom(self, error: Exception, outside: BaseException | None) -> bool:
        word = oom.verdict(error, outside)
        if word != "ask-device":
            return word == "oom"
        try:
            live_bytes, free_bytes = self._device.live_bytes(), self._device.memory(who=False).free_bytes
        except Exception:  # a device that lost its context answers nothing: then that is the trouble
            return False
        left_bytes = free_bytes
        if self._plan.budget_bytes:  # a plan of cards that were not here has none
            left_bytes = min(self._plan.budget_bytes + self._plan.headroom_bytes - live_bytes, free_bytes)
        return oom.is_oom(error, left_bytes=left_bytes, taken_bytes=live_bytes - self._held_bytes, outside=outside)

    def _on_phase(self, phase: str, index: int) -> None:
        self._phase, self._index = phase, index


class Ballast:
    """On a CPU, memory that is given back first of all when memory has run out: handling that takes some, too.

    Its pages are never touched, so it counts under RLIMIT_DATA alone, which is where memory runs out with an
    exception; what a container counts does not show it.
    """

    def __init__(self, device: Device | None) -> None:
        self._wanted = device is not None and device.facts.kind == "cpu"
        self._held: mmap.mmap | None = None
        self.take()

    def take(self) -> None:
        if self._wanted and self._held is None:
            with suppress(OSError, MemoryError, ValueError):  # then without
                self._held = mmap.mmap(-1, _BALLAST_BYTES)

    def drop(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None
