"""The virtual GPU beside a real one. Run with `pytest -m gpu`."""

import json
import subprocess
import sys

import pytest

from tests.command_line import ROOT

pytestmark = pytest.mark.gpu


def part(*words, environment=None):
    import os

    ran = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu/virtual.py", "part", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        check=True,
    )
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("settings", ["", "max_split_size_mb:64", "roundup_power2_divisions:4", "expandable_segments:True"])
def test_the_allocator_makes_the_same_segments_to_the_byte(settings):
    found = part("random", environment={"PYTORCH_CUDA_ALLOC_CONF": settings} if settings else None)
    assert found["exact"] == found["of"], found["first_wrong"]


@pytest.mark.parametrize(("model", "most_off"), [("gpt", 0.02), ("mlp", 0.02), ("conv", 0.10)])
def test_the_peak_is_the_simulated_one_within_the_expected(model, most_off):
    from tests.simulated import in_a_process

    real = part("peak", model, "adam-fp32", 8)
    code = f"""
import sys
sys.path.insert(0, "benchmarks")
from gpu import virtual
fake.enable()
with phantom.unfilled():
    job = virtual.job("{model}", "adam-fp32")
capability = sum(digit * power for digit, power in zip(torch.cuda.get_device_capability(), (10, 1)))
ran = tape.replay(phantom.Phantom([job]).tape([[8], [8, 8]], kernels.Card(capability, {32 << 20})), Allocator())
tell(ran.peak_allocated_bytes)
"""
    assert in_a_process(code) == pytest.approx(real["allocated"], rel=most_off)


def test_a_card_can_be_recorded(tmp_path):
    from autoaccum import profiles

    path = tmp_path / "here.toml"
    subprocess.run([sys.executable, "-m", "autoaccum", "profiles", "record", "-o", path], check=True, cwd=ROOT)
    found = profiles.read(path)
    assert 0 < found.context_bytes < 4 * 2**30
    assert found.flops["fp32"].value > 10**12
