from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qface.data.prefetch import prefetched


@given(st.lists(st.none() | st.integers()))
def test_all_items_in_order(items: list[int | None]) -> None:
    assert list(prefetched(items)) == items


def test_one_is_made_ahead_in_another_thread() -> None:
    made: list[tuple[int, int]] = []
    second = threading.Event()

    def items() -> Iterator[int]:
        for number in range(5):
            made.append((number, threading.get_ident()))
            if number == 1:
                second.set()
            yield number

    source = prefetched(items())
    assert next(source) == 0
    assert second.wait(10)
    assert [number for number, _ in made] == [0, 1]
    assert all(thread != threading.get_ident() for _, thread in made)
    source.close()
    assert len(made) <= 2


def test_errors_come_where_they_belong() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    source = prefetched(items())
    assert next(source) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(source)
