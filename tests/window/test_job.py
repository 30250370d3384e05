from typing import Literal

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.window import source
from autoaccum.window.job import FINGERPRINTED, as_jobs, differing, fingerprint
from tests import jobs


def test_a_file_a_module_and_the_demo_are_sources():
    assert source.parse_source(None).label == source.parse_source("demo").label == "demo"
    assert source.parse_source("examples/tiny_gpt.py").parts == ("examples/tiny_gpt.py", "make_job")
    assert source.parse_source("examples/tiny_gpt.py:other").parts == ("examples/tiny_gpt.py", "other")
    assert source.parse_source("package.module:make").parts == ("package.module", "make")


def test_settings_are_literals_where_they_can_be_read_as_one():
    found = source.parse_source("demo", ["width=64", "rate=1e-3", "name=adam", "shape=(2, 3)", "on=True", "text='7'", "empty=", "a=b=c"])
    assert found.settings == {"width": 64, "rate": 1e-3, "name": "adam", "shape": (2, 3), "on": True, "text": "7", "empty": "", "a": "b=c"}


def test_a_function_with_a_parameter_device_gets_it(tmp_path):
    path = tmp_path / "asks.py"
    path.write_text("from tests import jobs\nseen = []\ndef make_job(device):\n    seen.append(device)\n    return jobs.small()\n")
    source.load(str(path), device="cpu")
    import asks

    assert asks.seen == ["cpu"]


def test_moving_a_job_keeps_its_parameters_and_takes_its_optimizer_state_along():
    whole = jobs.small()
    jobs.mse(whole.model, whole.batch).backward()
    whole.optimizer.step()
    before = list(whole.model.parameters())
    whole.moved("cpu")
    assert all(a is b for a, b in zip(before, whole.model.parameters())) and whole.optimizer.state


def test_the_fingerprint_changes_with_what_changes_the_answer():
    def of(width=16, optimizer=torch.optim.Adam, **given):
        model = nn.Linear(8, width)
        return fingerprint([autoaccum.Job(model, optimizer(model.parameters()), jobs.mse, jobs.pairs(2), **given)])

    assert of() == of()
    others = [of(width=17), of(optimizer=torch.optim.SGD), of(autocast=torch.bfloat16), of(max_grad_norm=1.0)]
    assert len({of(), *others}) == 5
    assert [differing(of(), other) for other in others] == [(name,) for name in FINGERPRINTED[:4]]
    assert differing("0123456789abcdef", of()) == FINGERPRINTED  # a plan whose fingerprint is of another form


def test_lbfgs_stands_alone_and_without_a_scaler():
    model = nn.Linear(8, 1)
    lbfgs, adam = torch.optim.LBFGS(model.parameters()), torch.optim.Adam(model.parameters())
    with pytest.raises(autoaccum.JobError, match=r"LBFGS evaluates the loss inside step.* give it alone"):
        autoaccum.Job(model, [adam, lbfgs], jobs.mse, jobs.pairs(4))
    with pytest.raises(autoaccum.JobError, match="GradScaler cannot unscale"):
        autoaccum.Job(model, lbfgs, jobs.mse, jobs.pairs(4), scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("wrong", [42, [], [42]])
def test_jobs_in_turn_are_jobs(wrong):
    with pytest.raises(autoaccum.JobError, match="a Job or a list of Jobs"):
        as_jobs(wrong)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model": "gpt2"}, "model must be a torch.nn.Module, not str"),
        ({"optimizer": 0.1}, "optimizer must be"),
        ({"optimizer": []}, "optimizer must be"),
        ({"loss": "mse"}, "loss must be a function"),
        ({"batch": None}, "batch is None"),
        ({"autocast": "bf16"}, "autocast must be a torch dtype"),
    ],
)
def test_parts_of_the_wrong_kind_are_told(given, says):
    model = nn.Linear(8, 1)
    parts = {"model": model, "optimizer": torch.optim.SGD(model.parameters()), "loss": jobs.mse, "batch": jobs.pairs(2)} | given
    with pytest.raises(autoaccum.JobError, match=says):
        autoaccum.Job(**parts)


def test_an_optimizer_of_another_model_is_told():
    with pytest.raises(autoaccum.JobError, match="holds none of the model's parameters"):
        autoaccum.Job(nn.Linear(8, 1), torch.optim.SGD(nn.Linear(8, 1).parameters()), jobs.mse, jobs.pairs(2))


