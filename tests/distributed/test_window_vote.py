"""The gradient over unlike ranks equals one process's, whatever the shares, the engine and what goes wrong."""

import pytest

from tests.ranked import in_ranks

SHARES, MOST = [70, 35, 15], [35, 35, 4]


def cases(losses=("by_sample", "summed", "counted"), carefuls=(None, 0, 1), **more):
    found = {}
    for loss in losses:
        for careful in carefuls:
            # Windows of 120, 120 and a tail of 37; then ranks without a share, first and last, and a tail of 2.
            found[f"{loss} {careful}"] = {"shares": SHARES, "most": MOST, "loss": loss, "careful": careful, "samples": 277, **more}
    for careful in carefuls:
        found[f"none for the last {careful}"] = {"shares": [80, 40, 0], "most": MOST, "loss": "summed", "careful": careful, "samples": 242, **more}
        found[f"none for the first {careful}"] = {"shares": [0, 40, 80], "most": [1, 40, 30], "loss": "by_sample", "careful": careful, "samples": 242, **more}
    return found


def check(told, windows):
    for rank in told:
        assert "raised" not in rank, rank
        for name, found in rank.items():
            assert found["windows"] == windows, name
            assert max(found["parameters"], found["losses"], found["norms"]) < 1e-14, (name, found)


def test_ddp_over_unlike_ranks_equals_one_process():
    told = in_ranks("exact", "ddp", cases())
    check(told, windows=3)
    assert [rank["summed None"]["steps"][0] for rank in told] == [2, 1, 4]
    assert told[2]["summed None"]["samples"] == [120, 120, 37]
    assert told[2]["none for the last 0"]["steps"] == [0, 0, 0] or told[2]["none for the last 0"]["steps"][0] == 0


def test_fsdp2_over_unlike_ranks_equals_one_process():
    check(in_ranks("exact", "fsdp2", cases(losses=("by_sample", "summed"))), windows=3)


def test_lockstep_resharding_equals_one_process():
    """Every rank runs as many micro-steps, those without samples one of no weight."""
    lockstep = {
        "two": {"shares": SHARES, "most": [35, 18, 8], "steps": 2, "loss": "by_sample", "careful": 3, "samples": 277},
        "four": {"shares": SHARES, "most": [40, 20, 8], "steps": 4, "loss": "summed", "careful": 0, "samples": 277},
        "counted": {"shares": [119, 1, 0], "most": [40, 20, 8], "steps": 3, "loss": "counted", "careful": 0, "samples": 242},
        "sitting out": {"shares": [119, 1, 0], "most": [40, 20, 8], "steps": 3, "loss": "summed", "careful": 0, "samples": 242},
    }
    told = in_ranks("exact", "fsdp2", lockstep)
    check(told, windows=3)
    assert [rank["sitting out"]["steps"][0] for rank in told] == [3, 3, 3]


def test_ddp_with_parameters_that_may_be_unused_and_bucket_views():
    more = {"unused": {"find_unused_parameters": True}, "views": {"gradient_as_bucket_view": True}, "no buffers": {"broadcast_buffers": False}}
    told = {
        f"{name} {careful}": {"shares": shares, "most": MOST, "loss": "summed", "careful": careful, "samples": 242, "ddp": given}
        for name, given in more.items()
        for careful in (None, 0)
        for shares in ([70, 35, 15],)
    }
    check(in_ranks("exact", "ddp", told), windows=3)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_new_plan_every_window_changes_nothing(engine):
    for told in in_ranks("new_plan_every_window", engine):
        assert told["difference"] < 1e-14 and told["alike"], told


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_loop_by_hand(engine):
    for told in in_ranks("by_hand_loop", engine, False):
        assert told < 1e-14


def test_several_jobs_run_in_turn_over_ranks():
    assert max(in_ranks("two_jobs_in_turn")) < 1e-14


def test_an_inf_on_one_rank_skips_the_window_on_all():
    for told in in_ranks("an_inf_on_one_rank"):
        assert told["skipped"] == [True, False, False, True, False, False, False] and told["alike"] and told["finite"]


@pytest.mark.parametrize("careful", [None, 0])
@pytest.mark.parametrize("shares", [[30, 20, 10], [40, 20, 0]])
def test_buffers_cross_once_a_window_and_nothing_hangs(careful, shares):
    for told in in_ranks("with_batch_norm", careful, shares):
        assert "raised" not in told and told["alike"] and told["losses"][-1] < told["losses"][0], told


def test_the_usual_weighting_is_wrong_and_this_notices():
    assert min(in_ranks("by_hand_loop", "ddp", True)) > 1e-3


