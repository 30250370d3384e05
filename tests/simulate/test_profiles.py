import os
import subprocess
import sys

import pytest

from autoaccum.errors import ProfileError, UsageError
from autoaccum.simulate import profiles

GOOD = """
name = "A Card"
aliases = ["card"]
backend = "cuda"
architecture = "sm_80"
total_bytes = { value = 8589934592, source = "its data sheet" }
context_bytes = { value = 300000000, estimated = "as its siblings" }
cublas_workspace_bytes = { value = 8519680, source = "torch" }
flops_per_second.fp32 = { value = 10, source = "its data sheet" }
"""


@pytest.mark.parametrize("name", profiles.names())
def test_every_file_that_ships_is_right(name):
    found = profiles.load(name)
    assert found.label == name
    assert 0 < found.context_bytes < found.total_bytes < 300 * 2**30
    assert all(figure.source for _, figure in found.figures())


def test_the_most_used_cards_have_a_source_for_every_number_but_the_context():
    most_used = [
        "t4",
        "v100-16gb",
        "v100-32gb",
        "a100-40gb",
        "a100-80gb",
        "h100-sxm",
        "h100-pcie",
        "h200",
        "l4",
        "a10g",
        "rtx-3090",
        "rtx-4090",
        "rtx-3060-12gb",
        "l40s",
        "rtx-a6000",
    ]
    guessed = {(name, field) for name in most_used for field, figure in profiles.load(name).figures() if figure.estimated and field != "context_bytes"}
    assert guessed == set()


def test_forty_cards_and_no_spelling_means_two():
    assert len(profiles.names()) >= 40
    spellings = [spelling for name in profiles.names() for spelling in (name, *profiles.load(name).aliases)]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize(("spelling", "label"), [("T4", "t4"), ("Tesla T4", "t4"), ("tesla-t4", "t4"), ("rtx_4090", "rtx-4090"), ("A100-80GB", "a100-80gb")])
def test_spellings(spelling, label):
    assert profiles.load(spelling).label == label


def test_a_size_is_a_card_of_which_the_allocator_has_all():
    found = profiles.load("24GiB")
    assert (found.total_bytes, found.available_bytes, found.name) == (24 * 2**30, 24 * 2**30, "virtual GPU of 24.0 GiB")
    assert profiles.load("24 GiB").total_bytes == profiles.load("24g").total_bytes == found.total_bytes
    for number in ("3090", "2080ti"):
        with pytest.raises(UsageError, match=f"'{number}': the nearest are rtx-{number[:4]}"):
            profiles.load(number)


def test_an_unknown_card_gets_the_nearest_names():
    with pytest.raises(UsageError, match=r"no GPU data file for 'rtx 4099': the nearest are rtx-4090"):
        profiles.load("rtx 4099")
    with pytest.raises(UsageError, match=r"'a100': the nearest are a100-[48]0gb"):
        profiles.load("a100")


def test_two_cards_that_share_a_drivers_name_are_told_apart():
    with pytest.raises(UsageError, match="is what the driver calls rtx-4060-ti-16gb and rtx-4060-ti-8gb: say which"):
        profiles.load("NVIDIA GeForce RTX 4060 Ti")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("8589934592", "-1", "total_bytes is -1: it must be a whole number"),
        ("8589934592", "8.5", "total_bytes is 8.5"),
        ("300000000", "9000000000", "context_bytes is 9000000000: it leaves nothing"),
        ('name = "A Card"', "", "name is None: it must be a text"),
        ('"cuda"', '"metal"', "backend is 'metal': it must be one of"),
        ('"sm_80"', '"ampere"', "architecture is 'ampere'"),
        (', source = "its data sheet" }\ncontext', " }\ncontext", "total_bytes is \\[\\]: beside its value"),
        ('source = "torch"', 'source = "torch", estimated = "too"', "cublas_workspace_bytes is"),
        ("flops_per_second.fp32", "flops_per_second.fp8", "flops_per_second is \\['fp8'\\]"),
        ('aliases = ["card"]', "speed = 3", "speed is 3: there is no such field"),
        ("backend =", "backend", "card.toml is not TOML"),
    ],
)
def test_a_wrong_file_names_file_field_and_value(tmp_path, old, new, says):
    path = tmp_path / "card.toml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ProfileError, match=f"card.toml.*{says}" if "TOML" not in says else says):
        profiles.read(path)


def test_what_is_written_is_what_is_read(tmp_path):
    path = tmp_path / "card.toml"
    path.write_text(GOOD)
    found = profiles.read(path)
    (tmp_path / "again").mkdir()
    again = tmp_path / "again" / "card.toml"
    again.write_text(profiles.written(found))
    assert profiles.read(again) == found


def test_cards_of_ones_own_are_known_and_a_broken_file_is_named_and_left_out(tmp_path):
    own = (profiles.folder() / "t4.toml").read_text().replace('"Tesla T4"', '"Our card"').replace('aliases = ["nvidia-t4", "tesla-t4"]', 'aliases = ["ours"]')
    (tmp_path / "lab-card.toml").write_text(own)
    (tmp_path / "broken.toml").write_text("name = 3")
    environment = {**os.environ, "AUTOACCUM_PROFILES_DIR": str(tmp_path)}

    def run(*words):
        return subprocess.run([sys.executable, "-m", "autoaccum", *words], capture_output=True, text=True, check=False, env=environment)

    listed = run("profiles", "list")
    assert listed.returncode == 0 and "lab-card" in listed.stdout and "broken" not in listed.stdout
    assert "broken.toml" in listed.stderr and "left out" in listed.stderr and "Traceback" not in listed.stderr
    shown = run("profiles", "show", "ours")
    assert shown.returncode == 0 and "Our card" in shown.stdout
    refused = run("profiles", "show", "broken")
    assert refused.returncode == 2 and "broken.toml: backend is None" in refused.stderr
