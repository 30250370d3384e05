"""The user's request: the target batch, limits and options, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from autoaccum.errors import UsageError
from autoaccum.probe.readings import Limits
from autoaccum.units import MIB, in_words, parse_headroom, parse_size

Objective = Literal["fewest-steps", "throughput"]


@dataclass(frozen=True)
class Request:
    """A request for a plan. Raises `UsageError` for values that cannot be used.

    memory_limit: bytes, or a size in words. headroom: a size, or a percentage of the budget.
    equal: only micro-batches that divide the target batch. largest: search the exact largest micro-batch.
    lockstep: the same number of micro-steps on every rank. evaluate: also search the largest batch of evaluation, up to `max_eval_batch`.
    """

    target_batch: int
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
    limits: Limits = field(init=False)

    def __post_init__(self) -> None:
        for name, value in (("target_batch", self.target_batch), ("max_micro_batch", self.max_micro_batch)):
            if (value is not None or name == "target_batch") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number of samples, at least 1, not {value!r}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise UsageError(f"timeout_s must be more than 0 seconds, not {self.timeout_s!r}")
        if self.objective not in get_args(Objective):
            raise UsageError(f"objective must be {' or '.join(get_args(Objective))}, not {self.objective!r}")
        if self.largest and self.objective == "throughput":
            raise UsageError("the largest micro-batch and the fastest one are two questions: give either largest or the objective throughput")
        limit = None if self.memory_limit is None else parse_size(self.memory_limit)
        if limit is not None and limit < MIB:
            raise UsageError(f"a memory limit of {self.memory_limit} is {in_words(limit)}, less than any process takes: did you mean {self.memory_limit}MiB?")
        parse_headroom(self.headroom, limit or 2**63)  # raises for a wrong headroom before anything is built
        object.__setattr__(self, "limits", Limits(limit, self.headroom, self.timeout_s))
