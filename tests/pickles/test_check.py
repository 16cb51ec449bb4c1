"""Pickles that ask for memory which they do not take themselves."""

from __future__ import annotations

import io
import pickle
import struct

import pytest

from qface.pickles import check_pickle


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_python_writes_passes_and_is_still_to_be_read(protocol: int) -> None:
    value = [{"name": [1, 2.5, "ü"]}, b"\xff\x00", ("a",) * 300]
    file = io.BytesIO(b"before" + pickle.dumps(value, protocol))
    file.seek(6)
    check_pickle(file)
    assert pickle.load(file) == value


@pytest.mark.parametrize(
    "content", [b"(lp0\nS'\\xff\\xd8'\np1\na.", "c__main__\nNämé\np0\n.".encode()], ids=["bytes of Python 2", "name"]
)
def test_what_is_not_ascii_passes(content: bytes) -> None:
    file = io.BytesIO(content)
    check_pickle(file)
    assert file.read() == content


def test_a_place_far_behind_the_end_is_refused() -> None:
    content = pickle.PROTO + b"\x02" + pickle.EMPTY_LIST + pickle.LONG_BINPUT + struct.pack("<I", 2**31) + pickle.STOP
    with pytest.raises(pickle.UnpicklingError, match="2147483648, in a pickle of 9 bytes"):
        check_pickle(io.BytesIO(content))


def test_half_a_pickle_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pickle exhausted|in a pickle of"):
        check_pickle(io.BytesIO(pickle.dumps(["a" * 100])[:-20]))