@pytest.mark.parametrize(("where", "careful"), [("forward", None), ("backward", None), ("backward", 1)])
def test_an_out_of_memory_on_one_rank_is_its_own_business(where, careful):
    told = in_ranks("limited", "ddp", where, careful, 11)
    assert all(rank["difference"] < 1e-12 for rank in told), told
    assert told[2]["rescued"][2].startswith(f"out of memory in {where} of micro-batch 1 of 3 x 2 + 2 x 1")
    assert told[2]["micro_batches"][:2] == [3, 3] and told[2]["micro_batches"][2] > 3
    assert not any(told[0]["rescued"] + told[1]["rescued"])


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_fsdp2_runs_the_window_again_on_all_ranks(where):
    told = in_ranks("limited", "fsdp2", where, None, 11)
    assert all(rank["difference"] < 1e-12 for rank in told), told
    assert told[2]["rescued"][2].startswith(f"out of memory in {where}")
    assert not any(told[0]["rescued"] + told[1]["rescued"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_rank_that_cannot_hold_one_sample_any_more_hands_its_samples_over(engine):
    told = in_ranks("limited", engine, "forward", None, 2, 60)
    assert all(rank["difference"] < 1e-12 for rank in told), told
    assert told[2]["micro_batches"] == [3, 3, 0, 0, 0, 0]
    assert sum(told[0]["micro_batches"]) + sum(told[1]["micro_batches"]) > 12 + 6


@pytest.mark.parametrize(
    ("engine", "shares", "most", "calls"),
    [
        ("ddp", [35, 17, 8], [20, 17, 3], {"2": [0]}),  # the very first forward
        ("fsdp2", [40, 20, 0], [20, 10, 3], {"0": [0]}),  # the others have run nothing yet, one of them never does
        ("fsdp2", [35, 17, 8], [20, 17, 3], {"2": [0], "1": list(range(10))}),  # one runs smaller, one not at all any more
        ("ddp", [35, 17, 8], [20, 17, 3], {"0": list(range(40)), "2": [4, 5]}),
    ],
)
def test_out_of_memory_in_the_first_windows(engine, shares, most, calls):
    for told in in_ranks("running_out", engine, shares, most, calls):
        assert "raised" not in told and told["difference"] < 1e-12, told


def test_in_an_optimizers_step_an_out_of_memory_is_the_end_on_all_ranks():
    """LBFGS evaluates again while weights move: nothing can be repeated then."""
    told = in_ranks("running_out", "ddp", [20, 20, 20], [20, 20, 1], {"2": [45]}, None, "lbfgs")
    assert told[2]["raised"] == "OutOfMemoryError" and "weights may have changed" in told[2]["notes"][0]
    assert told[0]["raised"] == told[1]["raised"] == "RanksDisagree" and "rank 2 failed" in told[0]["message"]


@pytest.mark.parametrize(("engine", "careful", "steps"), [("ddp", 0, None), ("fsdp2", 0, None), ("fsdp2", None, None), ("fsdp2", 0, 4)])
def test_a_micro_batch_that_counts_nothing(engine, careful, steps):
    assert max(in_ranks("counting_nothing", engine, careful, steps)) < 1e-14


@pytest.mark.parametrize(("engine", "careful"), [("ddp", 0), ("fsdp2", 0), ("fsdp2", None)])
def test_nothing_is_left_of_a_window_that_failed(engine, careful):
    assert max(in_ranks("after_a_failure", engine, careful)) < 1e-14


def test_a_loop_by_hand_and_ours_on_one_sharded_model():
    assert max(in_ranks("by_hand_and_ours")) < 1e-14


def test_a_parameter_that_is_never_used_is_told_at_once():
    told = in_ranks("never_used")
    assert {rank["raised"] for rank in told} <= {"UsageError", "RanksDisagree"}, told
    assert "'extra.weight' and 1 more parameters got no gradient" in "".join(rank["message"] for rank in told)


@pytest.mark.parametrize(("how", "careful"), [("dies", None), ("fails", None), ("stays away", None), ("dies", 0)])
def test_a_rank_that_is_lost_ends_the_others_with_an_error_that_names_it(how, careful):
    told = in_ranks("ends_early", [1], how, careful)
    for rank in (0, 2):
        assert told[rank]["raised"] == "RanksDisagree" and told[rank]["seconds"] < 30, told[rank]
        assert "rank 1 " in told[rank]["message"] or (how != "fails" and "a rank did not come" in told[rank]["message"]), told[rank]["message"]
    if how == "fails":
        assert told[1]["raised"] == "ValueError"


def test_of_several_that_are_missing_none_is_said_to_have_ended_for_certain():
    """One of them may still run, and wait for this rank in a group of a longer timeout."""
    told = in_ranks("ends_early", [1, 2], "stays away", 0)
    assert told[0]["raised"] == "RanksDisagree" and told[0]["message"].startswith(("rank 1 or rank 2 did not come", "a rank did not come")), told[0]
