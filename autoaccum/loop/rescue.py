"""The rescue after an out-of-memory during training: the same window runs again in smaller micro-batches, with the same result.

If forward or backward runs out of memory, the state that the window changed is restored (see `WindowStart`), and the window runs
again. After an optimizer has begun to step, weights may have changed, so the window cannot run again.
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
from autoaccum.devices import Device, steady_malloc
from autoaccum.distributed import AGAIN, CANNOT, VoidWindow, WindowVote
from autoaccum.errors import PlanError, noted
from autoaccum.loop.learner import Learner
from autoaccum.plan import Plan, arithmetic, window_notation
from autoaccum.units import MIB
from autoaccum.window import Job, PhaseCallback, WindowResult, WindowStart, batch_norms, forget

log = logging.getLogger("autoaccum")
Sizes = Callable[[int], Sequence[int]]  # largest size allowed -> the micro-batch sizes of a window


class Attempt(Protocol):
    """Runs a window's micro-batches, and calls `on_phase` at the start of each phase."""

    def __call__(self, cut: Cut, *, on_phase: PhaseCallback) -> WindowResult: ...


_BALLAST_BYTES = 16 * MIB


@dataclass(frozen=True)
class Rescued:
    """The record of a rescue. Its `str` is the line that is logged.

    phase: the phase of the first out-of-memory: forward, backward or clip. index: its micro-batch, from 0.
    before, after: the window's micro-batch sizes in the first attempt and in the last.
    attempts: the number of attempts that ran out of memory.
    kept_bytes: memory that was not freed after the failure, compared with the memory held before the window.
    """

    phase: str
    index: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    attempts: int
    kept_bytes: int

    def __str__(self) -> str:
        more = "" if self.attempts == 1 else f", and in {self.attempts - 1} smaller size{'s' if self.attempts > 2 else ''}"
        kept_text = f"; {self.kept_bytes / MIB:.0f} MiB did not come back" if self.kept_bytes > 16 * MIB else ""
        return (
            f"out of memory in {self.phase} of micro-batch {self.index + 1} of {window_notation(self.before)}{more}: "
            f"the window ran again, whole, as {window_notation(self.after)}; micro-batches stay at {max(self.after)} or less{kept_text}"
        )


