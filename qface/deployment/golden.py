"""Golden values: test images that integers alone make, and the embeddings that a file gives for them.

``export`` writes the embeddings into the metadata, so that any device can tell whether its runtime computes what was
trained, with the file and a few lines of code. A few embeddings are stored whole, so that a difference has a cosine. Of
more images there is a digest of four bytes each, since a runtime may round only one image in ten otherwise.
docs/on_device.md describes both for whoever writes the same in another language.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qface.deployment import integer_graph as ir
from qface.deployment.metadata import add_metadata, read_metadata
from qface.deployment.runtime import OnnxEmbedder, providers_for
from qface.errors import CheckpointError, ExportError, one_line
from qface.limits import parse_json

__all__ = [
    "GoldenValues",
    "SelfTest",
    "Tolerance",
    "embedding_digest",
    "golden_image",
    "golden_images",
    "golden_tolerance",
    "measure_golden",
    "read_golden",
    "selftest",
    "write_golden",
]

GOLDEN = "golden"
"""The metadata's key."""
VERSION = 1
"""Version of the images and of the JSON; raised when either changes."""
EQUAL: Literal["equal"] = "equal"
NUM_EMBEDDINGS = 4
"""Embeddings that are stored whole, 4 bytes a number."""
NUM_DIGESTS = 12
"""Further images, of which 4 bytes each are stored. A runtime that rounds one image in ten otherwise passes with four
images two times in three, with sixteen one time in five."""

LEAST_COSINE_OF_FLOATS = 0.999
"""Of float32 and fp16 files, as ``verify`` asks of the least of several cosines."""
LEAST_COSINE_WITH_ISLANDS = 0.95
"""Of files with float islands, likewise: a float that is rounded after one may be rounded otherwise."""
LEAST_COSINE_OF_FLOAT_OUTPUT = 0.999999
"""Where only the embedding itself is computed from floats, such as its length."""

Tolerance = Literal["equal"] | float
Embeddings = npt.NDArray[np.float32]

_CELL = 16  # pixels between two points of the coarse grid
_WORD = 0xFFFFFFFF
_FACTOR, _ADDEND = 1664525, 1013904223  # of the random bytes


