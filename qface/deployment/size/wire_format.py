"""Fields of a serialized protobuf message (https://protobuf.dev/programming-guides/encoding).

protobuf's own ``ByteSize`` gives the size in canonical encoding. Writers of other languages may pack repeated fields
differently, and then the sizes would not add up to the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["Field", "fields", "name_of", "size_of"]


class Field(NamedTuple):
    """One field of a message: field number, payload, and bytes including tag and length."""

    number: int
    payload: memoryview
    size: int


def fields(data: memoryview) -> Iterator[Field]:
    """Yield the fields of a valid serialized message in order.

    Args:
        data: the serialized message.
    """
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
"""Payload bytes of the wire types with a fixed size. Group tags (3 and 4) have none; their fields follow as usual."""


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return the varint at ``position`` and the position after it."""
    value = shift = 0
    while data[position] & 0x80:
        value |= (data[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
    return value | data[position] << shift, position + 1


def name_of(message: type[Any], field: Field) -> str:
    """Return the name of ``field`` in ``message``, or its number if unknown."""
    known = message.DESCRIPTOR.fields_by_number.get(field.number)
    return f"field {field.number}" if known is None else str(known.name)


def size_of(data: memoryview, message: type[Any], names: tuple[str, ...]) -> int:
    """Return the bytes of the fields in ``names``, tags and lengths included."""
    return sum(field.size for field in fields(data) if name_of(message, field) in names)
