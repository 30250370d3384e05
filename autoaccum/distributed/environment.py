"""What torchrun told us. No torch here."""

from __future__ import annotations

import os
from dataclasses import dataclass

from autoaccum.errors import UsageError


@dataclass(frozen=True)
class Launched:
    """What torchrun says in the environment: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables."""

    rank: int
    world_size: int
    local_rank: int


def launched() -> Launched | None:
    """This process as torchrun started it; None without torchrun, or with one rank. Raises `UsageError` for values that make no sense."""
    told = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if told["RANK"] is None or told["WORLD_SIZE"] is None:
        return None
    try:
        found = Launched(int(told["RANK"]), int(told["WORLD_SIZE"]), int(told["LOCAL_RANK"] or 0))
    except ValueError:
        raise UsageError(f"the environment has {', '.join(f'{name}={value!r}' for name, value in told.items())}: these must be whole numbers") from None
    return found if found.world_size > 1 else None
