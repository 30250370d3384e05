"""The rank and world size of this process, from torchrun's environment variables. This file does not import torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from autoaccum.errors import UsageError


@dataclass(frozen=True)
class Launched:
    """The values that torchrun sets in the environment: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables."""

    rank: int
    world_size: int
    local_rank: int


def launched() -> Launched | None:
    """The values of this process; None without torchrun, or with one rank. Raises `UsageError` if a value is not a whole number."""
    variables = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if variables["RANK"] is None or variables["WORLD_SIZE"] is None:
        return None
    try:
        launch = Launched(int(variables["RANK"]), int(variables["WORLD_SIZE"]), int(variables["LOCAL_RANK"] or 0))
    except ValueError:
        raise UsageError(f"the environment has {', '.join(f'{name}={value!r}' for name, value in variables.items())}: these must be whole numbers") from None
    if launch.world_size > 1 and not 0 <= launch.rank < launch.world_size:
        raise UsageError(
            f"the environment has RANK={launch.rank} and WORLD_SIZE={launch.world_size}: ranks are counted from 0; unset both, or start with torchrun"
        )
    return launch if launch.world_size > 1 else None


def restart_hazard() -> str:
    """A sentence if workers that torchrun starts again would hang, because they share a store with the life before; "" otherwise.

    https://github.com/pytorch/pytorch/issues/135712
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    shares = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1"
    if not shares or not restarts.isdigit() or not int(restarts):
        return ""
    return (
        f"torchrun may start workers again ({restarts} times), and with torch's default they then look for each other at the addresses of the life before, and hang: "
        "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
    )
