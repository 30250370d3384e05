"""A GPU's memory without the GPU: a `Tape` says what a window allocates, `replay` runs it through the caching allocator's rules, and `timeline` shows it step by step.

It exports these, their records, and the GPU `profiles`.
It imports the doorstep and `data`.
"""

from typing import TYPE_CHECKING

from autoaccum.doors import lazily

if TYPE_CHECKING:
    from autoaccum.simulate import kernels, profiles
    from autoaccum.simulate.allocator import Allocator, Block
    from autoaccum.simulate.allocator_settings import Settings, settings_from_environment
    from autoaccum.simulate.attention import AttentionCall, chosen_for
    from autoaccum.simulate.kernel_choice import Card, CardFacts, same_kernels
    from autoaccum.simulate.margins import Margin, margin_of
    from autoaccum.simulate.profiles import Figure, Profile
    from autoaccum.simulate.tape import KINDS, Growth, NotAlike, Replayed, Tape, canonical, held_at, replay, same_tape, tape_as_json, tape_from_json
    from autoaccum.simulate.window_timeline import Timeline, memory_snapshot, timeline
else:
    __getattr__ = lazily(
        __name__,
        allocator="Allocator Block",
        allocator_settings="Settings settings_from_environment",
        attention="AttentionCall chosen_for",
        kernel_choice="Card CardFacts same_kernels",
        margins="Margin margin_of",
        profiles="Figure Profile",
        tape="KINDS Growth NotAlike Replayed Tape canonical held_at replay same_tape tape_as_json tape_from_json",
        window_timeline="Timeline memory_snapshot timeline",
    )
