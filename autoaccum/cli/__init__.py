"""The command line: commands, the options of a call, reports, pictures, and the built-in demo.

It exports `main`.
It may import every room.
"""

from typing import TYPE_CHECKING

from autoaccum.doors import lazily

if TYPE_CHECKING:
    from autoaccum.cli.commands import main
else:
    __getattr__ = lazily(__name__, commands="main")