def test_a_model_that_trains_nothing_is_told():
    model = nn.Linear(8, 1).requires_grad_(False)
    with pytest.raises(autoaccum.JobError, match="no parameter of the model requires a gradient"):
        _ = autoaccum.Job(model, torch.optim.SGD(model.parameters()), jobs.mse, jobs.pairs(2)).device


def test_loading_leaves_the_arguments_of_this_process_alone():
    import sys

    before = list(sys.argv)
    source.load(source.Source("tests/jobs.py:small", {}, ("--mine",)), device="cpu")
    assert sys.argv == before


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_grad_norm": -1.0}, "above 0, or None for no clipping, not -1.0"),
        ({"max_grad_norm": True}, "max_grad_norm"),
        ({"count": 5}, "count must be a function"),
        ({"split": "rows"}, "split must be a function"),
        ({"keep": nn.Linear(1, 1)}, r"keep must be a list .* keep=\[\.\.\.\]"),
        ({"scheduler": 1}, "scheduler must be a learning rate scheduler"),
        ({"scaler": True}, "scaler must be a torch.amp.GradScaler"),
    ],
)
def test_settings_of_the_wrong_kind_are_told_before_anything_trains(given, says):
    with pytest.raises(autoaccum.JobError, match=says):
        jobs.small(**given)


def test_a_scheduler_that_needs_a_figure_is_left_to_its_owner():
    job = jobs.small()
    with pytest.raises(autoaccum.JobError, match="ReduceLROnPlateau steps on a figure that only you have"):
        jobs.small(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(job.optimizer))


class Sam(torch.optim.SGD):
    """Sharpness-aware minimisation in two steps, which falls back to a plain step without a closure."""

    def first_step(self): ...

    def second_step(self): ...


def test_an_optimizer_that_evaluates_again_is_refused_beside_others_and_taken_alone():
    model = nn.Linear(4, 2)
    sam, other = Sam([model.weight], lr=0.1), torch.optim.SGD([model.bias], lr=0.1)
    with pytest.raises(autoaccum.JobError, match=r"Sam evaluates the loss inside step.* give it alone"):
        autoaccum.Job(model, [sam, other], lambda model, batch: model(batch).mean(), torch.randn(4, 4))
    autoaccum.Job(model, sam, lambda model, batch: model(batch).mean(), torch.randn(4, 4))


def settings_job(
    flag: bool = True, layers: int = 2, rate: float = 0.1, name="adam", sizes: tuple = (1,), mode: Literal["a", "b"] = "a", extra: int | None = 3, free=None
):
    raise AssertionError((flag, layers, rate, name, sizes, mode, extra, free))


@pytest.mark.parametrize(
    ("text", "position", "value"),
    [
        *[(f"flag={word}", 0, False) for word in ("false", "False", "no", "off", "0")],
        *[(f"flag={word}", 0, True) for word in ("true", "yes", "on", "1")],
        ("layers=4", 1, 4),
        ("layers=4.0", 1, 4),
        ("rate=1", 2, 1.0),
        ("rate=1e-3", 2, 1e-3),
        ("name=007", 3, "007"),
        ("name=true", 3, "true"),
        ("sizes=[3, 4]", 4, (3, 4)),
        ("mode=b", 5, "b"),
        ("extra=none", 6, None),
        ("extra=5", 6, 5),
        ("free=false", 7, False),
        ("free=word", 7, "word"),
        ("free=none", 7, None),
    ],
)
def test_settings_become_what_the_function_takes(text, position, value):
    origin = source.parse_source("tests.window.test_job:settings_job", [text])
    with pytest.raises(AssertionError) as raised:
        source.load(origin)
    found = raised.value.args[0][position]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("text", "says"), [("flag=maybe", "flag takes bool.*write true or false"), ("layers=four", "layers takes int"), ("layers=1.5", "layers takes int"),
                                            ("rate=fast", "rate takes float"), ("sizes=3", "sizes takes tuple"), ("mode=c", "mode takes")])  # fmt: skip
def test_a_setting_that_cannot_be_converted_is_an_error(text, says):
    with pytest.raises(autoaccum.UsageError, match=says):
        source.load(source.parse_source("tests.window.test_job:settings_job", [text]))
