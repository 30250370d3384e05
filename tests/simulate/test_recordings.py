"""What an H200 did (torch 2.11.0, driver 580.159.04), replayed."""

import json
from collections import Counter

import pytest
import torch
from gpu import recorder, virtual

from autoaccum.simulate.attention import AttentionCall, backend
from tests.command_line import ROOT
from tests.simulated import in_a_process

RECORDINGS = ROOT / "tests" / "recordings"
MEASURED = json.loads((ROOT / "benchmarks/results/gpu.json").read_text())["rows"]


def lines():
    return [json.loads(line) for line in (RECORDINGS / "h200_allocator.jsonl").read_text().splitlines()]


def test_the_allocator_makes_the_same_segments_and_places_blocks_alike_to_the_byte(monkeypatch):
    """Random requests under ten settings, of which four with a cap that binds, and whole jobs."""
    seen = Counter()
    for name, setting, capped, total, text in lines():
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", virtual.SETTINGS[setting])
        found = virtual.judged(recorder.unpacked(text), total, virtual.CAP_BYTES if capped else None)
        assert found["exact"], (name, found)
        seen[setting] += 1
    assert set(seen) == set(virtual.SETTINGS) and sum(seen.values()) > 40


def test_attention_takes_the_kernel_that_the_card_took():
    """Every dtype, width of a head, mask, dropout and grouping that was asked for there."""
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
    asked = json.loads((RECORDINGS / "h200_attention.json").read_text())
    assert len(asked) == 600 and {each[-1] for each in asked} == set(names)
    for dtype, width, mask, causal, dropout, grouped, chosen in asked:
        question = AttentionCall(4, getattr(torch, dtype), width, width, bool(mask), grouped, mask == "trained", dropout=dropout > 0)
        assert backend(90, question) == names[chosen], (dtype, width, mask, causal, dropout, grouped)


# "network way micro-batch" -> errors of the peaks requested, allocated and reserved
JOBS = {
    "mlp fused-fp32 8192": (1e-4, 3e-3, 0.01),
    "gpt2 adam-bf16 2": (1e-4, 3e-3, 0.01),
    "gpt2 adam-bf16+checkpointed 2": (1e-4, 3e-3, 0.01),
    "bert sgd-fp32 8": (1e-4, 3e-3, 0.01),
    "unet adam-bf16 8": (0.02, 0.02, 0.05),  # which kernels cuDNN chooses is a guess
}


def test_jobs_peak_where_they_did_on_the_card():
    code = """
import sys
sys.path[:0] = ["benchmarks/gpu"]
import workloads
from autoaccum.virtual.empty_weights import without_memory
from autoaccum.simulate import profiles
from autoaccum.virtual import simulation
from autoaccum.probe.readings import Limits
fake.enable()
found = {}
for each in JOBS:
    name, way, micro_batch = each.split()
    with without_memory():
        job = workloads.job(name, way)
    simulated = simulation.Simulation([job], profiles.load("h200"), Limits(headroom=0))
    ran = tape.replay(simulated._on_card(simulated._traced.exactly(simulated._card, (int(micro_batch),) * 2)), Allocator())
    found[each] = ran.peak_requested_bytes, ran.peak_allocated_bytes, ran.peak_reserved_bytes
tell(found)
"""
    for name, found in in_a_process(code.replace("JOBS", repr(list(JOBS)))).items():
        measured = MEASURED[f"D {name}"]
        for what, ours, within in zip(("requested", "allocated", "reserved"), found, JOBS[name]):
            # From torch 2.13 on cuBLASLt shares cuBLAS's workspace: a MiB less for each of two threads.
            assert ours == pytest.approx(measured[what], rel=within, abs=2 * 2**20), (name, what)
