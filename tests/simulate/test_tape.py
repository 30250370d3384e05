import json
from pathlib import Path

import pytest

from autoaccum.simulate import tape, window_timeline
from autoaccum.simulate.allocator import Allocator
from autoaccum.simulate.allocator_settings import Settings
from autoaccum.simulate.tape import Growth, NotAlike, Tape

MIB = 2**20
GOLDEN = Path(__file__).parent.parent / "golden" / "decoder_tape.json"


def two_steps(activation, weights=4 * MIB):
    """Weights, then twice: an activation, a gradient, a step."""
    made = Tape()
    made.born(weights, "parameters", "parameter")
    for window in range(2):
        made.mark("forward", window, 0)
        held = made.born(activation, "activations", "relu")
        made.mark("backward", window, 0)
        gradient = made.born(weights, "gradients", "mm")
        made.died(held)
        made.mark("clip", window, 0)
        made.mark("step", window, 0)
        made.died(gradient)
        made.mark("end", window, 0)
    return made


def test_a_replay_says_what_peaked_where():
    made = two_steps(30 * MIB)
    ran = tape.replay(made, Allocator())
    assert (ran.peak_requested_bytes, ran.peak_allocated_bytes, ran.retries, ran.failed_at) == (38 * MIB, 38 * MIB, 0, None)
    assert ran.activation_bytes == 38 * MIB
    assert ran.base_bytes == 4 * MIB
    assert tape.held_at(made, ran.peak_event) == {"parameters": 4 * MIB, "gradients": 4 * MIB, "optimizer": 0, "activations": 30 * MIB, "workspace": 0}
    assert made.requested_peak() == 38 * MIB


def test_running_out_is_told_with_its_phase():
    made = two_steps(30 * MIB)
    ran = tape.replay(made, Allocator(40 * MIB))
    assert made.phase_at(ran.failed_at).phase == "forward"


def test_emptying_the_cache_is_an_event():
    made = Tape()
    made.died(made.born(60 * MIB, "workspace", "cudnn benchmark"))
    made.emptied()
    made.born(50 * MIB, "activations", "relu")
    allocator = Allocator(70 * MIB)
    ran = tape.replay(made, allocator)
    assert (ran.retries, allocator.reserved_bytes, ran.peak_reserved_bytes) == (0, 50 * MIB, 60 * MIB)
    assert tape.held_at(made, 3)["activations"] == 50 * MIB


def test_a_line_through_two_tapes_gives_every_other():
    grown = Growth(two_steps(8 * 1000), two_steps(12 * 1000), 8, 12)
    assert tape.same_tape(grown.at(1), two_steps(1000))
    assert tape.same_tape(grown.at(37), two_steps(37 * 1000))


def test_tapes_that_differ_in_more_than_sizes_make_no_line():
    other = two_steps(1000)
    other.born(1, "activations", "dropout")
    with pytest.raises(NotAlike, match="9 and 10 events"):
        Growth(two_steps(1000), other, 1, 2)


def test_deaths_in_a_row_have_one_order():
    one, other = Tape(), Tape()
    for made in (one, other):
        for nbytes in (1, 2, 3):
            made.born(nbytes, "activations", "x")
    for number in (0, 2, 1):
        one.died(number)
    for number in (2, 1, 0):
        other.died(number)
    assert tape.canonical(one).events == tape.canonical(other).events


def test_a_tape_survives_json():
    made = two_steps(1234)
    again = tape.tape_from_json(json.loads(json.dumps(tape.tape_as_json(made))))
    assert again == made


# Traced once from the decoder of tests/simulated.py, 16 samples, windows [16] and [16, 16, 16]. The peaks are what the
# rules of this allocator made of it then: a change of the rules shows here.
@pytest.mark.parametrize(
    ("how", "peak"),
    [
        (Settings(), 85983232),
        (Settings(expandable_segments=True), 65011712),
        (Settings(roundup_divisions=(4,) * 16), 75497472),
        (Settings(max_split_bytes=32 * MIB), 85983232),
    ],
    ids=["default", "expandable", "rounded up", "max split"],
)
def test_the_golden_tape_peaks_where_it_did(how, peak):
    golden = tape.tape_from_json(json.loads(GOLDEN.read_text()))
    assert tape.replay(golden, Allocator(settings=how)).peak_reserved_bytes == peak


def test_a_timeline_holds_what_the_tape_holds():
    golden = tape.tape_from_json(json.loads(GOLDEN.read_text()))
    found = window_timeline.timeline(golden, Allocator())
    ran = tape.replay(golden, Allocator())
    most = max(sum(found.held[kind][at] for kind in tape.KINDS) for at in range(len(found)))
    assert most == golden.requested_peak()
    assert max(found.reserved) == ran.peak_reserved_bytes
    assert [phase for _, phase, _ in found.marks] == ["forward", "backward"] * 3 + ["clip", "step", "end"]


def test_the_snapshot_is_one_that_pytorchs_own_tools_read():
    from torch.cuda import _memory_viz

    golden = tape.tape_from_json(json.loads(GOLDEN.read_text()))
    allocator = Allocator()
    found = window_timeline.memory_snapshot(golden, allocator)
    assert sum(segment["total_size"] for segment in found["segments"]) == allocator.reserved_bytes
    assert sum(segment["allocated_size"] for segment in found["segments"]) == allocator.allocated_bytes
    assert "MiB" in _memory_viz.segsum(found)
    assert "= cudaMalloc(" in _memory_viz.trace(found)
    assert "viz" in _memory_viz.trace_plot(found)
    (trace,) = found["device_traces"]
    assert sum(entry["action"] == "alloc" for entry in trace) == len(golden.sizes)
