"""What needs no card of the comparison with one: reading a recording, and replaying it."""

import json

from gpu import virtual

from autoaccum.simulate import tape, timeline
from autoaccum.simulate.allocator import Allocator
from autoaccum.simulate.settings import Settings
from tests.command_line import ROOT

GOLDEN = ROOT / "tests/golden/decoder_tape.json"


def recording(how):
    return virtual.events_of(timeline.snapshot(tape.from_json(json.loads(GOLDEN.read_text())), Allocator(settings=how)))


def test_a_recording_of_the_same_rules_is_exact():
    for how in (Settings(), Settings(expandable_segments=True), Settings(roundup_divisions=(4,) * 16)):
        found = virtual.replayed(recording(how), Allocator(settings=how))
        assert found["exact"], found
        assert found["requests"] > 300


def test_other_rules_are_noticed():
    found = virtual.replayed(recording(Settings()), Allocator(settings=Settings(large_segment_bytes=40 * 2**20)))
    assert not found["exact"]
    assert found["event"] is not None
