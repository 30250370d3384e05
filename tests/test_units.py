import pytest

from autoaccum.errors import UsageError
from autoaccum.units import GIB, KIB, MIB, in_words, parse_headroom, parse_size, seconds_in_words, unit_of_all


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("512MiB", 512 * MIB), ("2GiB", 2 * GIB), ("1.5GB", 1_500_000_000), ("1.5gib", 3 * GIB // 2), ("7", 7), (7, 7), ("2g", 2 * GIB), (" 3 kB ", 3000)],
)
def test_sizes_are_read_as_they_are_written(text, bytes_):
    assert parse_size(text) == bytes_


@pytest.mark.parametrize("text", ["", "many", "-1GiB", "0", "0MiB", "1.2.3", "5 parsecs", "1e3", None, True])
def test_what_is_not_a_size_is_told_with_its_value(text):
    with pytest.raises(UsageError, match=r".+") as raised:
        parse_size(text)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize(("text", "bytes_"), [("3%", 30), ("0", 0), ("0%", 0), ("2.5%", 25)])
def test_headroom_is_a_size_or_a_percentage(text, bytes_):
    assert parse_headroom(text, 1000) == bytes_


@pytest.mark.parametrize("text", ["100%", "250%", "1000", "3", "2KiB", "x%", "-3%"])
def test_headroom_that_leaves_nothing_is_refused(text):
    with pytest.raises(UsageError):
        parse_headroom(text, 1000)


def test_figures_are_shown_in_the_unit_that_suits_them():
    assert in_words(42_305_600_000) == "39.4 GiB"
    assert in_words(613 * MIB) == "613 MiB"
    assert in_words(12) == "12 B"
    assert in_words(100 * MIB, "GiB") == "0.1 GiB"
    assert [seconds_in_words(s) for s in (0.42, 9.2, 125, 120)] == ["0.4 s", "9 s", "2 min 5 s", "2 min"]


def test_sizes_that_are_read_together_share_a_unit_in_which_none_is_nought():
    assert unit_of_all([14 * GIB, GIB // 2]) == "GiB"
    assert unit_of_all([14 * GIB, 20 * MIB]) == "MiB"
    assert unit_of_all([14 * GIB, 0, 3 * KIB]) == "KiB"
    assert unit_of_all([3 * MIB, 100]) == "KiB" and unit_of_all([]) == "B"
