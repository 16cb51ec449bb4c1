"""InsightFace's training sets ``train.rec`` and ``train.idx`` in MXNet's RecordIO format.

A record (little-endian) is the magic number 0xced7230a, a uint32, the data, and zeros up to a multiple of 4 bytes. The
upper 3 bits of the uint32 are the kind (0: complete record; 1, 2, 3: first, middle, last part of a record), the lower
29 bits the length of the data. Data that contain the magic number are split there, without it. The data begin with a
header: flag (uint32), label (float32), two ids (uint64). If flag > 0, that many float32 labels follow and replace the
label.

If record 0 has labels [a, b] and no image, as in InsightFace's arcface_torch, records 1 to a - 1 are the images, and
records a to b - 1 the identities; the two labels of an identity are its first image and the one after its last. Other
converters write only the label a, and each image has its own label. Without such a record 0, all records are images
with their own labels.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import warnings
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qface.data.decoding import UNREADABLE, decode, stack_crops
from qface.data.images import IndexedImages
from qface.errors import ImagesError, one_line

__all__ = ["RecordImages"]

_LOGGER = logging.getLogger("qface")

_MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", _MAGIC)
_WORDS = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_LENGTH_BITS = 29
_EXACT = 2**24
"""float32 represents integers exactly only up to here; in larger files the image ranges of identities are not exact."""

RecordLabels = npt.NDArray[np.float32]
Bytes = bytes | memoryview


@dataclass(frozen=True, eq=False)
class _Index:
    """Offsets of records by number; arrays, since a training set has up to 17 million records.

    Args:
        keys: int64 [records], ascending numbers of the records.
        offsets: int64 [records], their first bytes in the file.
    """

    keys: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]

    def offset(self, key: int) -> int | None:
        """Return the offset of record ``key``, or None if it is not in the index."""
        position = self._position(key)
        is_record = position < len(self.keys) and self.keys[position] == key
        return int(self.offsets[position]) if is_record else None

    def within(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the numbers from ``start`` to ``stop - 1`` that are records."""
        return self.keys[self._position(start) : self._position(stop)]

    def _position(self, key: int) -> int:
        """Return the position of the first record with a number >= ``key``."""
        return int(np.searchsorted(self.keys, min(key, np.iinfo(np.int64).max)))


