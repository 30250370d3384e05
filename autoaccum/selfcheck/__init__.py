"""The self-check: small fixed jobs by which a card, and what autoaccum says of it, are compared in some minutes.

It exports `run_selfcheck`.
It imports the doorstep and the rooms from `simulate` to `virtual`.
"""

from typing import TYPE_CHECKING

from autoaccum.doors import lazily

if TYPE_CHECKING:
    from autoaccum.selfcheck.run import run_selfcheck
else:
    __getattr__ = lazily(__name__, run="run_selfcheck")
