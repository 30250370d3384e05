"""A job on tensors that have shapes and no memory: `recording` writes down what its windows allocate and free, as a `Tape`.

It exports `recording`, its `Tracer`, and the switch to CUDA tensors without a card.
It imports the doorstep, `data`, `simulate` and `window`.
"""

from typing import TYPE_CHECKING

from autoaccum.doors import lazily

if TYPE_CHECKING:
    from autoaccum.trace.draws import Draws
    from autoaccum.trace.fake import PhantomMode, fake_cuda, quieten_torch, quieten_transformers
    from autoaccum.trace.operator_work import OperatorWork
    from autoaccum.trace.substitution import Substitution
    from autoaccum.trace.tracer import Tracer, recording
    from autoaccum.trace.unknown_values import last_line
else:
    __getattr__ = lazily(
        __name__,
        draws="Draws",
        fake="PhantomMode fake_cuda quieten_torch quieten_transformers",
        operator_work="OperatorWork",
        substitution="Substitution",
        tracer="Tracer recording",
        unknown_values="last_line",
    )
