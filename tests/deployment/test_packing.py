import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qface.deployment.packing import pack, unpack


@st.composite
def packable(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(st.integers(2, 8))
    shape = draw(arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=9))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return draw(arrays.arrays(np.int8, shape, elements=st.integers(low, high))), bits


@given(packable())
def test_unpacking_gives_back_every_integer(case: tuple[np.ndarray, int]) -> None:
    integers, bits = case
    np.testing.assert_array_equal(unpack(pack(integers, bits), bits, integers.size), integers.reshape(-1))


@given(packable())
def test_no_bit_is_wasted_but_those_that_fill_the_last_bytes(case: tuple[np.ndarray, int]) -> None:
    integers, bits = case
    width = math.gcd(bits, 8)
    planes = pack(integers, bits)
    assert len(planes) == bits // width
    for plane in planes:
        assert plane.nbytes == -(-integers.size * width // 8)


def test_groups_are_strings_of_bits() -> None:
    integers = np.array([-32, -31, 31, 0, 5, -6], np.int8)  # runs [-32, -31], [31, 0], [5, -6], [fill, fill]
    first, second = (int.from_bytes(bytes(group), "little") for group in pack(integers, 6).T)
    assert first == 0 | 63 << 6 | 37 << 12
    assert second == 1 | 32 << 6 | 26 << 12


@pytest.mark.parametrize("bits", range(2, 9))
def test_an_integer_that_needs_more_bits_is_refused(bits: int) -> None:
    for value in (2 ** (bits - 1), -(2 ** (bits - 1)) - 1):
        with pytest.raises(ValueError, match=f"{bits} bits"):
            pack(np.array([value], np.int16), bits)
