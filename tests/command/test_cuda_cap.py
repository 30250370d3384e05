"""The cap of a command on a CUDA card holds whatever the script sets, and what its process tells of the card is believed.

The card is a package named torch that answers as torch.cuda does: what it is asked to cap, how much was reserved, and where.
"""

import json
import sys

import pytest

from autoaccum.command import rehearser
from autoaccum.command.rehearser import Command
from autoaccum.command.template import Template
from autoaccum.devices.memory import Facts, Memory
from autoaccum.errors import UsageError
from autoaccum.probe import Limits

GIB = 2**30
UUIDS = ("11111111-0000-4000-8000-000000000001", "22222222-0000-4000-8000-000000000002")

CUDA = '''
import os, types
UUIDS = %r
fractions, peaks, queued, state = {0: 1.0, 1: 1.0}, {0: 0, 1: 0}, [], {"on": False, "device": 0}
def _environments():
    import re
    found = re.search(r"per_process_memory_fraction:([0-9.]+)", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    return float(found[1]) if found else 1.0
def init():
    if not state["on"]:
        state["on"] = True
        fractions.update({0: _environments(), 1: _environments()})
        for call in queued: call()
def _lazy_call(call): call() if state["on"] else queued.append(call)
def is_initialized(): return state["on"]
def device_count(): return 2
def current_device(): return state["device"]
def set_device(index): state["device"] = index
def get_device_properties(index): return types.SimpleNamespace(total_memory=16 * 2**30, uuid=UUIDS[index])
def set_per_process_memory_fraction(fraction, device=None): init(); fractions[state["device"] if device is None else device] = fraction
def get_per_process_memory_fraction(device): return fractions[device]
def max_memory_reserved(index): return peaks[index]
def memory_stats(index): return {}
class _utils:
    @staticmethod
    def _get_device_index(device, optional=False): return state["device"] if device is None else device
def train(nbytes, index=None):
    """Reserves memory as the allocator does: not beyond the fraction."""
    init()
    index = state["device"] if index is None else index
    if nbytes > fractions[index] * 16 * 2**30:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate much")
    peaks[index] = nbytes
class OutOfMemoryError(RuntimeError): pass
'''


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A package named torch with two cards of 16 GiB, in front of the real one for the commands."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("from . import cuda\n")
    (tmp_path / "torch" / "cuda.py").write_text(CUDA % (UUIDS,))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)

    def command(script, *, index=0, limit=8 * GIB, settings=None):
        (tmp_path / "train.py").write_text(script)
        facts, memory = Facts("cuda", index, "A card", UUIDS[index]), Memory(16 * GIB, 16 * GIB, 0, 0, (), "physical")
        monkeypatch.setattr(rehearser, "_device", lambda label: (facts, memory))
        for name, value in (settings or {}).items():
            monkeypatch.setenv(name, value)
        template = Template([sys.executable, str(tmp_path / "train.py"), "{micro_batch}"])
        return Command(template, f"cuda:{index}", Limits(limit, "0"), on_output=lambda text: None)

    return command


GIB_A_SAMPLE = "import sys, torch; torch.cuda.train(int(sys.argv[1]) * 2**30)"


def test_the_peak_of_a_command_is_what_its_process_reserved(card):
    reading = card(GIB_A_SAMPLE).measure((5, 5))
    assert (reading.outcome, reading.peak_bytes, reading.remarks) == ("fits", 5 * GIB, ())
    assert card(GIB_A_SAMPLE).measure((9, 9)).outcome == "oom"


@pytest.mark.parametrize(
    "lifts",
    [
        "import os; os.environ['PYTORCH_CUDA_ALLOC_CONF'] = 'expandable_segments:True'",
        "import torch; torch.cuda.set_per_process_memory_fraction(0.9)",
        "import torch; torch.cuda.set_device(0)",
    ],
)
def test_a_script_that_sets_the_allocator_itself_does_not_lose_the_cap(card, lifts):
    reading = card(f"{lifts}\n{GIB_A_SAMPLE}").measure((9, 9))
    assert reading.outcome == "oom"


def test_a_smaller_fraction_of_the_scripts_own_stays(card):
    script = f"import torch; torch.cuda.set_per_process_memory_fraction(0.25); torch.cuda.set_device(0)\n{GIB_A_SAMPLE}"
    assert card(script).measure((4, 4)).outcome == "fits" and card(script).measure((5, 5)).outcome == "oom"


def test_a_cap_that_was_lifted_all_the_same_is_told(card):
    reading = card(f"import torch; torch.cuda.init(); torch.cuda.fractions[0] = 1.0\n{GIB_A_SAMPLE}").measure((6, 6))
    assert reading.outcome == "fits" and "lifted the limit" in reading.remarks[0]
    beyond = card(f"import torch; torch.cuda.init(); torch.cuda.fractions[0] = 1.0\n{GIB_A_SAMPLE}").measure((9, 9))
    assert beyond.outcome == "over-budget"


def test_where_nothing_was_seen_of_the_card_that_is_told(card):
    reading = card("print('trained without torch')").measure((6, 6))
    assert reading.outcome == "fits" and reading.peak_bytes is None and "not certain that the limit held" in reading.remarks[0]


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_the_users_own_settings_stay_with_ours_under_both_names(card, tmp_path, name):
    script = f"import json, os, torch; torch.cuda.train(1); json.dump(dict(os.environ), open({str(tmp_path / 'seen')!r}, 'w'))"
    card(script, settings={name: "roundup_power2_divisions:[256:1,512:2],expandable_segments:True"}).measure((1, 1))
    seen = json.loads((tmp_path / "seen").read_text())
    for each in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        assert seen[each] == "roundup_power2_divisions:[256:1,512:2],expandable_segments:True,per_process_memory_fraction:0.500000"
    card(script, settings={name: "per_process_memory_fraction:0.125"}).measure((1, 1))
    assert json.loads((tmp_path / "seen").read_text())[name] == "per_process_memory_fraction:0.125000"


def test_a_command_that_trains_on_another_card_is_refused_and_the_remedy_works(card):
    with pytest.raises(UsageError, match=r"trained on cuda:0 and the memory that counts is that of cuda:1: take --device cuda:0"):
        card(GIB_A_SAMPLE, index=1).measure((5, 5))
    on_the_other = f"import torch; torch.cuda.set_device(1)\n{GIB_A_SAMPLE}"
    assert card(on_the_other, index=1).measure((5, 5)).peak_bytes == 5 * GIB
    assert card(on_the_other, index=1).measure((9, 9)).outcome == "oom"
    assert card(GIB_A_SAMPLE, index=0).measure((5, 5)).peak_bytes == 5 * GIB
