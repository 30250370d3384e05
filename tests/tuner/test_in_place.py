"""The line in place: real jobs, real limits, real failures."""

import gc
import math

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.devices.cpu import Cpu
from autoaccum.probe import request
from autoaccum.probe.rehearsal import rehearsing
from autoaccum.tuner import one_device, trial_log
from tests import jobs
from tests.digest import digest

MIB = 2**20


def limit_for(mib):
    """A limit that leaves `mib` MiB above what this process holds now, headroom of 3 % included."""
    gc.collect()
    return int((Cpu().held_bytes() + mib * MIB) / 0.97)


def test_the_fewest_steps_that_fit_are_found_and_the_answer_was_run_in_full():
    plan = autoaccum.tune(jobs.hungry(), target_batch=120, memory_limit=limit_for(150))
    # Forward and backward hold two to three times the MiB that a sample keeps.
    assert 3 <= plan.accumulation_steps <= 5
    assert sum(plan.micro_batches) == plan.target_batch == plan.effective_batch == 120
    assert plan.micro_batch == max(plan.micro_batches) == math.ceil(120 / plan.accumulation_steps)
    confirmed = plan.trials[-1]
    assert confirmed.full and confirmed.outcome == "fits" and confirmed.micro_batch == plan.micro_batch
    assert plan.peak_bytes == confirmed.peak_bytes <= plan.budget_bytes
    refused = [each for each in plan.trials if each.outcome != "fits"]
    assert [each.micro_batch for each in refused] == [plan.smallest_refused]
    assert refused[0].accumulation_steps == plan.accumulation_steps - 1
    assert len(plan.trials) <= 6


def test_with_plenty_everything_fits_in_one_piece():
    plan = autoaccum.tune(jobs.hungry(), target_batch=127)
    assert (plan.micro_batch, plan.accumulation_steps, plan.micro_batches) == (127, 1, (127,))
    assert plan.smallest_refused is None and plan.world_size == 1 and plan.samples_per_second > 0


def test_where_nothing_is_enforced_nothing_runs_that_is_predicted_not_to_fit():
    """So it is in place on a CPU without a limit: nothing would stop a trial but the system's own killer."""
    wish, tell = request.Request(240, memory_limit=limit_for(150)), trial_log.TrialLog(None)
    with rehearsing(jobs.hungry(), Cpu(), wish.limits, enforce=False) as rehearsal:
        plan = one_device.tune_one_device(rehearsal, wish, tell, "in place", ())
    assert plan.accumulation_steps > 1
    assert plan.predicted_refusal is not None and plan.smallest_refused is None
    assert all(each.outcome == "fits" for each in plan.trials)
    assert "predicted" in plan.explain()


def test_the_fastest_plan_that_fits_is_chosen_and_all_that_were_timed_are_told():
    """Above 30 samples each takes a millisecond more; all 120 would fit."""
    plan = autoaccum.tune(jobs.crawls_above(30), target_batch=120, objective="throughput")
    assert plan.micro_batch <= 30 and sum(plan.micro_batches) == 120 and plan.objective == "throughput"
    timed = [each for each in plan.trials if each.samples_per_second and each.full]
    assert len({each.micro_batch for each in timed}) > 3 and timed[0].micro_batch == 120
    best = max(each.samples_per_second for each in timed if each.micro_batch <= 30)
    assert plan.samples_per_second >= best / 1.02 > 2 * timed[0].samples_per_second
    assert f"{plan.micro_batch} x {plan.accumulation_steps}" in plan.explain() and plan.explain().count("samples a second") == len(
        {each.micro_batch for each in timed}
    )
    assert autoaccum.tune(jobs.crawls_above(30), target_batch=120).micro_batch == 120
    with pytest.raises(autoaccum.UsageError, match="two questions"):
        autoaccum.tune(jobs.small(), target_batch=120, objective="throughput", largest=True)
    with pytest.raises(autoaccum.UsageError, match="fewest-steps or throughput"):
        autoaccum.tune(jobs.small(), target_batch=120, objective="speed")


