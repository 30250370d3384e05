"""The learning rate for another batch, and that nothing applies it."""

from pathlib import Path

import pytest

import autoaccum

PACKAGE = Path(autoaccum.__file__).parent


def test_linear_and_square_root():
    assert autoaccum.scale_lr(0.1, 256, 1024) == pytest.approx(0.4)
    assert autoaccum.scale_lr(0.1, 256, 1024, rule="sqrt") == pytest.approx(0.2)
    assert autoaccum.scale_lr(0.3, 64, 64) == 0.3


@pytest.mark.parametrize("wrong", [(0.1, 0, 8), (0.1, 8, 2.5), (0.1, 8, True), (-1, 8, 8), (0.1, 8, 8, "cubic")])
def test_bad_values_are_told(wrong):
    with pytest.raises(autoaccum.UsageError):
        autoaccum.scale_lr(*wrong)


def test_nothing_applies_it_silently():
    assert [path.name for path in PACKAGE.rglob("*.py") if "scale_lr(" in path.read_text()] == ["learning_rate.py"]
