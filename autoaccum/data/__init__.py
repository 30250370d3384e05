"""Samples become micro-batches here: nested batches are cut and joined, loaders become windows, and samplers draw whole windows.

It exports `Window`, `Windows`, `WindowSampler`, and the functions of `batches`, `lengths` and `prefetch`.
It imports the doorstep only: errors, units, oom.
"""

from typing import TYPE_CHECKING

from autoaccum.doors import lazily

if TYPE_CHECKING:
    from autoaccum.data import batches, lengths, prefetch, tokens, variety
    from autoaccum.data.learned_cut import LearnedCut
    from autoaccum.data.lengths import AtLength
    from autoaccum.data.sampler import TokenSampler, WindowSampler
    from autoaccum.data.token_units import TokenUnits, longest_sample
    from autoaccum.data.tokens import TokenGauge
    from autoaccum.data.variety import IGNORED
    from autoaccum.data.windows import Cut, Splitter, Window, Windows, counted, samples_in
else:
    __getattr__ = lazily(
        __name__,
        learned_cut="LearnedCut",
        lengths="AtLength",
        sampler="TokenSampler WindowSampler",
        token_units="TokenUnits longest_sample",
        tokens="TokenGauge",
        variety="IGNORED",
        windows="Cut Splitter Window Windows counted samples_in",
    )
