"""A run that is stopped goes on behind its last finished window, on other ranks if need be, and ends as an undisturbed one."""

import os
import signal
import threading

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import autoaccum
from autoaccum.distributed import environment
from tests import jobs
from tests.plans import by_hand
from tests.ranked import in_ranks, summed, texts, words

EPOCHS, TARGET, OF = 3, 40, 150
WINDOWS = [40, 40, 40, 30] * EPOCHS


def undisturbed(shuffled):
    """The parameters of one process that takes every window at once."""
    data, net = texts(OF), words()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    for epoch in range(EPOCHS):
        order = torch.randperm(OF, generator=torch.Generator().manual_seed(3 + epoch)).tolist() if shuffled else list(range(OF))
        for start in range(0, OF, TARGET):
            total, count = summed(net, data[order[start : start + TARGET]])
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad()
    return net.state_dict()


@pytest.mark.parametrize(
    ("kind", "engine", "lives"),
    [
        ("planned", "ddp", [(4, 3, 2), (3, 4, 0), (4, 2, 3), (1, 99, None)]),  # ranks, windows, who asks; four windows are an epoch
        ("learned", "ddp", [(3, 5, 1), (4, 99, None)]),
        ("planned", "fsdp2", [(3, 5, 0), (2, 99, None)]),
    ],
)
def test_a_job_goes_on_with_other_ranks_in_mid_epoch(tmp_path, kind, engine, lives):
    samples = []
    for world, windows, asks in lives:
        told = in_ranks("going_on", kind, engine, str(tmp_path), windows, asks, world=world)
        for rank in told:
            assert "raised" not in rank, rank
            assert rank["stopping"] == (asks is not None) and rank["samples"] == told[0]["samples"] and rank["loop"] == told[0]["loop"]
        samples += told[0]["samples"]
    assert samples == WINDOWS
    expected = undisturbed(shuffled=kind == "planned")
    found = torch.load(tmp_path / "run.pt", weights_only=False)
    assert max(float((found["model"][name] - value).abs().max()) for name, value in expected.items()) < 1e-12
    assert found["loop"]["windows"] == len(WINDOWS)


def loop_and_loader(loader=None, **given):
    data = TensorDataset(*jobs.pairs(100))
    plan = by_hand(None, 24, 9)
    return autoaccum.Accumulator(jobs.small(), plan, **given), loader or DataLoader(data, batch_sampler=plan.batch_sampler(data, seed=1))


def test_a_signal_ends_the_loop_after_the_window_that_runs_and_a_second_one_does_what_it_did_before(caplog):
    loop, loader = loop_and_loader()
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        loop.stop_at_window_end(signal.SIGUSR1)
        done = 0
        for window in loop.windows(loader):
            if done == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            loop.step(window)
            done += 1
        assert done == 2 and loop.is_stopping and not heard
        assert "stopped after window 2, as SIGUSR1 asked" in caplog.text
        assert list(loop.windows(loader)) == []  # further epochs are none
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_loop_on_one_rank_that_is_asked_between_two_windows_runs_no_other():
    loop, loader = loop_and_loader()
    for done, window in enumerate(loop.windows(loader), 1):
        loop.step(window)
        if done == 3:
            loop.stop_at_window_end()
    assert loop.is_stopping and loop.state_dict()["windows"] == 3


def test_signals_belong_to_the_main_thread():
    loop, _ = loop_and_loader()
    raised = []

    def ask():
        try:
            loop.stop_at_window_end(signal.SIGUSR1)
        except autoaccum.UsageError as error:
            raised.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "main thread" in raised[0]


def test_the_state_is_that_of_the_last_finished_window_however_far_the_loader_has_read():
    loop, loader = loop_and_loader()
    windows = iter(loop.windows(loader))
    loop.step(next(windows))
    next(windows)  # read, and never run
    state = loop.state_dict()
    assert state["windows"] == 1 and state["place"]["done"] == 24
    again, loader = loop_and_loader()
    again.load_state_dict(state)
    assert [again.step(window).samples for window in again.windows(loader)] == [24, 24, 24, 4]
    assert again.epoch == 0 and len([again.step(window) for window in again.windows(loader)]) == 5 and again.epoch == 1


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_plain_loader_is_read_again_up_to_the_place_unless_it_shuffles(shuffled):
    data = TensorDataset(torch.arange(100.0)[:, None].expand(100, 8).clone(), torch.zeros(100, 1))
    loop, loader = loop_and_loader(DataLoader(data, batch_size=16, shuffle=shuffled))
    windows = iter(loop.windows(loader))
    for _ in range(2):
        loop.step(next(windows))
    if shuffled:
        with pytest.raises(autoaccum.PlanError, match="shuffles by itself"):
            loop.state_dict()
        return
    again, _ = loop_and_loader(loader)
    again.load_state_dict(loop.state_dict())
    rest = list(again.windows(loader))
    assert [window.samples for window in rest] == [24, 24, 4] and rest[0].parts[0][0][0, 0] == 48
    assert [again.step(window).samples for window in again.windows(loader)] == [24, 24, 24, 24, 4] and again.epoch == 1


def test_states_of_something_else_are_refused_in_a_sentence():
    loop, loader = loop_and_loader()
    with pytest.raises(autoaccum.PlanError, match="no state of an Accumulator"):
        loop.load_state_dict({"model": 1})
    for window in loop.windows(loader):
        loop.step(window)
    state = loop.state_dict()
    other = autoaccum.Accumulator(jobs.small(), by_hand(None, 12, 9))
    with pytest.raises(autoaccum.PlanError, match="windows of 24, and this loop's target is 12"):
        other.load_state_dict(state)
    plain, _ = loop_and_loader()
    plain.load_state_dict(state)
    with pytest.raises(autoaccum.PlanError, match="same kind of loader"):
        plain.windows(DataLoader(TensorDataset(*jobs.pairs(100)), batch_size=10))
    by_batch, _ = loop_and_loader()
    by_batch.step(jobs.pairs(24))
    with pytest.raises(autoaccum.PlanError, match=r"loop over loop\.windows"):
        by_batch.state_dict()


@pytest.mark.parametrize(
    ("restarts", "shares", "store", "said"), [("3", None, "True", True), ("0", None, "True", False), ("3", "1", "True", False), ("3", None, None, False)]
)
def test_workers_that_would_hang_after_a_restart_are_warned_of(monkeypatch, restarts, shares, store, said):
    for name, value in (("MAX_RESTARTS", restarts), ("USE_AGENT_STORE", store)):
        if value is None:
            monkeypatch.delenv(f"TORCHELASTIC_{name}", raising=False)
        else:
            monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    if shares is None:
        monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    else:
        monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", shares)
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in environment.restart_hazard()) == said
