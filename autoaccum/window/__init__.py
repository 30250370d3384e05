"""The job, and one window of it: the weight of each micro-batch, the order of things, one optimizer step, and the state that is noted and put back.

It exports `Job`, `Source`, `accumulation.run` and the snapshots; trials and training both run a window through it.
It imports the doorstep and the rooms from `data` to `distributed`.
"""

from typing import TYPE_CHECKING

from autoaccum.doors import lazily

if TYPE_CHECKING:
    from autoaccum.window import accumulation, optimizer_step
    from autoaccum.window.batch_norm import RunningStats, batch_norms
    from autoaccum.window.compiled import captured, replays_graphs
    from autoaccum.window.interrupts import Interrupts
    from autoaccum.window.job import Job, as_jobs, differing, fingerprint
    from autoaccum.window.losses import PerToken, per_token, predicts_next, token_mean
    from autoaccum.window.result import PhaseCallback, WindowLoss, WindowResult
    from autoaccum.window.rng_state import RngState
    from autoaccum.window.snapshot import Snapshot, preserved, put_back_after
    from autoaccum.window.source import Source, load, parse_source
    from autoaccum.window.start import WindowStart, forget
else:
    __getattr__ = lazily(
        __name__,
        batch_norm="RunningStats batch_norms",
        compiled="captured replays_graphs",
        interrupts="Interrupts",
        job="Job as_jobs differing fingerprint",
        losses="PerToken per_token predicts_next token_mean",
        result="PhaseCallback WindowLoss WindowResult",
        rng_state="RngState",
        snapshot="Snapshot preserved put_back_after",
        source="Source load parse_source",
        start="WindowStart forget",
    )