@pytest.mark.parametrize("target", [1, 2, 7, 127, 1000])
def test_every_target_is_hit_exactly(target):
    plan = autoaccum.tune(jobs.small(), target_batch=target, max_micro_batch=40)
    assert sum(plan.micro_batches) == target and max(plan.micro_batches) - min(plan.micro_batches) <= 1
    assert plan.accumulation_steps == math.ceil(target / min(40, target))


def test_equal_micro_batches_and_what_they_cost():
    plan = autoaccum.tune(jobs.small(), target_batch=127, max_micro_batch=40, equal=True)
    assert plan.micro_batches == (1,) * 127
    assert any("127 is prime" in warning and "128 = 32 x 4" in warning for warning in plan.warnings)


def test_the_exact_largest_is_found_when_asked_for():
    plan = autoaccum.tune(jobs.hungry(), target_batch=120, memory_limit=limit_for(150), largest=True)
    assert plan.smallest_refused == plan.largest_fit + 1


def test_memory_that_bends_is_followed():
    plan = autoaccum.tune(jobs.bends(), target_batch=240, memory_limit=limit_for(200))
    assert plan.smallest_refused is not None
    assert math.ceil(240 / plan.smallest_refused) == plan.accumulation_steps - 1


def test_a_size_that_fails_while_a_larger_one_passes():
    """The second reading falls into the hump; the window in one piece is past it."""
    plan = autoaccum.tune(jobs.hump(), target_batch=120, memory_limit=limit_for(700))
    refused = [each.micro_batch for each in plan.trials if each.outcome != "fits"]
    assert refused and max(refused) < plan.micro_batch == 120
    assert plan.smallest_refused is None


def test_optimizer_state_that_appears_at_the_first_step_is_counted():
    lazily, without = jobs.late_state(), jobs.hungry()
    peaks = [autoaccum.tune(job, target_batch=8).peak_bytes for job in (without, lazily)]
    assert 90 * MIB < peaks[1] - peaks[0] < 130 * MIB


def test_nothing_fits_says_what_one_sample_needs_and_what_there_is():
    job = jobs.hungry(mib=100)
    with pytest.raises(autoaccum.NothingFits) as raised:
        autoaccum.tune(job, target_batch=16, memory_limit=limit_for(80))
    message = str(raised.value)
    assert "one sample does not fit" in message and "it needs" in message and "raise --memory-limit" in message
    assert raised.value.budget_bytes > 0 and {each.outcome for each in raised.value.trials} == {"oom"}
    assert autoaccum.tune(job, target_batch=2, max_micro_batch=1).micro_batch == 1  # the job itself is whole


def test_a_limit_below_what_is_held_already_is_told():
    with pytest.raises(autoaccum.NothingFits, match="does not fit"):
        autoaccum.tune(jobs.small(), target_batch=8, memory_limit="20MiB")


def test_batch_norm_gets_no_micro_batch_of_one_sample():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    job = autoaccum.Job(model, torch.optim.SGD(model.parameters(), lr=0.1), jobs.mse, jobs.pairs(8))
    plan = autoaccum.tune(job, target_batch=13, max_micro_batch=3)
    assert plan.micro_batches == (3, 3, 3, 2, 2)
    assert any("BatchNorm (layer 1)" in warning for warning in plan.warnings)
    with pytest.raises(autoaccum.NothingFits, match=r"BatchNorm layer '1' needs micro-batches of at least 2"):
        autoaccum.tune(job, target_batch=13, max_micro_batch=1)
    with pytest.raises(autoaccum.NothingFits, match="BatchNorm layer '1'"):
        autoaccum.tune(job, target_batch=1)


def test_the_users_own_exception_comes_back_itself_with_a_note():
    with pytest.raises(ValueError, match="cannot take more than 8 samples") as raised:
        autoaccum.tune(jobs.fails_above(8), target_batch=120)
    assert any("raised in forward, at a micro-batch of" in note for note in raised.value.__notes__)
    assert any("sizes that had worked: 1" in note for note in raised.value.__notes__)