def golden_image(number: int, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Test image ``number``: a smooth picture from a coarse grid of random bytes, and a little noise.

    Random bytes are the highest eight bits of the linear congruential generator of Numerical Recipes, seeded with
    ``(number + 1) * 2654435761``, all modulo 2^32.

    Args:
        number: which image, from 0.
        size: height and width in pixels.

    Returns:
        uint8 [3, height, width], RGB.

    Example:
        >>> golden_image(0, (112, 112))[:, 0, 0].tolist()
        [62, 228, 95]
    """
    height, width = size
    rows, columns = height // _CELL + 2, width // _CELL + 2
    image = np.empty((3, height, width), np.uint8)
    for channel, drawn in zip(image, _random_bytes(number, rows * columns + height * width), strict=True):
        grid, noise = drawn[: rows * columns].reshape(rows, columns), drawn[rows * columns :].reshape(height, width)
        smooth = _interpolated(_interpolated(grid, height).T, width).T  # 0..255 * 256
        channel[:] = (15 * smooth >> 12) + (noise >> 4)
    return image


def _random_bytes(number: int, count: int) -> npt.NDArray[np.int64]:
    """The bytes of the three channels of image ``number``, int64 [3, count].

    The last ``n`` states of the generator become the next ``n`` by one product and one sum, those of ``n`` steps.
    """
    factor, addend = _FACTOR, _ADDEND
    states = np.array([((number + 1) * 2654435761 * factor + addend) & _WORD], np.uint64)
    while len(states) < 3 * count:
        states = np.concatenate([states, (states * np.uint64(factor) + np.uint64(addend)) & np.uint64(_WORD)])
        factor, addend = factor * factor & _WORD, (factor + 1) * addend & _WORD
    return (states[: 3 * count] >> np.uint64(24)).astype(np.int64).reshape(3, count)


def _interpolated(rows: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """16 times the values between ``rows``, one row a pixel."""
    cell, offset = np.divmod(np.arange(length), _CELL)
    values: npt.NDArray[np.int64] = (_CELL - offset)[:, None] * rows[cell] + offset[:, None] * rows[cell + 1]
    return values


def golden_images(size: tuple[int, int], count: int = NUM_EMBEDDINGS) -> Tensor:
    """The first ``count`` test images.

    Args:
        size: height and width in pixels.
        count: how many.

    Returns:
        uint8 [count, 3, height, width], RGB.

    Example:
        >>> golden_images((112, 96)).shape
        torch.Size([4, 3, 112, 96])
    """
    return torch.from_numpy(np.stack([golden_image(number, size) for number in range(count)]))


def embedding_digest(embedding: Embeddings) -> int:
    """32-bit FNV-1a of the bytes of ``embedding``.

    Args:
        embedding: float32 [dimensions]; its bytes count in little-endian order.

    Returns:
        An integer from 0 to 2^32 - 1.

    Example:
        >>> embedding_digest(np.zeros(0, np.float32))
        2166136261
    """
    digest = 2166136261
    for byte in embedding.astype("<f4").tobytes():
        digest = ((digest ^ byte) * 16777619) & _WORD
    return digest


@dataclass(frozen=True)
class GoldenValues:
    """The embeddings that a file gives for the test images.

    Args:
        tolerance: ``"equal"`` where every runtime must give the same bits, or the least cosine.
        embeddings: float32 [images, dimensions], of the first images.
        digests: of the embeddings of the images after those; none where a tolerance allows other bits.
    """

    tolerance: Tolerance
    embeddings: Embeddings
    digests: tuple[int, ...] = ()

    @property
    def images(self) -> int:
        """Number of test images that there are values of."""
        return len(self.embeddings) + len(self.digests)

    def to_json(self) -> str:
        """One line of JSON, as it lies in file metadata."""
        return json.dumps(
            {
                "version": VERSION,
                "tolerance": self.tolerance,
                "embeddings": [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in self.embeddings],
                "digests": list(self.digests),
            }
        )

    @classmethod
    def from_json(cls, text: str, path: str | Path) -> GoldenValues:
        """Read what :meth:`to_json` wrote.

        Args:
            text: the metadata's.
            path: of the file, for messages.

        Raises:
            CheckpointError: the text is damaged, or of a later version.
        """
        try:
            record: dict[str, Any] = parse_json(text, "its golden values")
            version = int(record["version"])
            if version != VERSION:
                raise CheckpointError(f"{path} has golden values of version {version}: update qface to read them")
            rows = [np.frombuffer(base64.b64decode(row, validate=True), "<f4") for row in record["embeddings"]]
            tolerance = EQUAL if record["tolerance"] == EQUAL else float(record["tolerance"])
            return cls(tolerance, np.stack(rows).astype(np.float32), tuple(int(each) for each in record["digests"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: its golden values cannot be read ({one_line(error, 200)}); export it again"
            ) from error

    def compare(self, embeddings: Embeddings, runtime: str) -> SelfTest:
        """Say how far ``embeddings`` of the test images are from these.

        Args:
            embeddings: float32 [images, dimensions], of all :attr:`images`.
            runtime: what computed them, in words.

        Example:
            >>> GoldenValues("equal", np.eye(2, dtype=np.float32)).compare(np.eye(2, dtype=np.float32), "numpy").agrees
            True
        """
        whole = len(self.embeddings)
        pairs = list(zip(self.embeddings, embeddings[:whole], strict=True))
        cosines = [_cosine(expected, found) for expected, found in pairs]
        if self.tolerance == EQUAL:
            same = [np.array_equal(expected, found) for expected, found in pairs]
            digests = zip(self.digests, embeddings[whole:], strict=True)
            same += [expected == embedding_digest(found) for expected, found in digests]
        else:
            same = [cosine >= self.tolerance for cosine in cosines]
        return SelfTest(runtime, self.tolerance, self.images, same.count(False), min(cosines), whole)


def _cosine(one: Embeddings, other: Embeddings) -> float:
    """Between two embeddings, in float64; 0 where one is zero or not finite."""
    if np.array_equal(one, other):
        return 1.0
    a, b = one.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        product, lengths = float(a @ b), float(np.sqrt(a @ a) * np.sqrt(b @ b))
    return min(product / lengths, 1.0) if np.isfinite(product) and lengths > 0 else 0.0


@dataclass(frozen=True)
class SelfTest:
    """The result of :func:`selftest`.

    Args:
        runtime: what computed the embeddings, in words.
        tolerance: ``"equal"``, or the least cosine that is allowed.
        images: test images compared.
        different: how many of their embeddings are not as the tolerance demands.
        least_cosine: of the embeddings that are stored whole.
        cosines: how many these are.
    """

    runtime: str
    tolerance: Tolerance
    images: int
    different: int
    least_cosine: float
    cosines: int

    @property
    def agrees(self) -> bool:
        """True if the runtime computes what was trained."""
        return self.different == 0

    def __str__(self) -> str:
        """The verdict in one line."""
        verdict = "computes what was trained" if self.agrees else "DIFFERS from what was trained"
        cosines = f"least cosine of the first {self.cosines} is {self.least_cosine:.6f}"
        return f"{verdict}: {self.different} of {self.images} embeddings differ, {cosines}, {self.runtime}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"agrees": self.agrees, **asdict(self)}


def golden_tolerance(graph: ir.IntegerGraph | None, target: str) -> Tolerance:
    """The tolerance within which another runtime must reach a file's golden values.

    Integers are the same everywhere; sums of floats depend on their order.

    Args:
        graph: of a student; None of a float network.
        target: as of :func:`qface.export`; all but ``"cpu"`` compute in floats.

    Example:
        >>> golden_tolerance(None, "cpu")
        0.999
    """
    if graph is None or target != "cpu":
        return LEAST_COSINE_OF_FLOATS
    if any(isinstance(operation, ir.FloatIslandOp) for operation in graph.operations):
        return LEAST_COSINE_WITH_ISLANDS
    return EQUAL if _sums_only_integers(graph) else LEAST_COSINE_OF_FLOAT_OUTPUT


def _sums_only_integers(graph: ir.IntegerGraph) -> bool:
    """True if each float is an integer times a scale, as a linear layer's output is, or a normalized byte."""
    floats = [operation for operation in graph.operations if operation.output.qparams is None]
    return all(isinstance(each, (ir.LinearOp, ir.FlattenOp, ir.MoveOp, ir.NormalizeUint8Op)) for each in floats)


def measure_golden(embedder: OnnxEmbedder, tolerance: Tolerance) -> GoldenValues:
    """Golden values of the file of ``embedder``.

    Args:
        embedder: the file in onnxruntime.
        tolerance: how near another runtime must come.

    Raises:
        ExportError: an embedding has a number that is not finite, so that nothing could be compared with it.

    Example:
        >>> measure_golden(OnnxEmbedder("student.onnx"), "equal").images  # doctest: +SKIP
        16
    """
    count = NUM_EMBEDDINGS + (NUM_DIGESTS if tolerance == EQUAL else 0)
    embeddings = _embedded(embedder, count)
    if not np.isfinite(embeddings).all():
        raise ExportError("the network gives numbers that are not finite on test images: check its weights and scales")
    digests = tuple(embedding_digest(row) for row in embeddings[NUM_EMBEDDINGS:])
    return GoldenValues(tolerance, embeddings[:NUM_EMBEDDINGS], digests)


def _embedded(embedder: OnnxEmbedder, count: int) -> Embeddings:
    """Embeddings of the first test images, one by one as a device asks for them."""
    images = golden_images(embedder.preprocessing.size, count)
    return torch.cat([embedder(image[None]) for image in images]).numpy()


def write_golden(path: str | Path, golden: GoldenValues) -> None:
    """Write ``golden`` into the metadata of the file at ``path``.

    Args:
        path: the ONNX file; it is replaced as a whole or not at all.
        golden: measured with this file.

    Raises:
        CheckpointError: the file is missing or damaged.
        ExportError: it cannot be replaced.

    Example:
        >>> embedder = OnnxEmbedder("student.onnx")  # doctest: +SKIP
        >>> write_golden("student.onnx", measure_golden(embedder, "equal"))  # doctest: +SKIP
    """
    add_metadata(path, {GOLDEN: golden.to_json()})


def read_golden(path: str | Path) -> GoldenValues:
    """The golden values in the metadata of the file at ``path``.

    Args:
        path: the ONNX file.

    Raises:
        CheckpointError: the file is missing or damaged, or holds none.

    Example:
        >>> read_golden("student.onnx").tolerance  # doctest: +SKIP
        'equal'
    """
    text = read_metadata(path).get(GOLDEN)
    if text is None:
        raise CheckpointError(f"{path} holds no golden values: export it again with this version of qface")
    return GoldenValues.from_json(text, path)


def selftest(file: str | Path, providers: Sequence[str] | None = None) -> SelfTest:
    """Compare what onnxruntime computes here with the golden values in ``file``.

    Args:
        file: an ONNX file that :func:`qface.export` wrote.
        providers: onnxruntime's execution providers in order of preference; by default the CPU, and for a file for GPUs
            CUDA where it works.

    Raises:
        CheckpointError: the file is missing or damaged, or holds no golden values.
        ConfigError: a provider is unknown to the installed onnxruntime.
        QFaceError: onnxruntime cannot run the file.

    Example:
        >>> qface.selftest("student.onnx").agrees  # doctest: +SKIP
        True
    """
    golden = read_golden(file)
    if providers is None:
        providers = providers_for(read_metadata(file).get("target", "cpu"))
    embedder = OnnxEmbedder(file, providers=providers)
    return golden.compare(_embedded(embedder, golden.images), embedder.runtime)
