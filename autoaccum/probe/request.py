"""The user's request: the target batch, limits and options, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from autoaccum.errors import UsageError, in_brief
from autoaccum.probe.readings import Limits
from autoaccum.units import MIB, in_words, parse_headroom, parse_size

_MOST_SAMPLES = 2**31 - 1
_MOST_OF_LARGEST = 1_000_000
Objective = Literal["fewest-steps", "throughput"]


@dataclass(frozen=True)
class Request:
    """A request for a plan. Raises `UsageError` for values that cannot be used.

    memory_limit: bytes, or a size in words. headroom: a size, or a percentage of the budget.
    equal: only micro-batches that divide the target batch. largest: search the exact largest micro-batch.
    target_tokens: the effective batch in tokens, instead of `target_batch`. sample_tokens: the tokens of one of the longest samples, once
    it is known; `target_batch` is then the number of such samples that have the tokens.
    lockstep: the same number of micro-steps on every rank. trial_s: of a command, as in `Limits`. evaluate: also search the largest batch of evaluation, up to `max_eval_batch`.
    """

    target_batch: int | None = None
    memory_limit: int | str | None = None
    headroom: int | str = "3%"
    max_micro_batch: int | None = None
    equal: bool = False
    largest: bool = False
    timeout_s: float | None = None
    lockstep: bool = False
    objective: Objective = "fewest-steps"
    evaluate: bool = False
    max_eval_batch: int = 2**63 - 1
    target_tokens: int | None = None
    sample_tokens: int = 0
    trial_s: float | None = None
    limits: Limits = field(init=False)

    def __post_init__(self) -> None:
        if self.target_batch is None and self.target_tokens is None:
            raise UsageError("how much one optimizer step sees is missing: give target_batch, in samples, or target_tokens")
        if self.target_tokens is not None and self.target_batch is not None and not self.sample_tokens:
            raise UsageError(f"target_batch={self.target_batch} and target_tokens={self.target_tokens} both say how much one step sees: give one")
        if self.target_tokens is not None and (isinstance(self.target_tokens, bool) or not isinstance(self.target_tokens, int) or self.target_tokens < 1):
            raise UsageError(f"target_tokens must be a whole number of tokens, at least 1, not {in_brief(self.target_tokens)}")
        if self.target_tokens is not None and self.target_tokens >= 2**63:
            raise UsageError(f"target_tokens of {in_brief(self.target_tokens)} is more than anyone trains on in one step: give less than 2**63")
        for name, value in (("target_batch", self.target_batch), ("max_micro_batch", self.max_micro_batch)):
            if (value is not None) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number of samples, at least 1, not {in_brief(value)}")
            if value is not None and value > _MOST_SAMPLES:
                raise UsageError(f"{name} of {in_brief(value)} is more samples than anyone trains on in one step: give at most {_MOST_SAMPLES}")
        if self.largest and min(self.target_batch or 0, self.max_micro_batch or _MOST_SAMPLES) > _MOST_OF_LARGEST:
            raise UsageError(f"largest looks at every size, up to {self.target_batch} here: give max_micro_batch of at most {_MOST_OF_LARGEST}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise UsageError(f"timeout_s must be more than 0 seconds, not {self.timeout_s!r}")
        if self.trial_s is not None and not self.trial_s > 0:
            raise UsageError(f"trial_s must be more than 0 seconds, not {self.trial_s!r}")
        if self.objective not in get_args(Objective):
            raise UsageError(f"objective must be {' or '.join(get_args(Objective))}, not {self.objective!r}")
        if self.largest and self.objective == "throughput":
            raise UsageError("the largest micro-batch and the fastest one are two questions: give either largest or the objective throughput")
        limit = None if self.memory_limit is None else parse_size(self.memory_limit)
        if limit is not None and limit < MIB:
            raise UsageError(f"a memory limit of {self.memory_limit} is {in_words(limit)}, less than any process takes: did you mean {self.memory_limit}MiB?")
        parse_headroom(self.headroom, limit or 2**63)  # raises for a wrong headroom before anything is built
        object.__setattr__(self, "limits", Limits(limit, self.headroom, self.timeout_s, self.trial_s, per_token=self.target_tokens is not None))

    @property
    def samples(self) -> int:
        """The target batch in samples; for a target in tokens it is known only after `in_samples`."""
        assert self.target_batch is not None
        return self.target_batch

    def in_samples(self, sample_tokens: Callable[[], int]) -> Request:
        """The request with a target batch in samples. sample_tokens: returns the tokens of one of the longest samples."""
        if self.target_tokens is None or self.sample_tokens:
            return self
        tokens = sample_tokens()
        return replace(self, target_batch=math.ceil(self.target_tokens / tokens), sample_tokens=tokens)
