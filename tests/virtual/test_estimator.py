import json

import pytest

import autoaccum
from autoaccum.simulate import margins, profiles
from autoaccum.virtual.estimate import Estimate
from tests import command_line, simulated
from tests.command_line import ROOT, document

MIB = 2**20
FILE = "tests/simulated.py"


@pytest.fixture(scope="module")
def both():
    """Two cards, one of them too small for even one sample; the whole document and the exit code."""
    finished = command_line.autoaccum("estimate", f"{FILE}:decoder", "-b", 120, "-g", "t4", "-g", "330MiB", "-g", "264MiB", "--json")
    return finished.returncode, document(finished)


def test_the_document_is_what_was_promised(both):
    code, told = both
    assert code == 3  # one of those that were named cannot hold it
    assert (told["schema"], told["job"], told["target_batch"]) == ("autoaccum.estimate/1", f"{FILE}:decoder", 120)
    large, middle, small = told["gpus"]
    assert (large["gpu"], large["fits"], large["micro_batches"], large["accumulation_steps"]) == ("t4", True, [120], 1)
    assert middle["fits"] and sum(middle["micro_batches"]) == 120 and middle["accumulation_steps"] > 1
    assert (small["fits"], small["micro_batch"], small["accumulation_steps"]) == (False, None, None)
    for each in told["gpus"]:
        low, high = each["peak_interval_bytes"]
        assert low <= each["peak_bytes"] <= high
        assert set(each["breakdown"]) >= {"parameters", "gradients", "optimizer", "activations", "workspace", "context"}
        inside = sum(value for name, value in each["breakdown"].items() if name != "context")
        assert inside == each["peak_bytes"]
    assert middle["peak_interval_bytes"][1] <= middle["budget_bytes"]
    assert small["peak_interval_bytes"][1] > small["budget_bytes"]
    assert middle["largest_micro_batch"] <= middle["hard_largest_micro_batch"] < large["largest_micro_batch"]


def test_the_table_says_it_in_words():
    finished = command_line.autoaccum("estimate", f"{FILE}:conv", "-b", 64, "-g", "t4", "-g", "rtx-3060-12gb")
    assert finished.returncode == 0, finished.stderr
    first, head, t4, *rest = finished.stdout.splitlines()
    of = "batch[0] (n, 3, 32, 32), batch[1] (n,)"
    assert first.startswith(f"64 samples a step of {FILE}:conv, simulated at {of}; the columns weights to rest add up to the peak (")
    assert head.split()[:3] == ["gpu", "plan", "peak"]
    assert t4.split()[:4] == ["t4", "64", "x", "1"]
    assert f"margin: {margins.SEEN['convolutions'].provenance}" in rest


def test_every_card_is_answered_and_none_is_an_error():
    finished = command_line.autoaccum("estimate", f"{FILE}:mlp", "-b", 32, "--all-gpus", "--json")
    assert finished.returncode == 0, finished.stderr
    assert [each["gpu"] for each in document(finished)["gpus"]] == profiles.names()


def test_a_function_is_simulated_in_a_copy_of_the_process():
    code = """
import autoaccum
calls, before = [], torch.get_rng_state()
def make():
    calls.append(torch.rand(1))
    print("said by the job")
    return mlp()
found = autoaccum.estimate(make, target_batch=48, gpus=["t4", "1GiB"])
changed = bool(calls) or not torch.equal(torch.get_rng_state(), before)
tell([[each.gpu, each.fits, each.micro_batch] for each in found.gpus] + [changed, torch.zeros(1).device.type, str(found).splitlines()[2][:2]])
"""
    assert simulated.in_a_process(code) == [["t4", True, 48], ["1GiB", True, 48], False, "cpu", "t4"]


