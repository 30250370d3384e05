import pytest

from autoaccum.errors import UsageError
from autoaccum.simulate.allocator_settings import Settings, parse, settings_from_environment

MIB = 2**20


def test_nothing_said_is_torchs_defaults():
    assert settings_from_environment({}) == Settings()


def test_the_older_name_is_read_first():
    both = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}
    assert settings_from_environment(both) == Settings(expandable_segments=True)


def test_several_settings_and_spaces():
    found = parse("max_split_size_mb: 128, garbage_collection_threshold:0.8 ,per_process_memory_fraction:0.5")
    assert (found.max_split_bytes, found.garbage_collection_threshold, found.memory_fraction) == (128 * MIB, 0.8, 0.5)


def test_divisions_of_one_number_are_of_every_class():
    assert parse("roundup_power2_divisions:4").roundup_divisions == (4,) * 16


def test_a_list_of_divisions_fills_what_lies_below_the_first_and_above_the_last():
    # Classes are powers of two from 1 MiB on; what lies between two that are named stays without.
    found = parse("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]").roundup_divisions
    assert found == (1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 8, 8, 8, 8, 8, 8)
    assert parse("roundup_power2_divisions:[4:2,16:8]").roundup_divisions == (2, 2, 2, 0, 8) + (0,) * 11


def test_settings_that_change_no_size_are_passed_over():
    assert parse("pinned_use_cuda_host_register:True,release_lock_on_cudamalloc:True,backend:native") == Settings()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_split_size:128", "'max_split_size' is not a setting"),
        ("max_split_size_mb:10", "at least 20, not '10'"),
        ("max_split_size_mb:much", "not 'much'"),
        ("max_split_size_mb", "needs a value"),
        ("garbage_collection_threshold:1.0", "between 0 and 1, not '1.0'"),
        ("expandable_segments:yes", "True or False, not 'yes'"),
        ("roundup_power2_divisions:3", "powers of two, not '3'"),
        ("roundup_power2_divisions:[256:1", "closing bracket"),
        ("backend:cudaMallocAsync", "leaves memory to the driver"),
        ("expandable_segments:True max_split_size_mb:64", "comma"),
    ],
)
def test_what_torch_refuses_is_told(text, says):
    with pytest.raises(UsageError, match=says.replace("(", r"\(")):
        parse(text)


def test_the_variable_is_named():
    with pytest.raises(UsageError, match="PYTORCH_ALLOC_CONF: 'nonsense'"):
        settings_from_environment({"PYTORCH_ALLOC_CONF": "nonsense:1"})
