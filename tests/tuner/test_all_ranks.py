"""`tune` on several ranks, with limits that the system enforces, and what is refused."""

import os
import sys

import pytest

import autoaccum
from tests.command_line import ROOT, document
from tests.ranked import in_ranks


def test_a_limit_on_one_rank_shares_out_trains_and_is_lowered_in_mid_run():
    told = in_ranks("tuned_and_trained", 60, 50, 9, True, {"max_micro_batch": 24}, timeout=280)
    for rank in told:
        assert "raised" not in rank, rank
        assert sum(rank["shares"]) == 60 and rank["shares"] == told[0]["shares"] and rank["untouched"]
        assert rank["windows"] == 54 and rank["difference"] < 1e-12, rank
        assert rank["most"] == told[0]["most"] and rank["most"][2] < 24 == rank["most"][0]
    assert sum(told[2]["micro_batches"]) == told[2]["shares"][2] > 0
    # With 9 MiB above what is held, a thread's own heap may cost the first window a rescue; afterwards nothing runs out until the limit falls.
    assert not any(told[2]["rescued"][1:50]) and told[2]["rescued"][50]
    assert not any(told[0]["rescued"] + told[1]["rescued"])


def test_a_rank_that_cannot_hold_one_sample_is_planned_out():
    told = in_ranks("tuned_and_trained", 60, 2, None, False, {"max_micro_batch": 2}, 80, timeout=280)
    for rank in told:
        assert "raised" not in rank, rank
        assert rank["shares"][2] == 0 and sum(rank["shares"]) == 60 and rank["difference"] < 1e-12
        assert "rank 2 cannot hold one sample: no share there, and the others carry all" in rank["warnings"]
        assert "rank 2, " in rank["said"] and "cannot hold one sample" in rank["said"]
    assert told[2]["micro_batches"] == []


def test_equal_is_one_size_for_all():
    told = in_ranks("tuned_and_trained", 60, 2, None, False, {"equal": True}, timeout=280)
    sizes = {tuple(rank["micro_batches"]) for rank in told}
    assert len(sizes) == 1 and sum(sizes.pop()) == 20 and told[0]["shares"] == [20, 20, 20]
    assert all(rank["difference"] < 1e-12 for rank in told)


def test_batch_norm_never_gets_one_sample_alone():
    told = in_ranks("tuned_with_batch_norm", 21, 3, {})
    assert told[0][0] == told[1][0] == told[2][0]
    for shares, sizes, tails in told:
        assert sum(shares) == 21 and min(sizes, default=2) >= 2
        for samples, cuts in enumerate(tails, 2):
            assert sum(map(sum, cuts)) == samples and min(size for cut in cuts for size in cut) >= 2, (samples, cuts)


def test_refusals_are_one_sentence_on_every_rank():
    told = in_ranks("refusals")
    for rank, said in enumerate(told):
        assert "raised" not in said, said
        assert said["not wrapped"].startswith("UsageError: the plan is for 3 ranks, and the model does not cross them")
        assert "static_graph=True) cannot accumulate" in said["static graph"]
        assert "DataParallel splits batches evenly in one process" in said["data parallel"]
        assert "a part of the model is wrapped" in said["a part wrapped"]
        assert "the plan is for one" in said["a plan of one"]
        assert "the plan is for one" in said["a plan of one, sharded"]
        assert f"this is rank {rank} of 3" in said["another rank's plan"]
        assert said["synced norms"].startswith("UsageError: SyncBatchNorm (1) communicates in forward")
        assert "call tune() before fully_shard(model)" in said["tune sharded"]
        assert "use bfloat16 with FSDP2" in said["scaler and sharded"]
        assert said["targets differ"].startswith("RanksDisagree: ranks disagree on target_batch: rank 1 has 61, the others 60")
        assert said["models differ"].startswith("RanksDisagree: ranks disagree on the model")
        assert "61 cannot be shared equally by 3 ranks: 60 and 63 do" in said["equal"]
        assert said["a rank's job fails"].startswith(
            "KeyError" if rank == 1 else "RanksDisagree: rank 1 failed while looking for its largest micro-batch: KeyError"
        )
        assert said["too many"].startswith("PlanError: the loader of rank 0 gives 60 samples a step, and its share is 35")
        assert said["shared out already"].startswith("PlanError: the ranks' loaders give unlike samples") and said["the same everywhere"] is None
        assert said["join"].startswith("UsageError: Join makes up for ranks")
        assert said["too few once"] is None and "twice in a row" in said["too few twice"]


def torchrun(*words, ranks=2, timeout=200):
    import subprocess

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_command_line_under_torchrun_answers_once(tmp_path):
    path = tmp_path / "plan.json"
    done = torchrun("-m", "autoaccum", "tune", "-b", 127, "--max-micro-batch", 20, "--json", "-o", path, "-q")
    assert done.returncode == 0, done.stderr[-2000:]
    told = document(done)
    assert sum(told["shares"]) == told["target_batch"] == told["effective_batch"] == 127 and told["world_size"] == 2
    plan = autoaccum.Plan.load(path)
    assert plan.shares == tuple(told["shares"]) and plan.of_rank(1).share == plan.shares[1]
    assert sum(plan.of_rank(1).micro_batches) == plan.shares[1]


@pytest.mark.parametrize(("words", "said"), [(("train", "-b", 8), "train runs in one process"), (("check", "-b", 8, "-m", 4), "check rehearses on one device")])
def test_commands_of_one_process_say_so_under_torchrun(words, said):
    done = torchrun("-m", "autoaccum", *words)
    assert done.returncode != 0 and said in done.stderr
