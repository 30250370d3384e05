"""A Trainer's checkpoint from the middle of an epoch goes on with other micro-batches and on other ranks, in the same windows of samples."""

import json
import socket

import pytest

from tests import forked
from tests.command_line import ROOT

pytest.importorskip("transformers", reason="transformers is not installed")
PROGRAM = ROOT / "tests/integrations/resumed.py"


def ended(*words, ranks=1):
    variables = [{}]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = [{name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()} for rank in range(ranks)]
    done = forked.run(PROGRAM, *words, copies=variables, imports=["transformers.trainer", "tests.plans", "autoaccum.integrations.huggingface"])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("told:")[1].splitlines()[0])


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """An undisturbed run, which left a checkpoint after 6 of its 12 windows, in the middle of the second epoch."""
    folder = tmp_path_factory.mktemp("begun")
    return ended(folder, 64, 16, "6,5,5"), folder / "checkpoint-6"


@pytest.mark.parametrize(("sizes", "ranks"), [("4,4,4,4", 1), ("16", 1), ("equal", 2)])
def test_it_goes_on_with_other_micro_batches_and_ranks(begun, tmp_path, sizes, ranks):
    whole, checkpoint = begun
    gone_on = ended(tmp_path, 64, 16, sizes, checkpoint, ranks=ranks)
    assert gone_on["steps"] == whole["steps"] == 12
    assert gone_on["parameters"] == pytest.approx(whole["parameters"], rel=0, abs=1e-12)


def test_the_last_smaller_window_is_the_same_too(tmp_path):
    whole = ended(tmp_path / "whole", 70, 16, "6,5,5")
    for sizes in ("16", "4,4,4,4"):
        gone_on = ended(tmp_path / sizes, 70, 16, sizes, tmp_path / "whole" / "checkpoint-6")
        assert gone_on["steps"] == whole["steps"] == 15
        assert gone_on["parameters"] == pytest.approx(whole["parameters"], rel=0, abs=1e-12)


def test_an_unfinished_window_is_dropped_as_a_whole(tmp_path):
    """Also with equal micro-batches, of which a Trainer alone leaves out the last: 79 samples at 4 x 4 would end with three of 4."""
    drop = "dataloader_drop_last=true"
    whole = ended(tmp_path / "whole", 79, 16, "6,5,5", drop)
    assert whole["steps"] == 12
    for sizes, ranks in (("4,4,4,4", 1), ("16", 1), ("equal", 2)):
        assert ended(tmp_path / sizes, 79, 16, sizes, drop, ranks=ranks)["parameters"] == pytest.approx(whole["parameters"], rel=0, abs=1e-12)
        gone_on = ended(tmp_path / sizes, 79, 16, sizes, tmp_path / "whole" / "checkpoint-6", drop, ranks=ranks)
        assert gone_on["steps"] == 12
        assert gone_on["parameters"] == pytest.approx(whole["parameters"], rel=0, abs=1e-12)


def test_no_window_left_is_told(tmp_path):
    for sizes in ("4,4,4,4", "6,5,5"):
        assert "fewer samples than the target batch of 16" in ended(tmp_path, 15, 16, sizes, "dataloader_drop_last=true")["raised"]


def test_an_order_that_cannot_be_found_again_is_warned_of(tmp_path):
    """Transformers itself draws another order for the second epoch; in the first the order is the same again."""
    settings = ('accelerator_config={"use_seedable_sampler": false}', "save_steps=2")
    whole = ended(tmp_path / "whole", 64, 16, "4,4,4,4", *settings)
    assert not whole["warned"]
    first, second = (ended(tmp_path / str(step), 64, 16, "4,4,4,4", tmp_path / "whole" / f"checkpoint-{step}", *settings) for step in (2, 6))
    assert first["parameters"] == pytest.approx(whole["parameters"], rel=0, abs=1e-12) and not first["warned"]
    assert second["parameters"] != pytest.approx(whole["parameters"], rel=0, abs=1e-4)
    assert "draws another order" in second["warned"][0]


def test_another_target_is_refused_and_the_remedy_works(begun, tmp_path):
    whole, checkpoint = begun
    told = ended(tmp_path, 64, 8, "4,4", checkpoint)
    assert "was written after 6 windows of 16 samples, and windows here have 8" in told["raised"] and "go on with target_batch=16" in told["raised"]
    assert ended(tmp_path, 64, 16, "6,5,5", checkpoint)["parameters"] == pytest.approx(whole["parameters"], rel=0, abs=1e-12)