class RecordImages(IndexedImages):
    """112x112 crops of a ``.rec`` file, read on demand.

    Without an ``.idx`` file in the same folder, the file is scanned once and records are numbered in file order.

    Args:
        path: the ``.rec`` file.

    Attributes:
        path: the file.
        labels: int64 [images], identities numbered from 0 in the order of the file's labels.

    Raises:
        ImagesError: a file is missing or damaged, or has no images.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._data = memoryview(_mapped(self.path))
        index = _index_of(self.path)
        self._index = _read_index(index) if os.path.exists(index) else self._walk()
        header = self._header()
        self._keys = self._index.keys if header is None else self._image_keys(header)
        if not len(self._keys):
            raise ImagesError(f"{self.path} has no images: download it again")
        people = self._people(header)
        own = self._own_labels() if not people or len(self._keys) > _EXACT else self._identities(people)
        self.labels = torch.from_numpy(np.unique(own, return_inverse=True)[1].reshape(-1).astype(np.int64))

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Decode the images at ``indices`` to uint8 [len(indices), 3, 112, 112] in RGB.

        Raises:
            ImagesError: an image is damaged or not 112x112; the message names its record.
        """
        crops = [self._decode(int(self._keys[index])) for index in indices]
        return stack_crops(crops)

    def content(self, index: int) -> bytes:
        """Return the encoded image at ``index``."""
        return bytes(self._content(int(self._keys[index]))[1])

    def _decode(self, key: int) -> npt.NDArray[np.uint8]:
        try:
            return decode(bytes(self._content(key)[1]))
        except UNREADABLE as error:
            raise self._damaged(key, one_line(error)) from error

    def _walk(self) -> _Index:
        """Return the offset of each record, numbered in file order."""
        offsets = array("q")
        offset, whole = 0, True
        while offset < len(self._data):
            if whole:
                offsets.append(offset)
            kind, _, offset = self._part(len(offsets) - 1, offset)
            whole = kind in (_WHOLE, _LAST)
        _LOGGER.warning("%s has no .idx file: its %d records are numbered in file order", self.path, len(offsets))
        return _Index(np.arange(len(offsets)), np.array(offsets, np.int64))

    def _header(self) -> RecordLabels | None:
        """Return the labels of record 0 if it has no image."""
        if self._index.offset(0) is None:
            return None
        labels, image = self._content(0)
        if len(image):
            return None
        if not 1 <= labels[0] <= int(self._index.keys[-1]) + 1:
            raise self._damaged(0, "its label must be the number of the record after the last image")
        return labels

    def _image_keys(self, header: RecordLabels) -> npt.NDArray[np.int64]:
        """Return 1 to the number before the header's first label, after a check that all of them are records."""
        end = int(header[0])
        found = self._index.within(1, end)
        missing = np.flatnonzero(found != np.arange(1, len(found) + 1))
        if len(found) < end - 1:
            raise self._lacking(int(missing[0]) + 1 if len(missing) else len(found) + 1)
        return found

    def _people(self, header: RecordLabels | None) -> range:
        """Return the records of identities; empty if the header announces none or the file has none of them."""
        if header is None or len(header) != 2 or not header[0] <= header[1] < np.inf:
            return range(0)
        people = range(int(header[0]), int(header[1]))
        return people if len(self._index.within(people.start, people.stop)) else range(0)

    def _identities(self, people: range) -> npt.NDArray[np.int64]:
        """Return the identity record of each image."""
        identities = np.full(len(self._keys), -1, np.int64)
        for person in people:
            bounds = self._labels_of(person)
            if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= len(self._keys) + 1:
                raise self._damaged(person, "its labels must be an identity's first image and the one after its last")
            identities[int(bounds[0]) - 1 : int(bounds[1]) - 1] = person
        if (identities < 0).any():
            nobodys = np.count_nonzero(identities < 0)
            raise ImagesError(f"{nobodys} of {len(self)} images in {self.path} have no identity: download it again")
        return identities

    def _own_labels(self) -> RecordLabels:
        return np.array([self._labels_of(int(key))[0] for key in self._keys], np.float32)

    def _labels_of(self, key: int) -> RecordLabels:
        return self._content(key)[0]

    def _content(self, key: int) -> tuple[RecordLabels, Bytes]:
        """Return the labels of a record (at least one) and the data after them."""
        offset = self._index.offset(key)
        if offset is None:
            raise self._lacking(key)
        data = self._record(key, offset)
        if len(data) < _HEADER.size:
            raise self._damaged(key, "it is too short")
        flag, label, _, _ = _HEADER.unpack_from(data)
        if flag == 0:
            return np.array([label], np.float32), data[_HEADER.size :]
        end = _HEADER.size + 4 * flag
        if len(data) < end:
            raise self._damaged(key, f"it is too short for its {flag} labels")
        return np.frombuffer(data[_HEADER.size : end], "<f4"), data[end:]

    def _record(self, key: int, offset: int) -> Bytes:
        """Return the data of the record at ``offset``; as a view if it is whole, so that labels need no image."""
        parts: list[memoryview] = []
        while True:
            kind, part, offset = self._part(key, offset)
            if kind in (_WHOLE, _FIRST) if parts else kind in (_MIDDLE, _LAST):
                raise self._damaged(key, "its parts are out of order")
            parts.append(part)
            if kind == _WHOLE:
                return part
            if kind == _LAST:
                return _MAGIC_BYTES.join(parts)

    def _part(self, key: int, offset: int) -> tuple[int, memoryview, int]:
        """Return kind and data of the part at ``offset``, and the offset of the next part."""
        start = offset + _WORDS.size
        if not 0 <= offset <= len(self._data) - _WORDS.size:
            raise self._damaged(key, f"the file ends at {len(self._data)}, before byte {start}")
        magic, word = _WORDS.unpack_from(self._data, offset)
        if magic != _MAGIC:
            raise self._damaged(key, f"there is no record at byte {offset}")
        kind, length = word >> _LENGTH_BITS, word & (2**_LENGTH_BITS - 1)
        if kind > _LAST or start + length > len(self._data):
            raise self._damaged(key, "it extends beyond the end of the file")
        return kind, self._data[start : start + length], start + length + -length % 4

    def _lacking(self, key: int) -> ImagesError:
        return ImagesError(f"{_index_of(self.path)} has no record {key}: download both files again")

    def _damaged(self, key: int, what: str) -> ImagesError:
        return ImagesError(f"record {key} of {self.path} cannot be read: {what}; download the .rec and .idx again")


def _index_of(path: Path) -> Path:
    return path.with_suffix(".IDX" if path.suffix == ".REC" else ".idx")


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ImagesError(f"{path} cannot be opened ({one_line(error)}): pass a .rec file of InsightFace") from error


def _read_index(path: Path) -> _Index:
    """Read the offset of each record by number from lines ``number<TAB>offset``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of a file without lines
            table = np.loadtxt(path, np.int64, comments=None, ndmin=2, encoding="ascii")
    except (OSError, ValueError) as error:
        raise ImagesError(
            f"{path} cannot be read as an index of records ({one_line(error)}): download it again"
        ) from error
    if not table.size:
        raise ImagesError(f"{path} lists no records: download it again")
    keys, first = np.unique(table[:, 0], return_index=True)
    if table.shape[1] != 2 or len(keys) < len(table):
        raise ImagesError(f"{path} must list each record once, as its number and its offset: download it again")
    return _Index(keys, table[first, 1])