@pytest.mark.parametrize(
    ("job", "says"),
    [
        (jobs.not_scalar, r"shape \(1, 1\)"),
        (jobs.needs_no_grad, "needs no gradient"),
        (jobs.returns_float, "returned a float"),
        (jobs.wrong_size, r"make_batch\(1\) returned 2 samples"),
    ],
)
def test_a_job_that_is_wrong_is_told_what_is(job, says):
    with pytest.raises(autoaccum.JobError, match=says):
        autoaccum.tune(job(), target_batch=12)


def test_a_loss_that_is_nan_is_said():
    plan = autoaccum.tune(jobs.nan_loss(), target_batch=12)
    assert any("the loss is nan" in warning for warning in plan.warnings)


def test_steps_that_a_scaler_skips_make_a_trial_void():
    job = jobs.small(lambda model, batch: jobs.mse(model, batch) * float("inf"), scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(autoaccum.JobError, match="inf or nan"):
        autoaccum.tune(job, target_batch=12)


def test_a_scaler_at_its_usual_scale_does_not_void_trials():
    scaler = torch.amp.GradScaler("cpu")
    plan = autoaccum.tune(jobs.small(scaler=scaler, autocast=torch.float16, max_grad_norm=1.0), target_batch=12)
    assert plan.effective_batch == 12 and scaler.get_scale() == 65536.0


def test_a_trial_that_takes_too_long_counts_as_not_fitting():
    """In one process the clock is looked at between phases."""
    plan = autoaccum.tune(jobs.slow_above(30), target_batch=120, timeout_s=1.0)
    assert plan.micro_batch == 30
    assert next(each for each in plan.trials if each.micro_batch == plan.smallest_refused).outcome == "timeout"


def test_progress_tells_every_phase_and_every_reading():
    from autoaccum.probe.readings import Reading, Trying

    events = []
    plan = autoaccum.tune(jobs.small(), target_batch=12, max_micro_batch=4, progress=events.append)
    readings = [event for event in events if isinstance(event, Reading)]
    assert [each.micro_batch for each in readings] == [each.micro_batch for each in plan.trials]
    assert {event.phase for event in events if isinstance(event, Trying)} == {"batch", "forward", "backward", "clip", "step"}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"target_batch": 0}, "target_batch must be a whole number of samples, at least 1, not 0"),
        ({"target_batch": 1.5}, "not 1.5"),
        ({"target_batch": 12, "max_micro_batch": 0}, "max_micro_batch"),
        ({"target_batch": 12, "memory_limit": "lots"}, "'lots' is not a size"),
        ({"target_batch": 12, "headroom": "100%"}, "leaves nothing"),
        ({"target_batch": 12, "timeout_s": 0}, "timeout_s"),
    ],
)
def test_values_that_cannot_be_used_are_told(wrong, says):
    with pytest.raises(autoaccum.UsageError, match=says):
        autoaccum.tune(jobs.small(), **wrong)


def test_another_device_than_the_parameters_is_refused():
    with pytest.raises(autoaccum.NoSuchDevice, match="the model is on cpu, not on cuda:0"):
        autoaccum.tune(jobs.small(), target_batch=12, device="cuda:0")


def test_a_job_or_its_parts_not_both():
    job = jobs.small()
    with pytest.raises(autoaccum.UsageError, match="either a Job or"):
        autoaccum.tune(job, job.optimizer, target_batch=12)


def test_several_optimizers_are_stepped_together():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1))
    optimizers = [torch.optim.Adam(part.parameters()) for part in model]
    plan = autoaccum.tune(model, optimizers, jobs.mse, jobs.pairs(4), target_batch=12)
    assert plan.effective_batch == 12 and all(not each.state for each in optimizers)


def test_an_optimizer_with_a_closure_is_rehearsed_with_the_history_it_will_gather():
    """LBFGS keeps up to 100 pairs of vectors; a trial's two steps make but a few."""
    model = nn.Linear(100_000, 1)

    def peak(history_size):
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2, history_size=history_size)
        plan = autoaccum.tune(model, optimizer, jobs.mse, jobs.pairs(4, 100_000), target_batch=4)
        assert not optimizer.state
        return plan.peak_bytes

    whole = 2 * 100 * 400_000  # bytes of two vectors as long as the parameters, a hundred times
    assert peak(200) - peak(100) == pytest.approx(whole, rel=0.1)


