"""Pictures are drawn and say what the plan says; what they look like was looked at."""

import re
from dataclasses import replace

import pytest

import autoaccum
from autoaccum.plan import explanation
from tests.plan.test_plan import T4, tried

GIB = 2**30


def timed(size, rate):
    return replace(tried(size, 512 // size, "fits", "step", int((2 + size * 0.27) * GIB)), samples_per_second=rate, full=True)


def test_a_picture_of_the_search_names_what_it_shows(tmp_path):
    replace(T4, trials=(*T4.trials, timed(10, 9.0), timed(20, 11.0), timed(30, 12.0))).plot(tmp_path / "search.svg")
    words = re.findall(r">([^<>]+)</text>", (tmp_path / "search.svg").read_text())
    for word in ("512 = 40 x 5 + 39 x 8 on Tesla T4", "peak, GiB", "micro-batch, samples", "time per sample, ms", "budget", "chosen", "does not fit"):
        assert word in words, words
    T4.plot(tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(autoaccum.UsageError, match=r"not .*search\.gif"):
        T4.plot(tmp_path / "search.gif")


def test_a_chart_fits_its_terminal_and_ends_at_the_budget():
    plan = replace(T4, trials=(*T4.trials, timed(10, 9.0), timed(20, 11.0)))
    for columns in (100, 140):
        lines = list(explanation.chart(plan, columns))
        assert all(len(line) <= columns for line in lines) and len({line.index("│") for line in lines}) == 1
        assert any(line.endswith("12.9 GiB  <- chosen") for line in lines) and any("ran out in backward" in line for line in lines)
    assert not list(explanation.chart(replace(T4, trials=()), 100))
