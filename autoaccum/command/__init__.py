"""A foreign command as a job: its words with placeholders, one run of it under a cap, and the `Rehearser` whose trials are such runs.

It exports `Command`, `RanksFound`, `Template`, `copies_of` and `launched_ranks`.
It imports the doorstep, `devices` and `probe`.
"""

from typing import TYPE_CHECKING

from autoaccum.doors import lazily

if TYPE_CHECKING:
    from autoaccum.command.config_copies import ConfigCopy, copies_of
    from autoaccum.command.rehearser import Command, RanksFound
    from autoaccum.command.template import Template, launched_ranks
else:
    __getattr__ = lazily(__name__, config_copies="ConfigCopy copies_of", rehearser="Command RanksFound", template="Template launched_ranks")
