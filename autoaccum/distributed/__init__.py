"""Several ranks: what torchrun set in the environment, how ranks agree, who carries gradients between them, and how much of a window each rank gets.

It exports `Ranks`, `Fleet`, the engines, and the vote on a window.
It imports the doorstep, `data`, `simulate` and `devices`.
"""

from typing import TYPE_CHECKING

from autoaccum.doors import lazily

if TYPE_CHECKING:
    from autoaccum.distributed import engines, ranks
    from autoaccum.distributed.announcement import RankTeam, WindowAnnouncement
    from autoaccum.distributed.changing_shares import ChangingShares
    from autoaccum.distributed.engines import Engine, unwrapped
    from autoaccum.distributed.environment import launched
    from autoaccum.distributed.fleet import Fleet
    from autoaccum.distributed.pace import Pace
    from autoaccum.distributed.ranks import Ranks, host
    from autoaccum.distributed.shares import equal_share, solve
    from autoaccum.distributed.speed_curves import AffineCurve
    from autoaccum.distributed.timings import Timing, alike, fitted
    from autoaccum.distributed.window_vote import AGAIN, CANNOT, VoidWindow, WindowVote
else:
    __getattr__ = lazily(
        __name__,
        announcement="RankTeam WindowAnnouncement",
        changing_shares="ChangingShares",
        engines="Engine unwrapped",
        environment="launched",
        fleet="Fleet",
        pace="Pace",
        ranks="Ranks host",
        shares="equal_share solve",
        speed_curves="AffineCurve",
        timings="Timing alike fitted",
        window_vote="AGAIN CANNOT VoidWindow WindowVote",
    )
