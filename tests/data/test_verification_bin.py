"""Verification sets as InsightFace's ``lfw2pack.py`` and Python 2 wrote them, and as somebody hostile would."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qface.data import VerificationBin, as_image_source
from qface.errors import ImagesError, PairsError


def png(seed: int, side: int = 112) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write(folder: Path, content: object, protocol: int = 4) -> Path:
    path = folder / "lfw.bin"
    path.write_bytes(pickle.dumps(content, protocol))
    return path


SAME = [True, False] * 13
IMAGES = [png(seed) for seed in range(4)] * 13


def written(image: bytes) -> np.ndarray:
    """As ``cv2.imencode`` gives it: an array that may be written to, of a column."""
    return np.frombuffer(image, np.uint8).reshape(-1, 1).copy()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "kind",
    [bytes, bytearray, lambda image: np.frombuffer(image, np.uint8), written],
    ids=["bytes", "bytearrays", "arrays", "columns"],
)
@pytest.mark.parametrize("flag", [bool, int, float, np.bool_, np.int64, np.float32])
def test_images_pairs_and_folds(protocol: int, kind, flag, tmp_path: Path) -> None:
    content = ([kind(image) for image in IMAGES], [flag(same) for same in SAME])
    source = as_image_source(write(tmp_path, content, protocol))
    assert isinstance(source, VerificationBin)
    assert len(source) == 52
    assert source.labels is None
    assert source.pairs.same.tolist() == SAME
    assert source.pairs.first.tolist() == list(range(0, 52, 2))
    assert source.pairs.second.tolist() == list(range(1, 52, 2))
    assert np.bincount(source.pairs.fold).tolist() == [3] * 6 + [2] * 4
    pixels = np.asarray(Image.open(io.BytesIO(IMAGES[3])))
    assert torch.equal(source.read([3])[0], torch.from_numpy(pixels.copy()).permute(2, 0, 1))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("flags", [np.bool_, np.int64, np.dtype(">i4"), object])
def test_lists_may_be_arrays(protocol: int, flags, tmp_path: Path) -> None:
    images = np.empty(52, object)
    images[:] = IMAGES
    source = VerificationBin(write(tmp_path, (images, np.array(SAME).astype(flags)), protocol))
    assert source.pairs.same.tolist() == SAME
    pixels = np.asarray(Image.open(io.BytesIO(IMAGES[3])))
    assert torch.equal(source.read([3])[0], torch.from_numpy(pixels.copy()).permute(2, 0, 1))


def python2(images: list[bytes], same: list[bool]) -> bytes:
    """A pickle of protocol 2 whose images are Python 2's ``str``."""
    listed = b"".join(b"T" + len(image).to_bytes(4, "little") + image for image in images)
    flags = b"".join(b"\x88" if each else b"\x89" for each in same)
    return b"\x80\x02](" + listed + b"e](" + flags + b"e\x86."


def python2_lines(images: list[bytes], same: list[bool]) -> bytes:
    """The same in protocol 0, Python 2's default."""
    listed = b"".join(b"S" + repr(image)[1:].encode() + b"\na" for image in images)
    flags = b"".join(b"I01\na" if each else b"I00\na" for each in same)
    return b"((lp0\n" + listed + b"(lp1\n" + flags + b"tp2\n."


@pytest.mark.parametrize("write_python2", [python2, python2_lines])
def test_a_file_of_python_2(write_python2: Callable[[list[bytes], list[bool]], bytes], tmp_path: Path) -> None:
    (tmp_path / "lfw.bin").write_bytes(write_python2(IMAGES[:4], SAME[:2]))
    source = VerificationBin(tmp_path / "lfw.bin")
    assert source.pairs.same.tolist() == [True, False]
    assert source.read(range(4)).shape == (4, 3, 112, 112)