def test_a_copy_never_comes_back_into_the_caller_and_what_it_raised_does():
    code = """
import autoaccum, os
def leaves():
    raise SystemExit("bye")
def fails():
    raise ValueError("no such checkpoint")
said = []
for make in (leaves, fails):
    try:
        autoaccum.estimate(make, target_batch=48, gpus="t4")
    except BaseException as error:
        said.append([type(error).__name__, str(error)])
print(f"process {os.getpid()} goes on")
tell(said)
"""
    (left, failed) = simulated.in_a_process(code)
    assert left[0] == "JobError" and "exit code bye" in left[1]
    assert failed == ["JobFailed", "no such checkpoint"]


def test_threads_that_were_not_copied_are_not_waited_for():
    code = """
import autoaccum
torch.set_num_threads(2)
torch.randn(2000, 2000).exp() @ torch.randn(2000, 2000)
def make():
    torch.randn(600, 600).exp() @ torch.randn(600, 600)
    return mlp()
tell(autoaccum.estimate(make, target_batch=48, gpus="t4").gpus[0].fits)
"""
    assert simulated.in_a_process(code, timeout=60) is True


def test_the_environments_cap_is_the_cards():
    told = command_line.autoaccum(
        "estimate", f"{FILE}:decoder", "-b", 400, "-g", "1GiB", "--json", env={"PYTORCH_CUDA_ALLOC_CONF": "per_process_memory_fraction:0.4"}
    )
    (card,) = document(told)["gpus"]
    assert card["budget_bytes"] == int(0.4 * 2**30) - 256 * MIB
    assert card["peak_interval_bytes"][1] <= card["budget_bytes"]
    assert card["largest_micro_batch"] <= card["hard_largest_micro_batch"]


def test_a_process_that_has_trained_can_still_be_copied():
    code = """
import autoaccum
torch.ones(1, requires_grad=True).sum().backward()
tell(autoaccum.estimate(mlp, target_batch=48, gpus="t4").gpus[0].fits)
"""
    assert simulated.in_a_process(code) is True


def test_a_job_itself_is_refused():
    with pytest.raises(autoaccum.UsageError, match="a function that builds the job"):
        autoaccum.estimate(simulated.mlp(), target_batch=8, gpus="t4")


