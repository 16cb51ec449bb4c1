"""The fields of a protobuf message as they lie on the disk: https://protobuf.dev/programming-guides/encoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["Field", "fields", "name_of", "size_of"]


class Field(NamedTuple):
    """One field of a message: its number, its value, and its bytes with tag and length."""

    number: int
    payload: memoryview
    size: int


def fields(data: memoryview) -> Iterator[Field]:
    """The fields of a serialized message that protobuf could read, one behind the other."""
    position = 0
    while position < len(data):
        key, body = _varint(data, position)
        end = body + _FIXED.get(key & 7, 0)
        if key & 7 == _VARINT:
            _, end = _varint(data, body)
        elif key & 7 == _DELIMITED:
            length, body = _varint(data, body)
            end = body + length
        yield Field(key >> 3, data[body:end], end - position)
        position = end


_VARINT, _DELIMITED = 0, 2
_FIXED = {1: 8, 5: 4}
"""Bytes of the wire types without a length. Groups, 3 and 4, are tags, between which fields lie as anywhere."""


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the low ones first, and the position behind it."""
    value = shift = 0
    while data[position] & 0x80:
        value |= (data[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
    return value | data[position] << shift, position + 1


def name_of(message: type[Any], field: Field) -> str:
    """Name of ``field`` in ``message``."""
    known = message.DESCRIPTOR.fields_by_number.get(field.number)
    return f"field {field.number}" if known is None else str(known.name)


def size_of(data: memoryview, message: type[Any], names: tuple[str, ...]) -> int:
    """Bytes that the fields called ``names`` take, tags and lengths included."""
    return sum(field.size for field in fields(data) if name_of(message, field) in names)