def test_several_jobs_run_in_turn_and_come_back_as_they_were():
    first, second = jobs.small(), jobs.hungry(mib=1)
    second = autoaccum.Job(second.model, second.optimizer, lambda model, batch: model(len(batch[0])), first.batch)
    before = digest(first.model, first.optimizer), digest(second.model, second.optimizer)
    plan = autoaccum.tune([first, second], target_batch=60, max_micro_batch=20)
    assert (digest(first.model, first.optimizer), digest(second.model, second.optimizer)) == before
    one_mib_more = autoaccum.tune([first, second], target_batch=60, max_micro_batch=30).peak_bytes - plan.peak_bytes
    assert one_mib_more > 15 * MIB  # the second job's activations count, too
    results = autoaccum.Accumulator([first, second], plan).step(jobs.pairs(60))
    assert [each.micro_batches for each in results] == [3, 3]
    with pytest.raises(autoaccum.UsageError, match="each with its own loss"):
        autoaccum.Accumulator([first, second], plan).step(jobs.pairs(60), jobs.mse)


def test_progress_is_a_callback_or_lines_on_stderr(capsys):
    seen = []
    autoaccum.tune(jobs.small(), target_batch=12, progress=seen.append)
    assert any(getattr(each, "fits", False) for each in seen)
    capsys.readouterr()
    autoaccum.tune(jobs.small(), target_batch=12, progress=True)
    told = capsys.readouterr()
    assert told.err.startswith("tried 1: fits, peak") and not told.out


def test_the_knobs_of_tune_are_these():
    """Only the target is the user's to force; all is keyword-only with a default."""
    import inspect

    parameters = inspect.signature(autoaccum.tune).parameters
    assert [each.name for each in parameters.values() if each.kind is each.KEYWORD_ONLY] == [
        "target_batch", "target_tokens", "device", "memory_limit", "headroom", "max_micro_batch", "equal", "largest", "objective", "lockstep", "timeout_s",
        "rank_timeout_s", "cache", "lengths", "evaluate", "progress",
    ]  # fmt: skip


def test_a_compiled_model_is_searched_as_it_was_written_and_confirmed_compiled():
    """Compiled anew for every size, eight sizes would use up what torch allows."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(inputs)
        return graph

    job = jobs.small()
    ran = []
    job.model.register_forward_pre_hook(lambda _, inputs: None if torch.compiler.is_compiling() else ran.append(len(inputs[0])))
    compiled = autoaccum.Job(torch.compile(job.model, backend=backend), job.optimizer, jobs.mse, job.batch)
    plan = autoaccum.tune(compiled, target_batch=120, max_micro_batch=47, largest=True)
    searched = {each.micro_batch for each in plan.trials if not each.full}
    assert len(searched) >= 2 and searched <= set(ran)  # in Python, as written
    assert 1 <= len(graphs) <= 2  # the confirmed window's sizes
    torch.compiler.reset()


def test_a_keyword_that_is_not_there_is_told_with_the_one_that_was_meant():
    job = jobs.small()
    with pytest.raises(autoaccum.UsageError, match="tune\\(\\) has no keyword 'max_microbatch': did you mean 'max_micro_batch'"):
        autoaccum.tune(job.model, job.optimizer, job.loss, job.batch, target_batch=12, max_microbatch=4)
    with pytest.raises(autoaccum.UsageError, match="how much one optimizer step sees is missing: give target_batch, in samples, or target_tokens"):
        autoaccum.tune(job, target_batch=None)


def test_the_device_may_be_a_torch_device():
    assert autoaccum.tune(jobs.small(), target_batch=4, device=torch.device("cpu")).device.kind == "cpu"


def test_float16_without_a_scaler_is_warned_of():
    with pytest.warns(UserWarning, match="float16 without a GradScaler"):
        autoaccum.tune(jobs.small(autocast=torch.float16), target_batch=4)


def test_hints_speak_the_callers_language():
    assert "equal=True gives" in autoaccum.tune(jobs.small(), target_batch=127, max_micro_batch=40).explain()
