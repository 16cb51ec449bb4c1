"""Messages of errors are one line of printable characters, whatever the names in files are."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qface.errors import ConfigError, LimitError, QFaceError


@given(st.text(st.characters()))
def test_a_message_is_one_printable_line(text: str) -> None:
    message = str(QFaceError(f"the file {text} is damaged"))
    assert message.isprintable()
    assert message.encode()  # surrogates, as in names of files that are no UTF-8, cannot be printed
    assert message == f"the file {text} is damaged" or not text.isprintable()


def test_a_long_message_keeps_its_ends() -> None:
    message = str(QFaceError(f"faces.csv, line 1: got {'a' * 10**6}; restore the file"))
    assert message.startswith("faces.csv, line 1: got aaa")
    assert message.endswith("aaa; restore the file")
    assert len(message) < 2100


@pytest.mark.parametrize("kind", [ConfigError, LimitError])
def test_an_error_survives_pickling(kind: type[QFaceError]) -> None:
    error = pickle.loads(pickle.dumps(kind("a\nb")))
    assert type(error) is kind
    assert str(error) == r"a\nb"