class Rescuer:
    """Runs windows. A window that runs out of memory runs again in smaller micro-batches.

    micro_batch: the largest micro-batch allowed now: the plan's, or less after a rescue.
    enabled: False lets every out-of-memory through.
    grow_after: the number of windows without trouble after which the size from before a rescue is tried again; None for never.
    The number doubles each time that the size was still too large.
    together: True if other ranks run parts of the same windows.
    """

    def __init__(self, jobs: Sequence[Job], device: Device, plan: Plan, *, enabled: bool, grow_after: int | None, together: bool = False) -> None:
        self._together = together
        self._jobs, self._device, self._enabled, self._grow_after = jobs, device, enabled, grow_after
        self.follow(plan)
        self._left: list[int] = []  # sizes from before each rescue, to be tried again
        self._windows = self._quiet_windows = self._base_bytes = 0
        self._grew = self._failed = False
        self._phase, self._index = "forward", 0
        self._ballast = Ballast(device if enabled else None)
        if enabled:
            self._start = WindowStart(jobs)

    def follow(self, plan: Plan) -> None:
        """Runs windows by this plan from now on."""
        self._plan, self._left = plan, []  # sizes from before an earlier rescue may be smaller than the plan's by now
        # A rank without a share may still get samples from other ranks.
        self.micro_batch = plan.micro_batch or (plan.fleet.curves[plan.rank].most if plan.fleet is not None else 0)

    def begin(self) -> None:
        """Called once before each window, also with several jobs. Counts windows, and raises the size again if that is due."""
        self._quiet_windows = 0 if self._failed else self._quiet_windows + 1
        self._windows += 1
        self._failed = False
        if self._left and self._grow_after is not None and self._quiet_windows >= self._grow_after:
            self.micro_batch, self._quiet_windows, self._grew = self._left.pop(), 0, True
            log.info("trying micro-batches of %d again, after %d windows without trouble", self.micro_batch, self._grow_after)
        if self._enabled and (self._windows <= 2 or self._windows % 64 == 0):  # the first step allocates the optimizer state
            self._base_bytes = self._device.live_bytes()

    def run(
        self, window: Window, sizes: Sizes, attempt: Attempt, crossing: WindowVote | None = None, learner: Learner | None = None
    ) -> tuple[WindowResult, Rescued | None]:
        """Runs a window of one job, and runs it again in smaller micro-batches after an out-of-memory.

        sizes: a function from the largest size allowed to the micro-batch sizes. attempt: runs the micro-batches and the optimizer's step.
        crossing: the vote of all ranks on this window; None on one rank.
        learner: decides the sizes instead, while it learns.
        Returns the result, and the record of the rescue or None.
        Raises the exception of `attempt` if it is no out-of-memory. Raises an out-of-memory, with a note that gives the reason, if an
        optimizer has begun to step, or if not even the smallest micro-batch runs. On several ranks, raises `VoidWindow` if a rank cannot
        hold one sample of the window; the state is then the same as before the window.
        """
        before = () if learner is not None else window.runs_as(sizes(self.micro_batch))
        at_first, left_at_first = self.micro_batch, len(self._left)
        outside = sys.exc_info()[1]  # an exception that the caller is handling already; it is not examined
        if self._enabled:
            self._start.note()
        failures: list[tuple[str, int]] = []
        try:
            cut = learner.cut(window) if learner is not None else self._cut(window, sizes, self.micro_batch)
        except PlanError:
            raise
        except Exception as error:
            cut = self._cut_again(error, window, sizes, outside, alone=crossing is None)
            failures.append(("split", 0))
        result, kept_bytes = None, 0
        while result is None:
            self._phase, self._index = "forward", 0
            own_vote: int | None = None  # the vote for which the other ranks wait
            void_window: VoidWindow | None = None
            try:
                result = attempt(cut, on_phase=self._on_phase)
            except VoidWindow as void:
                void_window = void
                forget(void, self._jobs, outside)
            except Exception as error:
                self._ballast.drop()  # first, because the handling below needs memory too
                if not self._is_oom(error, outside, learner):
                    raise
                before = before or (() if learner is None else learner.sizes)
                smaller_cut = None
                if learner is not None and not self._redone(crossing):
                    learner.refuse(self._index, self._phase)  # for the next window
                if self._redone(crossing):
                    smaller_cut = self._smaller(window, sizes) if learner is None else learner.cut_again(window, self._index, self._phase)
                if smaller_cut is None:
                    note = self._why_not() if learner is None or self._phase in self._final(crossing) else f"autoaccum: {learner.why_not}"
                    self.micro_batch, self._left = at_first, self._left[:left_at_first]
                    if crossing is None or not (self._redone(crossing) and crossing.votes):
                        noted(error, note)
                        if self._enabled and self._phase not in self._final(crossing):
                            self._start.put_back()
                        raise
                    own_vote = CANNOT
                else:
                    failures.append((self._phase, self._index))
                    cut = smaller_cut
                    own_vote = AGAIN if crossing is not None and crossing.redone == "together" else None
                forget(error, self._jobs, outside)
            finally:
                self._ballast.take()
            if result is None:
                # Not inside the handler: there the exception still keeps the failed window's tensors alive.
                self._start.put_back()
                if self._device.facts.kind == "cpu":
                    steady_malloc()  # memory is scarce now, whatever the plan thought
                self._device.release()
                kept_bytes = self._device.live_bytes() - self._base_bytes
                if crossing is not None:
                    self._agree(crossing, own_vote, void_window)
        if not failures:
            return result, None
        if self._grew and self._grow_after is not None:
            self._grow_after *= 2  # the size was still too large: try it less often
        self._failed, self._grew = True, False
        after = window.runs_as(sizes(self.micro_batch)) if learner is None else learner.sizes
        rescued = Rescued(*failures[0], before, after, len(failures), kept_bytes)
        log.warning("%s", rescued)
        return result, rescued

    def _cut(self, window: Window, sizes: Sizes, most: int) -> Cut:
        if self._plan.learned_windows and window.told and window.split is None:  # nothing was decided about what nobody can cut
            return window.cut(window.sizes)
        return window.cut(sizes(most), most=most, elsewhere=self._plan.micro_tokens is None)

    def _cut_again(self, error: Exception, window: Window, sizes: Sizes, outside: BaseException | None, *, alone: bool) -> Cut:
        """The window cut smaller after the user's `split` ran out of memory. Raises `error`, with a note, if it failed for another reason or again."""
        self._phase, self._index = "split", 0
        smaller_cut = None
        if self._enabled and alone and self._is_oom(error, outside):
            forget(error, self._jobs, outside)
            self._device.release()
            smaller_cut = self._smaller(window, sizes)
        if smaller_cut is None:
            noted(error, "autoaccum: raised in split=, before the window's first micro-batch: no weight was changed")
            raise error
        return smaller_cut

    def _agree(self, crossing: WindowVote, own_vote: int | None, void_window: VoidWindow | None) -> None:
        """Sends this rank's vote to the other ranks. Raises `VoidWindow` if any rank cannot hold one sample."""
        if own_vote is not None:
            try:
                crossing.vote(own_vote)
            except VoidWindow as void:
                void_window = void
        if void_window is not None or own_vote is not None:
            crossing.void()
        if void_window is not None and void_window.out:
            self._failed = True
            raise void_window

    def _redone(self, crossing: WindowVote | None) -> bool:
        """True if this rank may run the window again after a failure in the current phase."""
        if not self._enabled or self._phase in self._final(crossing):
            return False
        return crossing is None or crossing.redone != "never"

    def _final(self, crossing: WindowVote | None) -> tuple[str, ...]:
        """The phases in which a failed window cannot run again: weights may have changed, or gradients have crossed ranks."""
        return ("step",) if crossing is None else ("sync", "clip", "step")

    def _smaller(self, window: Window, sizes: Sizes) -> Cut | None:
        """Cuts the window into the next smaller micro-batches and lowers `micro_batch` to their size. Returns None if this is not possible."""
        smallest = 2 if any(batch_norms(job.model) for job in self._jobs) else 1  # BatchNorm forbids a micro-batch of one sample
        current_sizes = window.runs_as(sizes(self.micro_batch))
        for most in arithmetic.candidate_sizes(self._plan.share, smallest=smallest)[::-1]:
            new_sizes = window.runs_as(sizes(most))
            if most >= self.micro_batch or max(new_sizes) >= max(current_sizes) or min(new_sizes) < min(smallest, *current_sizes):
                continue
            try:
                cut = self._cut(window, sizes, most)
            except Exception as error:  # micro-batches that cannot be cut, or the user's splitter failed
                if oom.verdict(error) == "oom":
                    continue
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

    def _is_oom(self, error: Exception, outside: BaseException | None, learner: Learner | None = None) -> bool:
        verdict = oom.verdict(error, outside)
        if verdict != "ask-device":
            return verdict == "oom"
        if learner is not None and learner.failed_bytes is not None:
            left_bytes, taken_bytes = learner.failed_bytes
            return oom.is_oom(error, left_bytes=left_bytes, taken_bytes=taken_bytes, outside=outside)
        try:
            live_bytes, free_bytes = self._device.live_bytes(), self._device.memory(who=False).free_bytes
        except Exception:  # a device that lost its context raises here: then the device failed, not its memory
            return False
        left_bytes = free_bytes
        if self._plan.budget_bytes:  # a plan made for a simulated card has no budget
            left_bytes = min(self._plan.budget_bytes + self._plan.headroom_bytes - live_bytes, free_bytes)
        return oom.is_oom(error, left_bytes=left_bytes, taken_bytes=live_bytes - self._base_bytes, outside=outside)

    def _on_phase(self, phase: str, index: int) -> None:
        self._phase, self._index = phase, index


class Ballast:
    """A memory reserve on a CPU. It is freed first after an out-of-memory, because the handling of the error needs memory too.

    Its pages are never touched, so it counts only under RLIMIT_DATA, the limit at which memory runs out with an exception.
    The memory use that a container counts does not include it.
    """

    def __init__(self, device: Device | None) -> None:
        self._wanted = device is not None and device.facts.kind == "cpu"
        self._mapping: mmap.mmap | None = None
        self.take()

    def take(self) -> None:
        if self._wanted and self._mapping is None:
            with suppress(OSError, MemoryError, ValueError):  # then there is no reserve
                self._mapping = mmap.mmap(-1, _BALLAST_BYTES)

    def drop(self) -> None:
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