class Harmful:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "function", [os.system, eval, getattr, np.load, np.fromfile, pickle.loads], ids=lambda function: function.__name__
)
def test_nothing_in_a_file_is_run(function, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = write(tmp_path, (Harmful(function, f"open({str(trace)!r}, 'w')"), []))
    with pytest.raises(ImagesError, match="is not run"):
        VerificationBin(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [([b"x"], [True]), ([b"x"] * 4, [True]), ([], []), ([b"x"] * 3, [True])],
    ids=["one image", "four for one", "nothing", "three"],
)
def test_images_that_do_not_pair_up_are_counted(content: object, tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="two per pair"):
        VerificationBin(write(tmp_path, content))


@pytest.mark.parametrize(
    "content", [3, ([1, 2], [True]), ([b"a", b"b"], ["yes"]), ([b"a", b"b"], [2]), ([], [], [])], ids=str
)
def test_other_contents_are_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match="verification set"):
        VerificationBin(write(tmp_path, content))


def test_damaged_images_are_named_by_number(tmp_path: Path) -> None:
    source = VerificationBin(write(tmp_path, ([png(0), b"no image", png(1, 96), png(2)], [True, False])))
    with pytest.raises(ImagesError, match="image 1 "):
        source.read([0, 1])
    assert source.read([2]).shape == (1, 3, 112, 112)
    with pytest.raises(ImagesError, match=r"missing\.bin"):
        VerificationBin(tmp_path / "missing.bin")


@pytest.mark.parametrize(
    "call",
    [
        (np.ndarray, (2,), np.dtype("O"), b"A" * 16),
        (np.ndarray, (3 * 10**8,), np.dtype("u1")),
        (bytearray, 3 * 10**9),
        (np.dtype, "O", False, True, {"names": ["a"], "formats": ["O"]}),
    ],
    ids=["addresses", "memory", "bytearray", "names"],
)
def test_numpy_is_not_asked_to_make_arrays_of_a_files_choice(call: tuple, tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match="verification set"):
        VerificationBin(write(tmp_path, (Harmful(*call), [True])))
    with pytest.raises(ImagesError, match="verification set"):
        VerificationBin(write(tmp_path, ([b"a", b"b"], Harmful(*call))))


class Shaped:
    """An array of four bytes that says it has another shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __reduce__(self) -> tuple:
        rebuild, arguments, _ = np.zeros(1).__reduce__()
        return rebuild, arguments, (1, self.shape, np.dtype("u1"), False, b"abcd")


@pytest.mark.parametrize("shape", [(5,), (2**62, 4), (-1,)], ids=str)
def test_arrays_hold_what_their_shape_says(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match="an array"):
        VerificationBin(write(tmp_path, ([Shaped(shape)] * 2, [True])))


@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), protocol=st.sampled_from([0, 2, 4, 5]))
def test_a_damaged_byte_does_no_harm(
    tmp_path_factory: pytest.TempPathFactory, place: float, byte: int, protocol: int
) -> None:
    images = [np.frombuffer(b"image", np.uint8), np.array([b"one", b"two"], object)[0]]
    content = bytearray(pickle.dumps((images, np.array([np.bool_(True)], object)), protocol))
    content[int(place * len(content))] = byte
    path = tmp_path_factory.mktemp("bins") / "lfw.bin"
    path.write_bytes(content)
    with contextlib.suppress(ImagesError, PairsError):
        VerificationBin(path)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bins") / "lfw.bin"
    path.write_bytes(content)
    with pytest.raises((ImagesError, PairsError)):
        VerificationBin(path)


def test_images_of_another_size_are_resized_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = VerificationBin(write(tmp_path, ([png(0, 160), png(1, 160)], [True])))
    (message,) = caplog.messages
    assert "images of 160x160 pixels, which are resized to 112x112" in message
    wanted = Image.open(io.BytesIO(png(1, 160))).resize((112, 112), Image.Resampling.BILINEAR)
    assert torch.equal(source.read([1])[0].permute(1, 2, 0), torch.from_numpy(np.array(wanted)))


def test_a_list_with_all_pairs_of_one_person_first_has_ten_folds_of_both_kinds(tmp_path: Path) -> None:
    same = [True] * 30 + [False] * 20
    pairs = VerificationBin(write(tmp_path, ([png(0)] * 100, same))).pairs
    assert [int(pairs.same[pairs.fold == fold].sum()) for fold in range(10)] == [3] * 10
    assert [int((~pairs.same[pairs.fold == fold]).sum()) for fold in range(10)] == [2] * 10
