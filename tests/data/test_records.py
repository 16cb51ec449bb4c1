"""RecordIO files written here byte by byte, by the format's description."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qface.data import RecordImages, as_image_source
from qface.errors import ImagesError

MAGIC = b"\x0a\x23\xd7\xce"


def crop(seed: int, side: int = 112) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def header(labels: Sequence[float], key: int, always_array: bool = False) -> bytes:
    if len(labels) == 1 and not always_array:
        return struct.pack("<IfQQ", 0, labels[0], key, 0)
    return struct.pack("<IfQQ", len(labels), 0.0, key, 0) + struct.pack(f"<{len(labels)}f", *labels)


def part(kind: int, data: bytes) -> bytes:
    return MAGIC + struct.pack("<I", kind << 29 | len(data)) + data + bytes(-len(data) % 4)


def record(data: bytes) -> bytes:
    """As MXNet writes it: cut at every aligned magic number."""
    pieces, start = [], 0
    for position in range(0, len(data) - 3, 4):
        if data[position : position + 4] == MAGIC:
            pieces.append(data[start:position])
            start = position + 4
    pieces.append(data[start:])
    if len(pieces) == 1:
        return part(0, data)
    return b"".join(part(1 if not i else 3 if i == len(pieces) - 1 else 2, piece) for i, piece in enumerate(pieces))


def write(folder: Path, records: dict[int, bytes]) -> Path:
    content, index = b"", []
    for key, data in records.items():
        index.append(f"{key}\t{len(content)}\n")
        content += record(data)
    (folder / "train.rec").write_bytes(content)
    (folder / "train.idx").write_text("".join(index))
    return folder / "train.rec"


def training_set(counts: Sequence[int]) -> dict[int, bytes]:
    """Records as InsightFace's: a header, the images of each person, and a record for each person."""
    images = sum(counts)
    records = {0: header((images + 1, images + 1 + len(counts)), 0)}
    people, key = {}, 1
    for person, count in enumerate(counts):
        people[images + 1 + person] = header((key, key + count), images + 1 + person)
        for _ in range(count):
            records[key] = header((float(person), 0.0), key) + png(crop(key))
            key += 1
    return records | people


def test_a_training_set_has_its_images_and_identities(tmp_path: Path) -> None:
    source = as_image_source(write(tmp_path, training_set((2, 1, 3))))
    assert isinstance(source, RecordImages)
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1, 2, 2, 2]
    expected = np.stack([crop(6), crop(1)]).transpose(0, 3, 1, 2)
    assert torch.equal(source.read([5, 0]), torch.from_numpy(expected.copy()))


@pytest.mark.parametrize("always_array", [False, True])
def test_without_a_header_all_records_are_images_with_their_own_labels(always_array: bool, tmp_path: Path) -> None:
    records = {
        key: header((label,), key, always_array) + png(crop(key)) for key, label in ((7, 3.0), (2, 9.0), (4, 3.0))
    }
    source = RecordImages(write(tmp_path, records))
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0, 0]
    assert torch.equal(source.read([2])[0], torch.from_numpy(crop(7)).permute(2, 0, 1))


@pytest.mark.parametrize("labels", [(4, 2), (4, 4), (4, 2, 0), (4,), (4, float("inf")), (4, 9)], ids=str)
def test_a_header_without_people_leaves_images_their_own_labels(labels: tuple[float, ...], tmp_path: Path) -> None:
    images = {key: header((label,), key) + png(crop(key)) for key, label in ((1, 8.0), (2, 5.0), (3, 8.0))}
    source = RecordImages(write(tmp_path, {0: header(labels, 0, always_array=True)} | images))
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0, 1]
    assert torch.equal(source.read([0])[0], torch.from_numpy(crop(1)).permute(2, 0, 1))


def test_endings_in_capitals(tmp_path: Path) -> None:
    path = write(tmp_path, training_set((2, 1)))
    path.with_suffix(".idx").rename(tmp_path / "train.IDX")
    assert len(as_image_source(path.rename(tmp_path / "train.REC"))) == 3


@given(st.lists(st.sampled_from([MAGIC, b"abcd", b"xy", b"\x00" * 8]), max_size=8).map(b"".join))
def test_data_that_hold_the_magic_number_come_back_whole(tmp_path_factory: pytest.TempPathFactory, tail: bytes) -> None:
    folder = tmp_path_factory.mktemp("records")
    image = png(crop(0))
    # Behind the end of a PNG anything may follow.
    source = RecordImages(write(folder, {1: header((0.0,), 1) + image + bytes(-len(image) % 4) + tail}))
    assert source.content(0) == image + bytes(-len(image) % 4) + tail
    assert torch.equal(source.read([0])[0], torch.from_numpy(crop(0)).permute(2, 0, 1))


