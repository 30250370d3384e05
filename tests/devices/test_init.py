"""Which devices are here, and how they are asked for."""

from __future__ import annotations

import glob
import sys

import pytest
import torch

from autoaccum import devices
from autoaccum.errors import NoSuchDevice
from tests.devices.fresh import fresh

no_driver = pytest.mark.skipif(devices.accelerator_driver(), reason="an accelerator's driver is here")


def machine(monkeypatch: pytest.MonkeyPatch, *files: str, cards: int) -> None:
    """Makes this a Linux machine with these device files and a torch that sees so many CUDA cards."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(glob, "glob", lambda pattern: [pattern] if pattern in files else [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)


def test_auto_is_the_first_that_is_here() -> None:
    assert devices.get("auto").facts.label == devices.get().facts.label == devices.here()[0]


def test_the_cpu_is_always_here_and_last() -> None:
    assert devices.here()[-1] == devices.get("cpu").facts.label == "cpu"


def test_cards_are_numbered_and_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "/dev/nvidiactl", cards=2)
    assert devices.here() == ["cuda:0", "cuda:1", "cpu"]


@pytest.mark.parametrize("driver", ["/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu", "/dev/kfd"])
def test_a_driver_is_found_on_linux_wsl2_jetson_and_rocm(monkeypatch: pytest.MonkeyPatch, driver: str) -> None:
    machine(monkeypatch, driver, cards=1)
    assert devices.accelerator_driver()
    assert devices.here() == ["cuda:0", "cpu"]


def test_a_driver_without_a_torch_that_can_use_it_leaves_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "/dev/nvidiactl", cards=0)
    assert devices.here() == ["cpu"]


def test_a_card_that_is_not_here_is_an_error_that_says_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "/dev/nvidiactl", cards=2)
    with pytest.raises(NoSuchDevice, match="no cuda:7 here; devices: cuda:0, cuda:1, cpu") as raised:
        devices.get("cuda:7")
    assert raised.value.exit_code == 4


@pytest.mark.parametrize("label", ["cuda", "cuda:0", "xpu", "mps"])
def test_a_kind_that_is_not_here_is_an_error_that_says_what_is(monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    machine(monkeypatch, cards=0)
    with pytest.raises(NoSuchDevice, match=f"no {label} here; devices: cpu"):
        devices.get(label)


@pytest.mark.parametrize("label", ["", "gpu", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:one", "cuda:0 ", "cuda:0\n", "auto:0", "cuda,cpu"])
def test_a_label_that_means_nothing_is_an_error_that_shows_it_and_what_may_be_written(label: str) -> None:
    with pytest.raises(NoSuchDevice) as raised:
        devices.get(label)
    assert repr(label) in str(raised.value)
    assert "cuda:INDEX" in str(raised.value)


def test_the_list_has_a_reading_of_every_device_here() -> None:
    listed = devices.list()
    assert [facts.label for facts, _ in listed] == devices.here()
    assert all(memory.total_bytes > 0 for _, memory in listed)


@no_driver
def test_without_a_driver_devices_are_listed_without_importing_torch() -> None:
    """Importing torch takes seconds; a list of devices need not."""
    seen = fresh(
        """
import json, sys
from autoaccum import devices
labels = [facts.label for facts, memory in devices.list()]
print(json.dumps([labels, "torch" in sys.modules]))
"""
    )
    assert seen == [["cpu"], False]


@no_driver
def test_the_command_lists_devices_without_importing_torch() -> None:
    seen = fresh(
        """
import contextlib, io, json, runpy, sys
sys.argv = ["autoaccum", "devices", "--json"]
printed, code = io.StringIO(), None
with contextlib.redirect_stdout(printed):
    try:
        runpy.run_module("autoaccum", run_name="__main__")
    except SystemExit as exit:
        code = exit.code
print(json.dumps({"code": code, "torch": "torch" in sys.modules, "document": json.loads(printed.getvalue())}))
"""
    )
    assert (seen["code"] or 0, seen["torch"]) == (0, False)
    (cpu,) = seen["document"]["devices"]
    assert cpu["kind"] == "cpu"
    assert 0 < cpu["free_bytes"] <= cpu["total_bytes"]