def test_7_billion_weights_on_a_laptop():
    finished = command_line.autoaccum("estimate", f"{FILE}:huge", "-b", 8, "-g", "b200", "-g", "t4", "--json")
    large, small = document(finished)["gpus"]
    assert large["breakdown"]["parameters"] == small["breakdown"]["parameters"] == 27 * 2**30
    assert (large["fits"], small["fits"]) == (True, False)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((f"{FILE}:mlp", "-g", "t4"), "--target-batch"),
        ((f"{FILE}:mlp", "-b", 8), "name the cards with --gpu NAME, or take --all-gpus"),
        ((f"{FILE}:mlp", "-b", 8, "-g", "t4", "--all-gpus"), "not both"),
        ((f"{FILE}:mlp", "-b", 8, "-g", "t5"), "no GPU data file for 't5': the nearest is t4"),
        ((f"{FILE}:mlp", "-b", 0, "-g", "t4"), "at least 1, not 0"),
        ((f"{FILE}:mlp", "-b", 8, "-g", "3090"), "the nearest are rtx-3090"),
        ((f"{FILE}:mlp", "-b", 8, "-g", "100MiB"), "100MiB leaves nothing beside a headroom of 256 MiB"),
        ((f"{FILE}:mlp", "-b", 8, "-g", "t4", "--timeline", "x.txt"), "'x.txt' must be a file that ends in .png, .svg, .pdf or .pickle"),
        ((f"{FILE}:mlp", "-b", 8, "-g", "t4", "-g", "l4", "--timeline", "x.png"), "give one --gpu, not 2"),
        ((f"{FILE}:mlp", "-b", 8, "-g", "t4", "--timeline", "nowhere/x.png"), "--timeline 'nowhere/x.png': there is no folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(words, says):
    finished = command_line.autoaccum("estimate", *words)
    assert finished.returncode == 2
    assert says in finished.stderr and len(finished.stderr.splitlines()) == 1


def test_a_job_that_grows_otherwise_than_in_a_line_is_right_on_every_card():
    """Pairs of samples: four times the memory for twice the micro-batch. One step fewer must not fit, either."""
    code = """
from autoaccum.simulate import profiles
from autoaccum.virtual import simulation
from autoaccum.probe.readings import Limits
fake.enable()
on = simulation.Simulation([pairwise()], profiles.load("2GiB"), Limits())
told = []
for card in ("2GiB", "t4", "8GiB"):
    found = on.estimated(card, 65536, both=card == "2GiB")
    larger = -(-65536 // (found["accumulation_steps"] - 1))
    told.append([on.measure(sizes, full=True).fits for sizes in (found["micro_batches"], (larger,) * 3)])
    most = found["largest_micro_batch"] or most
on.use(profiles.load("2GiB"))
tell([told, [on._traced.exactly(on._card, (size, size)).requested_peak() for size in (most, most * 12 // 10)]])
"""
    told, (largest, larger) = simulated.in_a_process(code)
    assert told == [[True, False]] * 3
    assert largest < 2**31 < larger


def test_what_does_not_fit_has_no_timeline_and_still_an_answer(tmp_path):
    """BatchNorm would refuse the micro-batch of one sample that is not asked of it."""
    finished = command_line.autoaccum("estimate", f"{FILE}:normed", "-b", 64, "-g", "400MiB", "--timeline", tmp_path / "window.png")
    assert finished.returncode == 3 and "no window to draw" in finished.stderr and "does not fit" in finished.stdout


def test_what_cannot_be_traced_is_exit_5_with_the_operator():
    finished = command_line.autoaccum("estimate", f"{FILE}:ragged", "-b", 8, "-g", "t4")
    assert finished.returncode == 5
    assert "bincount" in finished.stderr


def test_what_was_assumed_is_said():
    told = document(command_line.autoaccum("estimate", f"{FILE}:asking", "-b", 8, "-g", "8GiB", "--json"))
    assert any("a value that is read from the device was taken to be 1" in each for each in told["gpus"][0]["warnings"])


def test_a_job_that_branches_on_its_size_is_traced_size_by_size():
    told = document(command_line.autoaccum("estimate", f"{FILE}:branching", "-b", 8, "-g", "300MiB", "--json"))
    assert told["gpus"][0]["fits"]
    assert any("every size was traced by itself" in each for each in told["gpus"][0]["warnings"])


@pytest.mark.parametrize("suffix", ["png", "pickle"])
def test_a_timeline_is_drawn(tmp_path, suffix):
    path = tmp_path / f"window.{suffix}"
    finished = command_line.autoaccum("estimate", f"{FILE}:decoder", "-b", 120, "-g", "330MiB", "--timeline", path)
    assert finished.returncode == 0, finished.stderr
    heads = {"png": b"\x89PNG", "pickle": b"\x80"}
    assert path.read_bytes().startswith(heads[suffix])


def test_tune_and_check_run_on_a_card_that_is_not_here(tmp_path):
    path = tmp_path / "plan.json"
    finished = command_line.autoaccum("tune", f"{FILE}:decoder", "-b", 120, "-d", "virtual:330MiB", "--json", "-o", path)
    told = document(finished)
    assert told["predicted"] is True
    assert sum(told["micro_batches"]) == 120 and told["peak_bytes"] <= told["budget_bytes"]
    assert told["device"]["kind"] == "cuda" and told["device"]["total_bytes"] == 330 * MIB
    refused = told["smallest_refused"]
    assert command_line.autoaccum("check", f"{FILE}:decoder", "-b", 120, "-m", told["micro_batch"], "-d", "virtual:330MiB").returncode == 0
    assert command_line.autoaccum("check", f"{FILE}:decoder", "-b", 120, "-m", refused, "-d", "virtual:330MiB").returncode == 3
    assert autoaccum.Plan.load(path).micro_batches == tuple(told["micro_batches"])


def test_train_is_charged_to_the_card():
    finished = command_line.autoaccum("train", "-b", 120, "-e", 2, "-d", "virtual:300MiB")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1].startswith("epoch 2")


