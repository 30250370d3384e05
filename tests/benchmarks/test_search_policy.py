"""The cost of searching, counted and not timed: a sample of what the benchmark runs in full."""

import statistics

import pytest
import search_policy  # benchmarks/ is on pytest's path


@pytest.mark.parametrize(("kind", "trials", "ooms"), [("affine", 4.5, 1.0), ("jump", 5.5, 1.0), ("noise", 6.5, 1.0)])
def test_few_trials_and_at_most_one_out_of_memory_on_average_and_never_a_wrong_answer(kind, trials, ooms):
    devices = []
    for target in search_policy.TARGETS:
        for maximum in [*range(1, 65), *range(65, 1025, 9)]:
            for share in (0.1, 0.4, 0.7):
                device = search_policy.Device(maximum, share, kind, tells_base=True)
                assert search_policy.ours(device, target) == device.truth(target), (target, maximum, share, device.tried)
                devices.append(device)
    assert statistics.mean(each.trials for each in devices) <= trials
    assert statistics.mean(each.ooms for each in devices) <= ooms