def broken(records: dict[int, bytes]) -> dict[str, dict[int, bytes]]:
    return {
        "too short": records | {3: b"abc"},
        "too short for its 9 labels": records | {3: struct.pack("<IfQQ", 9, 0, 3, 0)},
        "record 2": {key: data for key, data in records.items() if key != 2},
        "an identity's first image": records | {4: header((1, 99), 4)},
        "have no identity": records | {5: header((3, 3), 5)},
        "after the last image": records | {0: header((float("nan"), 5.0), 0)},
        "record 5": {key: data for key, data in records.items() if key != 5} | {6: b""},
    }


@pytest.mark.parametrize("what", broken(training_set((2, 1))))
def test_contradictions_are_named(what: str, tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match=what):
        RecordImages(write(tmp_path, broken(training_set((2, 1)))[what])).read(range(3))


def test_an_index_of_huge_numbers_is_read_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, {0: header((2.0, 1e19), 0), 1: header((7.0,), 1) + png(crop(1))})
    with path.with_suffix(".idx").open("a") as index:
        index.write(f"{2**62}\t0\n")
    with pytest.raises(ImagesError, match="has no record 2"):
        RecordImages(path)
    path.with_suffix(".idx").write_text(f"{2**63}\t0\n")
    with pytest.raises(ImagesError, match=r"train\.idx cannot be read as an index"):
        RecordImages(path)


def test_an_index_lists_each_record_once(tmp_path: Path) -> None:
    path = write(tmp_path, training_set((2, 1)))
    with path.with_suffix(".idx").open("a") as index:
        index.write("1\t0\n")
    with pytest.raises(ImagesError, match="must list each record once"):
        RecordImages(path)


def test_damage_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, training_set((2, 1)))
    content, index = path.read_bytes(), path.with_suffix(".idx").read_text()

    path.write_bytes(content[:200])
    with pytest.raises(ImagesError, match=r"train\.rec"):
        RecordImages(path)
    path.write_bytes(b"\0" * len(content))
    with pytest.raises(ImagesError, match="no record at byte 0"):
        RecordImages(path)
    path.write_bytes(content)
    for text, complaint in (
        ("0\t10000000\n", "the file ends"),
        ("0 a\n", "index"),
        ("", "lists no"),
        ("0\t-8", "ends"),
    ):
        path.with_suffix(".idx").write_text(text)
        with pytest.raises(ImagesError, match=complaint):
            RecordImages(path)
    path.with_suffix(".idx").write_text(index)
    assert len(RecordImages(path)) == 3
    with pytest.raises(ImagesError, match=r"nothing\.rec"):
        as_image_source(tmp_path / "nothing.rec")


def test_images_of_another_size_or_damaged_are_named(tmp_path: Path) -> None:
    records = {1: header((0.0,), 1) + png(crop(0, 100)), 2: header((0.0,), 2) + b"no image"}
    source = RecordImages(write(tmp_path, records))
    with pytest.raises(ImagesError, match=r"record 1 .* 100x100"):
        source.read([0])
    with pytest.raises(ImagesError, match="record 2"):
        source.read([1])


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("records")
    (folder / "train.rec").write_bytes(content)
    (folder / "train.idx").write_text("0\t0\n1\t24\n")
    with pytest.raises(ImagesError):
        RecordImages(folder / "train.rec").read([0])


def test_without_an_index_the_file_is_walked_through(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, training_set((2, 3, 1)))
    wanted = RecordImages(path)
    path.with_suffix(".idx").unlink()
    found = RecordImages(path)
    assert torch.equal(found.labels, wanted.labels)
    assert torch.equal(found.read(range(6)), wanted.read(range(6)))
    assert any("has no .idx file" in message for message in caplog.messages)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ImagesError, match="beyond the end of the file"):
        RecordImages(path)


def test_walking_does_not_stop_at_the_magic_number_in_data(tmp_path: Path) -> None:
    magic = struct.pack("<I", 0xCED7230A)
    parts = part(1, header([3.0], 0) + b"abcd") + part(2, b"efgh") + part(3, b"ijkl")
    (tmp_path / "a.rec").write_bytes(parts + record(header([4.0], 1) + png(crop(1))))
    images = RecordImages(tmp_path / "a.rec")
    assert len(images) == 2 and images.content(0) == b"abcd" + magic + b"efgh" + magic + b"ijkl"
    assert torch.equal(images.read([1])[0], torch.from_numpy(crop(1)).permute(2, 0, 1))
