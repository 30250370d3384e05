"""The virtual GPU beside a real one. Run with `pytest -m gpu`."""

import json
import os
import subprocess
import sys

import pytest

from tests.command_line import ROOT
from tests.command_line import autoaccum as run

pytestmark = pytest.mark.gpu


def part(*words):
    ran = subprocess.run([sys.executable, ROOT / "benchmarks/gpu/virtual.py", "part", *map(str, words)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("settings", ["default", "split", "rounded", "expandable", "capped"])
def test_the_allocator_makes_the_same_segments_to_the_byte(settings):
    found = part("random", settings)
    assert found["exact"] == found["of"], found["first_wrong"]
    assert (found["ooms"] > 0) == ("capped" in settings)


@pytest.mark.parametrize(("model", "most_off"), [("gpt2", 0.005), ("mlp", 0.005), ("unet", 0.05)])
def test_the_peak_is_the_simulated_one_within_the_expected(model, most_off):
    from tests.simulated import in_a_process

    real = part("peak", model, "adam-fp32", 4)
    code = f"""
sys.path[:0] = ["benchmarks", "benchmarks/gpu"]
import workloads
fake.enable()
with without_memory():
    job = workloads.job("{model}", "adam-fp32")
made = phantom.Phantom([job]).tape([[4], [4, 4]], kernels.Card({capability()}))
tell(tape.replay(made.on({real["cublas"]}, {multiprocessors()}, 2048), Allocator()).peak_allocated_bytes)
"""
    assert real["replayed"]["exact"], real["replayed"]
    assert in_a_process(code) == pytest.approx(real["allocated"], rel=most_off)


def capability():
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def multiprocessors():
    import torch

    return torch.cuda.get_device_properties(0).multi_processor_count


def test_an_estimate_leaves_the_card_that_is_here_alone():
    asked = ["estimate", "examples/tiny_gpt.py:make_job", "-b", 120, "-g", "t4", "--json"]
    here, hidden = run(*asked), run(*asked, env={"CUDA_VISIBLE_DEVICES": ""})
    assert here.returncode == hidden.returncode == 0, here.stderr
    first, second = (json.loads(each.stdout)["gpus"] for each in (here, hidden))
    assert first == second


def test_an_estimate_of_a_job_that_goes_to_the_card_by_itself(tmp_path):
    job = tmp_path / "eager.py"
    job.write_text(
        "import torch, autoaccum\n"
        "def make_job():\n"
        "    device = 'cuda' if torch.cuda.is_available() else 'cpu'\n"
        "    model = torch.nn.Linear(64, 64).to(device)\n"
        "    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: m(b).mean(), torch.zeros(2, 64, device=device))\n"
    )
    done = run("tune", f"{job}:make_job", "-b", 64, "-d", "virtual:t4", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["predicted"]


def test_an_estimate_in_python_where_the_card_was_only_looked_for():
    code = (
        "import torch, autoaccum\n"
        "assert torch.cuda.is_available()\n"
        "def make():\n"
        "    model = torch.nn.Linear(64, 64)\n"
        "    return autoaccum.Job(model, torch.optim.Adam(model.parameters()), lambda m, b: m(b).mean(), torch.zeros(2, 64))\n"
        "found = autoaccum.estimate(make, target_batch=64, gpus='t4').gpus[0]\n"
        "assert found.fits and not any('approximate' in each for each in found.warnings), found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr


def test_a_card_can_be_recorded(tmp_path):
    from autoaccum.simulate import profiles

    path = tmp_path / "here.toml"
    subprocess.run([sys.executable, "-m", "autoaccum", "profiles", "record", "-o", path], check=True, cwd=ROOT)
    found = profiles.read(path)
    assert 0 < found.context_bytes < 4 * 2**30
    assert found.flops["fp32"].value > 10**12
