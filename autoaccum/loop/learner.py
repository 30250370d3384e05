"""The learner: finds the largest micro-batch in the first windows of training itself, so that nothing is rehearsed.

Micro-batches of one window may differ in size, and the peak of each one is a reading. The same search proposes sizes as for trials; a size that
runs out of memory is refused from then on, and its window runs again.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate

from autoaccum.data import Cut, LearnedCut, TokenUnits, Window, longest_sample
from autoaccum.devices import Budget, Device, Watch, make_budget, part_of_rank, steady_malloc, within_part
from autoaccum.distributed import Fleet
from autoaccum.errors import AutoaccumWarning, NothingFits
from autoaccum.loop import learned_cache, learned_plan, optimizer_state
from autoaccum.plan import Plan, arithmetic
from autoaccum.probe import Limits, Outcome, Reading, Request, refusals, search
from autoaccum.units import in_words
from autoaccum.window import Job, PhaseCallback, batch_norms

log = logging.getLogger("autoaccum")
_SECOND = 4  # times the first micro-batch, for the others of a first window that is cut before anything is known
_LONE_TRIES = 2  # more, of a window in the smallest micro-batches
_MORE = 1.05  # times the budget under which a size ran out of memory, from where on it is tried again
_WHOLE_WINDOWS = 2  # that the fewest steps must have run before nothing more is learned


class Learner:
    """Decides the micro-batches of the first windows, from the peaks of those that ran.

    jobs: those that train. request: the target, as `tune` takes it. limits: the limits of `request`, or those of a device that ranks share.
    fleet, rank: the ranks that train together, and which this one is; None for one rank. Over ranks all sizes are tried, because shares follow
    from what each rank can hold. cache: start from what an earlier run of the same job has learned on this device, and keep what this one learns; one
    rank only.
    plan: what is known so far. It has settled when `plan.learning` is False.

    With a target in tokens, micro-batches are counted in units of the longest sample of the first window, as a plan of `tune` counts them in units of
    the longest sample that it measured.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        device: Device,
        request: Request,
        *,
        limits: Limits | None = None,
        fleet: Fleet | None = None,
        rank: int = 0,
        cache: bool = False,
    ) -> None:
        self._limits, self._fleet, self._rank = limits or request.limits, fleet, rank
        self._smallest = 2 if any(batch_norms(job.model) for job in jobs) else 1
        self._in_tokens = request.target_tokens is not None
        if self._in_tokens:
            request = replace(request, target_batch=self._smallest, sample_tokens=1)  # until samples are seen
        self._has_fixed_target = fleet is None and not self._in_tokens  # True if full windows are all of one size
        self._whole = request.samples if fleet is None else fleet.shares[rank]  # the samples of this rank in a full window
        self._jobs, self._device, self._request, self._target = jobs, device, request, request.samples
        device.prepare()
        if fleet is None:
            self._candidates = arithmetic.candidate_sizes(self._target, smallest=self._smallest, most=request.max_micro_batch)
        else:
            self._candidates = arithmetic.sizes_over_ranks(self._target, smallest=self._smallest, most=request.max_micro_batch)
        if not self._has_fixed_target:
            self._target *= 2  # no micro-batch is the whole window, so gradients are always beside
        # Micro-batches of the first windows differ anyway, so sizes that do not divide the target are tried on the way to one that does.
        self._divisors = arithmetic.candidate_sizes(self._target, smallest=self._smallest, most=request.max_micro_batch, equal=True) if request.equal else []
        if not self._candidates or (request.equal and not self._divisors):
            raise refusals.nothing_allowed(self._target, request.max_micro_batch, [name for job in jobs for name in batch_norms(job.model)])
        self._gradient_bytes = max(job.gradient_bytes() for job in jobs)
        self._enforces = device.enforces and (device.facts.kind != "cpu" or request.memory_limit is not None)
        self._started = time.monotonic()
        self._floor_bytes = device.held_bytes() if device.shared_with_host else 0
        self._readings: dict[tuple[int, bool], Reading] = {}  # by size, and True if gradients were held beside it; in the order in which they came
        self._before_state: set[tuple[int, bool]] = set()  # readings from before the optimizer's state was there
        self._state_bytes = 0 if optimizer_state.resident_bytes(jobs) else optimizer_state.expected_bytes(jobs)  # that those readings lack
        self._stale: set[tuple[int, bool]] = set()  # readings that the next one of their size replaces, also a smaller one
        self._has_stepped = not self._state_bytes
        self._base_before: int | None = None  # what was held beside the last micro-batch before the first step
        self._windows = self._whole_windows = self._fixed_windows = self._looked = 0
        self._lone_tries = 0
        self._below = 2**63  # the smallest size that ran out in the window that runs
        self._peak_bytes = self._window_peak_bytes = self._held_bytes = 0
        self._beforehand = self._given = self._is_fixed = self._is_short = self._has_settled = False
        self._lazy: LearnedCut | None = None  # the window that runs, if it is cut while it runs
        self._largest_part = 0  # of all windows, in samples or in units
        self._has_unit, self._units_before = False, 0
        self._is_limited = False  # True once parts of windows could not be joined
        self._units: TokenUnits | None = None  # of the window that runs
        self._cut: Sequence[int] = ()  # the sizes of the window that runs, as far as they are decided, in samples or in units
        self._samples: Sequence[int] = ()  # the same in samples
        self._window_retries = 0
        self.failed_bytes: tuple[int, int] | None = None  # left and taken, where the last attempt failed
        self._failed_budget = 0  # the budget of then
        self._part_bytes = part_of_rank(device, self._limits.sharing_ranks)
        self.budget = refusals.enough(self._budget())
        if device.shared_with_host and self._enforces and self.budget.budget_bytes <= self._floor_bytes:
            raise NothingFits(
                f"this process holds {in_words(self._floor_bytes)} before the first sample, and the budget is {in_words(self.budget.budget_bytes)}: raise memory_limit, "
                "which counts the whole process"
            )
        if norms := [name for job in jobs for name in batch_norms(job.model)]:
            warnings.warn(
                f"{refusals.norms_in_words(norms)} sees micro-batches of unlike sizes while the plan is learned, and not the whole batch: train with a saved "
                "plan where its statistics matter",
                AutoaccumWarning,
                stacklevel=4,
            )
        self._cache = learned_cache.of(jobs, device) if cache else None
        self._cache_was_wrong = False
        if self._cache is not None:
            earlier = self._cache.known(self._target, self.budget.budget_bytes)
            self._readings = {(each.micro_batch, True): each for each in earlier if each.micro_batch <= self._target}
        self.plan = self._planned(self._start())

    @property
    def why_not(self) -> str:
        """The sentence for a job of which not even the smallest micro-batch runs."""
        samples = f"{self._candidates[0]} sample{'s' if self._candidates[0] > 1 else ''}"
        return (
            f"not even a micro-batch of {samples} fits into {in_words(self.budget.budget_bytes)}: raise memory_limit if you gave one, or use autocast to bfloat16, "
            "activation checkpointing, an optimizer with less state, or shorter samples"
        )

    @property
    def most(self) -> int:
        """The largest micro-batch that is known to fit."""
        return self._start()

    def follow(self, fleet: Fleet) -> None:
        """Learns with these shares from now on."""
        self._fleet, self._whole, self._whole_windows = fleet, fleet.shares[self._rank], 0
        self.plan = self._planned(self._start())

    # -- a window

    def begin(self, *, beforehand: bool, given: bool) -> None:
        """Called before each window.

        beforehand: True if all micro-batches must be known before the first one runs. given: True if its parts are the micro-batches.
        """
        self._lone_tries = 0
        self._beforehand, self._given, self._lazy, self._below, self._is_fixed, self._is_short = beforehand, given, None, 2**63, False, False
        if self._device.facts.kind == "cpu":
            steady_malloc()  # what the C library keeps of earlier sizes goes back
        self.budget = self._budget()
        self._windows += self.plan.learning
        self._held_bytes = self._device.live_bytes()

    def cut(self, window: Window) -> Cut:
        """The window's micro-batches. Parts that only the user can cut are cut before the window runs, others while it runs."""
        self._units = self._measured(window) if self._in_tokens else None
        if self._given or (window.told and window.split is None):
            self._samples, self._cut, self._is_fixed = window.sizes, self._as_counted(window.sizes), True
            return list(zip(window.parts, window.sizes))
        self._largest_part = max(self._largest_part, *self._as_counted(window.sizes))
        if window.split is None and not self._beforehand:
            settled = self._search().propose(self.budget.budget_bytes) is None
            self._lazy = LearnedCut(window, self._next_size, units=self._units, ahead=settled, is_limited=self._is_limited)
            self._cut, self._samples = self._lazy.measures, self._lazy.sizes
            return self._lazy
        sizes: list[int] = []
        cut: list[int] = []
        ends = list(accumulate(window.sizes))
        while (start := sum(sizes)) < window.samples:
            asked = self._next_size(len(sizes), window.samples - start if self._units is None else self._units.left(start))
            most = asked if self._units is None else self._units.samples(start, asked)
            left = next(end for end in ends if end > start) - start
            in_parts = window.told or self._is_limited  # parts that cannot be joined are cut evenly
            self._is_short = self._is_short or (in_parts and most > left)
            sizes.append(-(-left // -(-left // min(most, left))) if in_parts else most)
            cut.append(asked if sizes[-1] == most else self._as_counted(sizes)[-1])
        pieces = window.cut(sizes, most=max(sizes))
        run = [size for _, size in pieces] if isinstance(pieces, list) else list(getattr(pieces, "sizes", sizes))
        self._is_short = self._is_short or run != sizes
        self._cut, self._samples = cut if run == sizes else self._as_counted(run), run
        return pieces

    def _as_counted(self, sizes: Sequence[int]) -> Sequence[int]:
        """Consecutive pieces of the window, of so many samples, as they are counted here: in samples, or in units of tokens."""
        units, starts = self._units, accumulate(sizes, initial=0)
        return sizes if units is None else [units.of(start, size) for start, size in zip(starts, sizes)]

    def _measured(self, window: Window) -> TokenUnits:
        """The window in units of tokens. The first one decides what a unit is, and the largest so far how many units a full window has."""
        unit = self._request.sample_tokens if self._has_unit else longest_sample(window)
        self._has_unit = True
        units = TokenUnits(window, unit, smallest=self._smallest)
        if units.left(0) > self._whole or unit != self._request.sample_tokens:
            self._whole = max(units.left(0), self._smallest)
            self._target = 2 * self._whole
            self._request = replace(self._request, target_batch=self._whole, sample_tokens=unit)
            sizes = arithmetic.candidate_sizes(self._whole, most=self._request.max_micro_batch)
            self._candidates = [size for size in sizes if size >= self._smallest] or [self._smallest]
        return units

    def goes_on_with(self, window: Window) -> bool:
        """True if a window has so many tokens that it could run in larger micro-batches than those that settled, so that learning goes on with it."""
        if not self._in_tokens or not self._has_unit:
            return False
        found, self._units = self._largest_fit(), TokenUnits(window, self._request.sample_tokens)
        if (max(self._as_counted(window.sizes)) if self._is_limited else self._units.left(0)) <= found:
            return False
        if found < self._whole and self._search().propose(self.budget.budget_bytes) is None:
            return False
        self._whole_windows = 0
        self.plan = self._planned(self._start())
        return True

    @property
    def sizes(self) -> tuple[int, ...]:
        """The samples of the micro-batches of the window that runs, as far as they are decided."""
        return tuple(self._samples)

    @contextmanager
    def watching(self, on_phase: PhaseCallback) -> Iterator[PhaseCallback]:
        """A context in which a window's peaks are read and the budget is enforced until the optimizer steps, whose memory nothing can give back."""
        held_before = self._device.live_bytes()
        with self._device.watch() as watch, ExitStack() as cap:
            if self._enforces:
                cap.enter_context(self._device.capped(self.budget.budget_bytes))
            try:
                yield _Listener(self, watch, self._device.live_bytes, cap, on_phase)
            except Exception:
                self.failed_bytes = (self.budget.budget_bytes - watch.peak_bytes(), watch.peak_bytes() - held_before)
                cap.close()
                self._failed_budget = min(self._budget().budget_bytes, self.budget.budget_bytes)  # a neighbour may have taken memory meanwhile
                raise
            self._ran(watch)

    @contextmanager
    def unguarded(self) -> Iterator[tuple[Watch, Callable[[], int]]]:
        """A context in which a window runs in somebody else's loop, with the watch of its peaks and the function that says what is held."""
        with self._device.watch() as watch:
            yield watch, self._device.live_bytes
            self._ran(watch)

    def _ran(self, watch: Watch) -> None:
        self._window_peak_bytes, self._window_retries = watch.peak_bytes(), watch.retries()
        self._peak_bytes = max(self._peak_bytes, self._window_peak_bytes)

    def has_read(self, index: int) -> bool:
        """True if the peak of a micro-batch of this size is known."""
        return (self._cut[index], index > 0 or self._cut[index] == self._target) in self._readings

    def read(self, index: int, peak_bytes: int, base_bytes: int | None) -> None:
        """Takes the peak of a micro-batch of the window that runs. base_bytes: what was held when it began."""
        if index >= len(self._cut):
            return
        size, beside = self._cut[index], index > 0 or self._cut[index] == self._target
        earlier = None if (size, beside) in self._stale else self._readings.get((size, beside))
        self._stale.discard((size, beside))
        if earlier is not None and (earlier.activation_bytes or 0) >= peak_bytes and ((size, beside) not in self._before_state or not self._has_stepped):
            return
        if index and base_bytes is not None:
            if not self._has_stepped:
                self._base_before = base_bytes
            elif self._base_before is not None:  # with what else the first step left, such as libraries that it imported
                self._state_bytes, self._base_before = max(base_bytes - self._base_before, 0), None
        if self._lazy is not None and self._units is not None and base_bytes is not None:  # what a full one of this size would take
            peak_bytes = base_bytes + int((peak_bytes - base_bytes) / self._lazy.fills[index])
        if self._has_stepped:
            self._before_state.discard((size, beside))
        else:
            self._before_state.add((size, beside))
        # The first micro-batch of a window has no gradients beside it.
        steps = 1 if size == self._target else 2
        self._readings[(size, beside)] = Reading(
            size,
            steps,
            "fits",
            "step",
            None,
            0.0,
            base_bytes=base_bytes if index else None,
            activation_bytes=peak_bytes + (0 if beside else self._gradient_bytes),
            budget_bytes=self.budget.budget_bytes,
        )

    def cut_again(self, window: Window, index: int, phase: str) -> Cut | None:
        """The window in smaller micro-batches, after micro-batch `index` ran out of memory in `phase`; None if nothing smaller is left to try."""
        if not self.refuse(index, phase) or (window.told and window.split is None):
            return None
        self._given = self._is_fixed = False
        return self.cut(window)

    def refuse(self, index: int, phase: str) -> bool:
        """Notes that micro-batch `index` of the window ran out of memory. Returns False if nothing smaller is left to try."""
        sizes = self._cut
        if self._lazy is not None and len(self._lazy.decided) > len(self._lazy.sizes):  # it ran out where the next micro-batch was put together
            sizes, index = self._lazy.decided, len(self._lazy.decided) - 1
        if not sizes:
            return False
        size = sizes[min(index, len(sizes) - 1)]
        self._refused(size, "oom", phase, self._failed_budget or self.budget.budget_bytes)
        self._below = min(self._below, size)
        if self._device.shared_with_host:  # what the C library kept was in the peaks so far, and has been given back
            self._stale = {key for key, each in self._readings.items() if each.fits}
        if self._below > (self._smallest if self._smallest < 2 else self._smallest + 1):
            return True
        self._lone_tries += 1  # it may have been a neighbour's doing
        return self._lone_tries <= _LONE_TRIES

    def end(self, samples: int, *, stepped: bool = True) -> None:
        """Called after each window. samples: those of the window. stepped: False if a scaler skipped the optimizers' step."""
        if not self.plan.learning:
            return
        if not self._has_stepped and not stepped:  # what the optimizer's state takes is not there yet
            self.plan = self._planned(self._start())
            return
        if not self._has_stepped:
            self._has_stepped = True
            self._state_bytes = optimizer_state.resident_bytes(self._jobs)
            if not self._device.shared_with_host:  # what a step leaves is exact there
                self._state_bytes = max(self._state_bytes, self._device.live_bytes() - self._held_bytes)
        found = self._start()
        whole = self._whole if self._units is None else self._units.left(0)  # what a full window has
        planned = self._even(whole, found)
        proposal = self._search().propose(self.budget.budget_bytes)
        searching = proposal is not None and (self._has_fixed_target or proposal <= whole)
        as_planned = tuple(self._cut) == planned if self._units is None else set(self._cut[:-1]) <= {found} and max(self._cut) <= found
        if self._is_short or (self._lazy is not None and self._lazy.is_limited):
            self._say_that_parts_limit()
            searching = searching and found < self._largest_part
            as_planned = as_planned or max(self._cut) <= found or not searching
        is_smaller = samples < whole if self._units is None else 2 * whole < self._units_before  # at the end of an epoch; it says nothing
        self._units_before = whole
        self._whole_windows = self._whole_windows if is_smaller else self._whole_windows + 1 if as_planned else 0
        if self._whole_windows == 1:  # the plan's peak is that of its own micro-batches, not of larger ones that were tried
            self._peak_bytes = self._window_peak_bytes
        if self._whole_windows > 1 and self._window_retries:
            self._refused(found, "over-budget", "step", self.budget.budget_bytes)  # the allocator flushes its cache in every window, which is slow
            self._whole_windows = 0
        settled = not searching and not is_smaller and self._whole_windows >= _WHOLE_WINDOWS
        if self._is_fixed:  # micro-batches that are given, or cannot be cut: nothing is decided here
            self._fixed_windows += 1
            found, settled = max(self._cut, default=found), self._fixed_windows > _WHOLE_WINDOWS
            self.plan = self._planned(found, learning=not settled)
        else:
            self.plan = self._planned(self._start(), learning=not settled)
        if settled and self._cache is not None:
            if self._cache_was_wrong:
                self._cache.forget()
            self._cache.keep(self._known(), self._target, self.budget.budget_bytes)
        if settled and self._fleet is None:
            log.log(logging.INFO if self._has_settled else logging.WARNING, "%s", learned_plan.settled(self.plan))
            self._has_settled = True
            micro_batches = max((each.peak_bytes or 0 for each in self._known() if each.micro_batch <= self.plan.micro_batch), default=0)
            if self._peak_bytes > max(micro_batches, self.budget.budget_bytes):
                log.warning("%s", learned_plan.step_over_budget(self.plan))

    def _say_that_parts_limit(self) -> None:
        if not self._is_limited:
            self._is_limited = True
            log.warning(
                "the loader's batches cannot be joined (padded to unlike lengths), so no micro-batch is larger than one of them, here %d%s: give the loader "
                "larger batches, or %s",
                self._largest_part,
                f" x {self._request.sample_tokens} tokens" if self._in_tokens else "",
                "tune first" if self._in_tokens else "take DataLoader(dataset, batch_sampler=loop.plan.batch_sampler(dataset))",
            )

    def goes_on(self, micro_batch: int) -> bool:
        """True if the memory of now allows fewer steps than micro-batches of `micro_batch` take, so that learning goes on."""
        self.budget = self._budget()
        self._looked += 1
        tries_all = self._looked & (self._looked - 1) == 0  # the first, second, fourth, eighth time: what ran out may have been somebody else's doing
        # An out-of-memory says nothing about a larger budget.
        for key in [
            key for key, each in self._readings.items() if not each.fits and (tries_all or (each.budget_bytes or 0) * _MORE < self.budget.budget_bytes)
        ]:
            del self._readings[key]
        now = self._search()
        if max(now.propose(self.budget.budget_bytes) or 0, now.result(self.budget.budget_bytes).micro_batch) <= micro_batch:
            return False
        self._whole_windows = 0
        self.plan = self._planned(self._start())
        log.info("memory has become free: micro-batches of more than %d are tried", micro_batch)
        return True

    # -- what is known

    def _next_size(self, index: int, remaining: int) -> int:
        proposal, found = self._search().propose(self.budget.budget_bytes), self._largest_fit()
        if proposal == self._target:
            size = self._target if index == 0 and remaining == self._target else found or self._candidates[0]
        elif proposal is None or (index == 0 and found and (self._has_fixed_target or proposal + found <= remaining)):
            size = self._even(remaining, min(self._start(), found or self._candidates[0]))[0]
        elif index and not any(beside for _, beside in self._readings):
            size = _SECOND * self._candidates[0] if self._beforehand else self._candidates[0]  # once more, with gradients and all that the first one loaded
        else:
            size = proposal
        return self._without_a_lone_sample(max(min(size, remaining, self._below - 1), 1), remaining)

    def _even(self, whole: int, most: int) -> tuple[int, ...]:
        """The micro-batches of a window by what is known so far. Those that are counted in tokens are filled one after the other, as the plan fills them."""
        steps = math.ceil(whole / most)
        if not whole or not self._in_tokens:
            return arithmetic.micro_batches(whole, steps) if whole else ()
        return (*[most] * (steps - 1), whole - most * (steps - 1))

    def _without_a_lone_sample(self, size: int, remaining: int) -> int:
        """BatchNorm forbids a micro-batch of one sample."""
        if self._smallest < 2 or remaining - size != 1 or self._in_tokens:
            return size
        return size - 1 if size > 2 else remaining

    def _search(self) -> search.Search:
        return search.Search(
            self._target,
            self._candidates,
            budget=self.budget.budget_bytes,
            gradient_bytes=self._gradient_bytes,
            cautious=True,
            start=self._smallest,
            known=self._known(),
        )

    def _known(self) -> list[Reading]:
        """The readings, each as it would be with the optimizer's state beside it."""
        known = []
        has_gradients = any(beside for _, beside in self._readings)
        beside_most = max((size for (size, beside), each in self._readings.items() if beside and each.fits), default=0)
        for key, reading in self._readings.items():
            if has_gradients and not key[1] and (self._has_fixed_target or key[0] <= beside_most):
                continue  # the first micro-batch of a window says less than those that came later
            if reading.activation_bytes is not None:
                lacking = self._state_bytes if key in self._before_state else 0
                peak = reading.activation_bytes + lacking
                fits = peak <= self.budget.budget_bytes
                base = None if reading.base_bytes is None else reading.base_bytes + lacking
                reading = replace(reading, base_bytes=base, activation_bytes=peak, peak_bytes=peak, outcome="fits" if fits else "over-budget")
            known.append(reading)
        return known

    def _largest_fit(self) -> int:
        found = self._search().result(self.budget.budget_bytes).micro_batch
        if self._has_fixed_target and not self._is_limited:
            return found
        return max([found, *(each.micro_batch for each in self._known() if each.fits)])  # a window or a part may lie between the sizes that are tried

    def _start(self) -> int:
        """The micro-batch of a window by what is known so far: the largest that fits, or the largest divisor of the target that does."""
        fit = self._largest_fit() or self._candidates[0]
        return max((size for size in self._divisors if size <= fit), default=self._divisors[0]) if self._divisors else fit

    def _refused(self, size: int, outcome: Outcome, phase: str, budget_bytes: int) -> None:
        # What fitted before at this size or above it says nothing any more.
        for key in [key for key, reading in self._readings.items() if key[0] >= size and reading.fits]:
            self._cache_was_wrong = self._cache_was_wrong or self._readings[key].cached
            del self._readings[key]
        self._readings[(size, True)] = Reading(size, 1 if size == self._target else 2, outcome, phase, None, 0.0, budget_bytes=budget_bytes)

    def _budget(self) -> Budget:
        limits, memory = self._limits, self._device.memory(who=False)
        memory = within_part(memory, self._part_bytes)
        return make_budget(
            memory,
            kind=self._device.facts.kind,
            limit_bytes=limits.memory_bytes,
            headroom=limits.headroom,
            floor_bytes=self._floor_bytes,
        )

    def _planned(self, micro_batch: int, *, learning: bool = True) -> Plan:
        return learned_plan.of(
            self._jobs,
            self._device,
            self._request,
            self.budget,
            micro_batch,
            self._known(),
            peak_bytes=self._peak_bytes or None,
            seconds=time.monotonic() - self._started,
            windows=self._windows,
            learning=learning,
            fleet=self._fleet,
            rank=self._rank,
        )


class _Listener:
    """Follows the phases of a window: reads the peak of each micro-batch, and lifts the cap before the optimizer steps."""

    def __init__(self, learner: Learner, watch: Watch, live_bytes: Callable[[], int], cap: ExitStack, on_phase: PhaseCallback) -> None:
        self._learner, self._watch, self._live_bytes, self._cap, self._on_phase = learner, watch, live_bytes, cap, on_phase
        self._last, self._base_bytes = -1, 0

    def __call__(self, phase: str, index: int) -> None:
        if phase == "left out":  # it has not run to its end
            self._watch.lap_bytes()
            self._last = -1
        elif phase == "forward":
            lap_bytes = self._watch.lap_bytes()
            if self._last >= 0:
                self._learner.read(self._last, lap_bytes, self._base_bytes)
            self._last, self._base_bytes = index, self._live_bytes()
        elif phase in ("sync", "clip") and self._last >= 0:
            self._learner.read(self._last, self._watch.lap_bytes(), self._base_bytes)
            self._last = -1
        if phase == "step":
            self._cap.close()
        self._on_phase(phase, index)
