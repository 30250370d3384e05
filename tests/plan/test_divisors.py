from hypothesis import given
from hypothesis import strategies as st

from autoaccum.plan import divisors


@given(target=st.integers(1, 5000), largest=st.integers(1, 5000))
def test_an_equal_split_is_the_largest_divisor(target, largest):
    size, steps = divisors.equal_split(target, largest)
    assert size * steps == target and size <= largest
    assert not [each for each in range(size + 1, min(largest, target) + 1) if target % each == 0]


def test_easier_targets_are_offered_with_their_split():
    assert divisors.easier_targets(127, 40) == "125 = 25 x 5 and 128 = 32 x 4"
    assert divisors.easier_targets(127, 50) == "126 = 42 x 3 and 128 = 32 x 4"
    assert divisors.why_unequal(127) == "127 is prime" and divisors.why_unequal(122) == "122 has few divisors"