def test_only_what_would_be_on_the_card_is_charged(tmp_path):
    job = tmp_path / "job.py"
    job.write_text("""
import torch, autoaccum
def make_job():
    model = torch.nn.Linear(1000, 1)
    data = torch.utils.data.TensorDataset(torch.zeros(100_000, 1000), torch.zeros(100_000, 1))  # 381 MiB, on the host
    data = torch.utils.data.Subset(data, range(640))
    loss = lambda m, b: torch.nn.functional.mse_loss(m(b[0]), b[1])
    return autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.0), loss, (torch.zeros(4, 1000), torch.zeros(4, 1)), data=data)
""")
    finished = command_line.autoaccum("train", job, "-b", 64, "-d", "virtual:300MiB")
    assert finished.returncode == 0, finished.stderr
    assert "charged to the card" in finished.stderr


def test_equivalence_is_not_asked_of_a_card_without_values():
    finished = command_line.autoaccum("check", f"{FILE}:mlp", "--equivalence", "-d", "virtual:t4")
    assert finished.returncode == 2 and "--device cpu" in finished.stderr


def test_a_command_cannot_be_simulated():
    finished = command_line.autoaccum("tune", "-b", 8, "-d", "virtual:t4", "--", "python", "x.py", "{micro_batch}", "{accumulation_steps}")
    assert finished.returncode == 2
    assert "a command cannot be simulated" in finished.stderr


def test_profiles_are_listed_and_shown(tmp_path):
    assert len(command_line.autoaccum("profiles", "list").stdout.splitlines()) == len(profiles.names()) + 1
    shown = command_line.autoaccum("profiles", "show", "t4").stdout
    assert "total_bytes: 15,636,365,312 bytes" in shown and "estimated:" in shown
    own = tmp_path / "mine.toml"
    own.write_text(profiles.written(profiles.load("l4")).replace("value", "valeu", 1))
    wrong = command_line.autoaccum("profiles", "show", own)
    assert wrong.returncode == 2 and "mine.toml: total_bytes" in wrong.stderr


def test_the_margins_are_those_of_the_published_rows():
    committed = json.loads((ROOT / "benchmarks/results/estimate_published.json").read_text())["margins"]
    for family, seen in committed.items():
        assert (margins.SEEN[family].low, margins.SEEN[family].high) == (seen["low"], seen["high"])
        assert margins.SEEN[family].provenance.startswith(f"{seen['rows']} published runs")


def test_an_estimate_survives_json(both):
    for told in both[1]["gpus"]:
        assert json.loads(json.dumps(Estimate.from_dict(told).as_dict())) == told


@pytest.mark.parametrize(
    ("does", "says"),
    [("pass", "kept the stub of CUDA's device guard"), ("os.abort()", "this torch ended the process when CUDA tensors were faked (exit code -6)")],
    ids=["one that refuses", "one that aborts"],
)
def test_a_torch_that_cannot_fake_cuda_gets_an_approximation_that_says_so(tmp_path, does, says):
    (tmp_path / "sitecustomize.py").write_text(f"""
import os, sys, torch
def ensure():
    if sys._getframe(1).f_code.co_filename.endswith("trace/fake.py"):
        {does}
torch._C._ensureCUDADeviceGuardSet = ensure
""")
    finished = command_line.autoaccum("estimate", f"{FILE}:decoder", "-b", 16, "-g", "t4", "--json", env={"PYTHONPATH": str(tmp_path)})
    (t4,) = document(finished)["gpus"]
    assert t4["fits"] and t4["breakdown"]["optimizer"] > 0
    assert any(each.startswith("approximate: traced on CPU tensors") and says in each for each in t4["warnings"])
    assert t4["peak_interval_bytes"][1] > 1.2 * t4["peak_bytes"]


def test_tuning_in_place_on_a_card_that_is_not_here_is_told_where_to_go():
    with pytest.raises(autoaccum.UsageError, match=r"for virtual:t4 use autoaccum\.estimate"):
        autoaccum.tune(simulated.mlp(), target_batch=8, device="virtual:t4")
