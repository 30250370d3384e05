"""A GPU's memory without the GPU: `trace` writes down what a window allocates, `replay` runs that through the caching allocator's rules, and `timeline` shows it step by step.

It exports these three verbs, their records, and the GPU `profiles`.
It imports the doorstep and `data`.
"""

from typing import TYPE_CHECKING

from autoaccum.doors import lazily

if TYPE_CHECKING:
    from autoaccum.simulate import profiles
    from autoaccum.simulate.allocator import Allocator, Block
    from autoaccum.simulate.allocator_settings import Settings, settings_from_environment
    from autoaccum.simulate.attention import AttentionCall
    from autoaccum.simulate.fake import fake_cuda, quieten_torch, quieten_transformers
    from autoaccum.simulate.kernel_choice import Card, same_kernels
    from autoaccum.simulate.margins import Margin, margin_of
    from autoaccum.simulate.profiles import Figure, Profile
    from autoaccum.simulate.tape import KINDS, Growth, NotAlike, Replayed, Tape, held_at, replay, same_tape, tape_as_json, tape_from_json
    from autoaccum.simulate.tracer import Tracer, trace
    from autoaccum.simulate.window_timeline import Timeline, memory_snapshot, timeline
else:
    __getattr__ = lazily(
        __name__,
        allocator="Allocator Block",
        allocator_settings="Settings settings_from_environment",
        attention="AttentionCall",
        fake="fake_cuda quieten_torch quieten_transformers",
        kernel_choice="Card same_kernels",
        margins="Margin margin_of",
        profiles="Figure Profile",
        tape="KINDS Growth NotAlike Replayed Tape held_at replay same_tape tape_as_json tape_from_json",
        tracer="Tracer trace",
        window_timeline="Timeline memory_snapshot timeline",
    )
