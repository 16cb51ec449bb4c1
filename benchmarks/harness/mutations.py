"""Random changes for the fuzzer: bytes, lines, JSON values, pickle opcodes, zip members, ONNX fields."""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx

__all__ = ["Mutation", "bytes_changed", "json_changed", "lines_changed", "onnx_changed", "pickle_changed",
           "safetensors_changed", "zip_changed"]  # fmt: skip

Mutation = Callable[[bytes, random.Random], bytes]

_NUMBERS = (0, 1, -1, 2, 255, 1000, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 10**9, 2**62, 2**63 - 1, -(2**31), -(2**63))
_VALUES: tuple[Any, ...] = (*_NUMBERS, 0.5, -1e308, 1e308, True, None, "", "x" * 5000, "../../x", "é\n\x00", [], {},
                            [0] * 5000, [[[[]]]], {"a": {}})  # fmt: skip


def bytes_changed(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, zero, randomize or overwrite bytes with extreme numbers, 1 to 20 times."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 2, 4, 8, 100))
        kind = rng.randrange(6)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[place : len(changed) if rng.random() < 0.3 else place + length]
        elif kind == 2:
            changed[place:place] = changed[place : place + length] * rng.choice((1, 2, 1000))
        elif kind == 3:
            changed[place : place + length] = bytes(length)
        elif kind == 4:
            changed[place : place + length] = rng.randbytes(length)
        else:
            form = rng.choice(("<i", "<q", ">i"))
            number = rng.choice([each for each in _NUMBERS if abs(each) < 2**31])
            changed[place : place + struct.calcsize(form)] = struct.pack(form, number)
    return bytes(changed)


def lines_changed(content: bytes, rng: random.Random) -> bytes:
    """Replace a field of a line, or remove or repeat a line."""
    lines = content.split(b"\n")
    place = rng.randrange(len(lines))
    kind = rng.randrange(4)
    if kind == 0:
        del lines[place]
    elif kind == 1:
        lines[place:place] = [lines[place]] * rng.choice((1, 2, 10_000))
    else:
        fields = lines[place].split() or [b""]
        fields[rng.randrange(len(fields))] = str(rng.choice(_VALUES)).encode()
        lines[place] = b"\t".join(fields)
    return b"\n".join(lines)


# ---- JSON


def json_changed(content: bytes, rng: random.Random) -> bytes:
    """Replace, remove, swap or repeat values or keys of a JSON text."""
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = _changed_value(value, rng)
    return json.dumps(value).encode()


def _changed_value(value: Any, rng: random.Random) -> Any:
    """Return a copy of ``value`` with a change at a random depth."""
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.9:  # metadata may hold JSON as a string
        try:
            return json.dumps(_changed_value(json.loads(value), rng))
        except ValueError:
            pass
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.05:
        return rng.choice(_VALUES)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    made: Any = dict(value) if isinstance(value, dict) else list(value)
    kind = rng.randrange(12)
    if kind == 0:
        del made[key]
    elif kind == 1:
        other = rng.choice(keys)
        made[key], made[other] = made[other], made[key]
    elif kind == 2 and isinstance(made, list):
        made[key:key] = [made[key]] * rng.choice((1, 100))
    elif kind == 2:
        made[str(rng.choice(_VALUES))[:100]] = made[key]
    else:
        made[key] = _changed_value(made[key], rng)
    return made


def safetensors_changed(content: bytes, rng: random.Random) -> bytes:
    """Change the JSON header of a safetensors file, preferably its metadata."""
    (length,) = struct.unpack_from("<Q", content)
    header = content[8 : 8 + length]
    record = json.loads(header)
    if "__metadata__" in record and rng.random() < 0.7:
        record["__metadata__"] = _changed_value(record["__metadata__"], rng)
        header = json.dumps(record).encode()
    else:
        header = json_changed(header, rng)
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


# ---- pickles and archives


def pickle_changed(content: bytes, rng: random.Random) -> bytes:
    """Remove, repeat or replace one to three opcodes of the first pickle, or make a number extreme."""
    places = [place for _, _, place in pickletools.genops(content)]
    starts = list(zip(places, [*places[1:], places[-1] + 1], strict=True))
    changed = content
    for start, end in sorted(rng.sample(starts, min(len(starts), rng.choice((1, 1, 2, 3)))), reverse=True):
        changed = changed[:start] + _changed_opcode(changed[start:end], rng, content, starts) + changed[end:]
    return changed


def _changed_opcode(opcode: bytes, rng: random.Random, content: bytes, starts: list[tuple[int, int]]) -> bytes:
    kind = rng.randrange(6)
    if kind == 0:
        return b""
    if kind == 1:
        return opcode * rng.choice((2, 3, 1000))
    if kind == 2:
        start, end = rng.choice(starts)
        return content[start:end]
    if kind == 3 and opcode[:1] in b"KMJ":
        return b"\x8a\x08" + struct.pack("<q", rng.choice(_NUMBERS))
    if kind == 4:
        return rng.choice([b"(", b")", b"]", b"}", b"N", b"0", b"1", b"2", b"\x85", b"\x86", b"R", b"b", b"\x8f", b"Q"])
    return bytes_changed(opcode, rng)


def zip_changed(content: bytes, rng: random.Random, inner: dict[str, Mutation]) -> bytes:
    """Rename, drop, compress or mutate one zip member; ``inner`` maps name endings to mutations."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(target, "w") as made, _quiet():
        infos = archive.infolist()
        weights = [10 if each.filename.endswith(tuple(inner)) else 1 for each in infos]
        (chosen,) = rng.choices(infos, weights)
        kind = rng.randrange(12)
        for info in infos:
            data, name, compression = archive.read(info), info.filename, zipfile.ZIP_STORED
            if info is chosen and kind == 0:
                continue
            if info is chosen and kind == 1:
                name = rng.choice(infos).filename
            elif info is chosen and kind == 2:
                compression = zipfile.ZIP_DEFLATED
            elif info is chosen:
                change = next((each for ending, each in inner.items() if name.endswith(ending)), bytes_changed)
                data = change(data, rng) if data else rng.randbytes(8)
            made.writestr(name, data, compression)
    return target.getvalue()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warning of zipfile about duplicate member names, which are intended here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- protobuf


def onnx_changed(content: bytes, rng: random.Random) -> bytes:
    """Set, clear, repeat or remove fields of an ONNX file at random depths."""
    model = onnx.ModelProto.FromString(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _change_message(model, rng)
    return bytes(model.SerializeToString())


def _change_message(message: Any, rng: random.Random) -> None:
    present = [field for field, _ in message.ListFields()]
    inner = [field for field in present if field.message_type is not None]
    if inner and rng.random() < 0.85:
        field = rng.choice(inner)
        value = getattr(message, field.name)
        _change_message(rng.choice(value) if _is_repeated(message, field) else value, rng)
        return
    field = rng.choice(message.DESCRIPTOR.fields if rng.random() < 0.3 or not present else present)
    if _is_repeated(message, field):
        _change_repeated(getattr(message, field.name), field, rng)
    elif rng.random() < 0.2 or field.message_type is not None:
        message.ClearField(field.name)
    else:
        _try(lambda: setattr(message, field.name, _scalar(field, rng)))


def _is_repeated(message: Any, field: Any) -> bool:
    return hasattr(getattr(message, field.name), "extend")


def _change_repeated(values: Any, field: Any, rng: random.Random) -> None:
    kind = rng.randrange(4)
    if kind == 0 and len(values):
        del values[rng.randrange(len(values))]
    elif kind == 1 and len(values):
        values.extend([rng.choice(values)] * rng.choice((1, 3, 500)))
    elif field.message_type is not None:
        values.add()
    elif kind == 2 and len(values):
        place = rng.randrange(len(values))
        _try(lambda: values.__setitem__(place, _scalar(field, rng)))
    else:
        _try(lambda: values.append(_scalar(field, rng)))


def _scalar(field: Any, rng: random.Random) -> Any:
    if field.cpp_type == field.CPPTYPE_STRING:
        text = rng.choice(("", "x", "data", "Loop", "Conv", "Reshape", "Cast", "Resize", "é\n", "y" * 3000))
        return text.encode() if field.type == field.TYPE_BYTES else text
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    return rng.choice((*range(0, 18), *_NUMBERS))


def _try(change: Callable[[], object]) -> None:
    """Apply ``change``; ignore it if the field cannot hold the value, such as a number out of range."""
    try:
        change()
    except (TypeError, ValueError):
        return
