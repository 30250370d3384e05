"""What needs no card of the comparison with one: reading a recording, and replaying it."""

import json

from gpu import recorder, virtual

from autoaccum.simulate import tape, window_timeline
from autoaccum.simulate.allocator import Allocator
from autoaccum.simulate.allocator_settings import Settings
from tests.command_line import ROOT

GOLDEN = ROOT / "tests/golden/decoder_tape.json"


def recording(how):
    return recorder.events_of(window_timeline.memory_snapshot(tape.tape_from_json(json.loads(GOLDEN.read_text())), Allocator(settings=how)))


def test_a_recording_of_the_same_rules_is_exact():
    for how in (Settings(), Settings(expandable_segments=True), Settings(roundup_divisions=(4,) * 16)):
        found = virtual.replayed(recording(how), Allocator(settings=how))
        assert found["exact"], found
        assert found["requests"] > 300


def test_other_rules_are_noticed():
    found = virtual.replayed(recording(Settings()), Allocator(settings=Settings(large_segment_bytes=40 * 2**20)))
    assert not found["exact"]
    assert found["event"] is not None


def test_a_block_in_another_place_is_noticed():
    events = recording(Settings())
    at = next(number for number, (action, _, size) in enumerate(events) if action == "alloc" and number > 200 and size > 512)
    action, address, size = events[at]
    found = virtual.replayed([*events[:at], (action, address + 512, size), *events[at + 1 :]], Allocator())
    assert not found["exact"] and "of its segment" in found["why"]


def test_a_recording_comes_back_from_its_text():
    events = recording(Settings())
    again = recorder.unpacked(recorder.packed(events))
    base = min(address for _, address, _ in events)
    assert again == [(action, address - base, size) for action, address, size in events]
