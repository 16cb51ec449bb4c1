"""Golden values: test images that integers alone make, and the embeddings that a file gives for them.

``export`` writes the embeddings into the metadata, so that any device can tell whether its runtime computes what was
trained, with the file and a few lines of code. A few embeddings are stored whole, so that a difference has a cosine.
Where embeddings must be equal there are also digests of four bytes, of more images, since a runtime may round only one
image in ten otherwise.
docs/on_device.md describes both for whoever writes the same in another language.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
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
from qface.results import Result

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
VERSION = 2
"""Version of the images and of the JSON; raised when either changes."""
EQUAL: Literal["equal"] = "equal"
NUM_EMBEDDINGS = 4
"""Embeddings that are stored whole, 4 bytes a number."""
NUM_DIGESTS = 16
"""Images of which 4 bytes each are stored, where embeddings must be equal. A runtime that rounds one image in ten
otherwise passes with four images two times in three, with sixteen one time in five."""

LEAST_COSINE_OF_FLOATS = 0.999
"""Minimum cosine of float32 and fp16 files, as ``verify`` asks for."""
LEAST_COSINE_WITH_ISLANDS = 0.95
"""Minimum cosine of files with float islands: a float that is rounded after one may be rounded otherwise."""
LEAST_COSINE_OF_FLOAT_OUTPUT = 0.999999
"""Minimum cosine where only the embedding itself is computed from floats, such as its length."""

Tolerance = Literal["equal"] | float
Embeddings = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]

_WORD = np.uint32
_CELL = 16  # pixels between two random bytes


def golden_image(number: int, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Test image ``number``: a smooth picture between random bytes 16 pixels apart, and a little noise.

    Args:
        number: which image, 0 to 681.
        size: height and width in pixels, at most 1,024 each; larger images repeat random bytes.

    Returns:
        uint8 [3, height, width], RGB.

    Example:
        >>> golden_image(0, (112, 112))[:, 1, 1].tolist()
        [32, 71, 207]
    """
    plane, y, x = np.indices((3, *size), np.uint32)
    plane += np.uint32(6 * number)
    (row, down), (column, right) = np.divmod(y, _CELL), np.divmod(x, _CELL)
    upper = (_CELL - right) * _random_bytes(plane, row, column) + right * _random_bytes(plane, row, column + 1)
    lower = (_CELL - right) * _random_bytes(plane, row + 1, column) + right * _random_bytes(plane, row + 1, column + 1)
    smooth = (_CELL - down) * upper + down * lower  # 0..255 * 256
    image: npt.NDArray[np.uint8] = ((15 * smooth >> 12) + (_random_bytes(plane + 3, y, x) >> 4)).astype(np.uint8)
    return image


def _random_bytes(plane: Words, y: Words, x: Words) -> Words:
    """A byte for each place: the highest of a 32-bit hash, lowbias32 of Wellons' hash-prospector."""
    word: Words = (plane << _WORD(20)) + (y << _WORD(10)) + x
    word = (word ^ word >> _WORD(16)) * _WORD(0x7FEB352D)
    word = (word ^ word >> _WORD(15)) * _WORD(0x846CA68B)
    return word >> _WORD(24)


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
    """CRC-32 of the bytes of ``embedding``.

    Args:
        embedding: float32 [dimensions]; its bytes count in little-endian order.

    Returns:
        An integer from 0 to 2^32 - 1.

    Example:
        >>> embedding_digest(np.ones(2, np.float32))
        3573961104
    """
    return zlib.crc32(embedding.astype("<f4").tobytes())


@dataclass(frozen=True)
class GoldenValues:
    """The embeddings that a file gives for the test images.

    Args:
        tolerance: ``"equal"`` where every runtime must give the same bits, or the least cosine.
        embeddings: float32 [images, dimensions], of the first images.
        digests: of the embeddings of all images; none where a tolerance allows other bits.
    """

    tolerance: Tolerance
    embeddings: Embeddings
    digests: tuple[int, ...] = ()

    @classmethod
    def of(cls, tolerance: Tolerance, embeddings: Embeddings) -> GoldenValues:
        """The golden values of the ``embeddings`` of the first test images, float32 [images, dimensions]."""
        digests = tuple(embedding_digest(row) for row in embeddings) if tolerance == EQUAL else ()
        return cls(tolerance, embeddings[:NUM_EMBEDDINGS], digests)

    @property
    def images(self) -> int:
        """Number of test images that there are values of."""
        return len(self.digests) or len(self.embeddings)

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
            CheckpointError: the text is damaged, or of another version.
        """
        try:
            record: dict[str, Any] = parse_json(text, "its golden values")
            version = int(record["version"])
            if version != VERSION:
                raise CheckpointError(
                    f"{path} has golden values of version {version}, not {VERSION}: export it again, or update qface"
                )
            rows = [np.frombuffer(base64.b64decode(row, validate=True), "<f4") for row in record["embeddings"]]
            tolerance = EQUAL if record["tolerance"] == EQUAL else float(record["tolerance"])
            digests = tuple(int(each) for each in record["digests"])
            if (tolerance == EQUAL) != (len(digests) >= len(rows)):
                raise ValueError(f"{len(digests)} digests of {len(rows)} embeddings")
            return cls(tolerance, np.stack(rows).astype(np.float32), digests)
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
            >>> expected = np.eye(2, dtype=np.float32)
            >>> GoldenValues.of("equal", expected).compare(expected, "numpy").agrees
            True
        """
        whole = len(self.embeddings)
        cosines = [_cosine(one, other) for one, other in zip(self.embeddings, embeddings[:whole], strict=True)]
        if self.tolerance == EQUAL:
            same = [embedding_digest(row) == digest for row, digest in zip(embeddings, self.digests, strict=True)]
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


@dataclass(frozen=True, repr=False)
class SelfTest(Result):
    """The result of :func:`selftest`.

    Args:
        runtime: what computed the embeddings, in words.
        tolerance: ``"equal"``, or the least cosine that is allowed.
        images: test images compared.
        different: how many of their embeddings are not as the tolerance demands.
        least_cosine: of the embeddings that are stored whole.
        cosines: how many these are.

    Example:
        >>> qface.selftest("student.onnx").images
        16
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

    def _key_figures(self) -> Mapping[str, object]:
        return {"agrees": self.agrees, "images": self.images, "different": self.different, "runtime": self.runtime}

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
        >>> measure_golden(OnnxEmbedder("student.onnx"), "equal").images
        16
    """
    embeddings = _embedded(embedder, NUM_DIGESTS if tolerance == EQUAL else NUM_EMBEDDINGS)
    if not np.isfinite(embeddings).all():
        raise ExportError("the network gives numbers that are not finite on test images: check its weights and scales")
    return GoldenValues.of(tolerance, embeddings)


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
        >>> embedder = OnnxEmbedder("student.onnx")
        >>> write_golden("student.onnx", measure_golden(embedder, "equal"))
    """
    add_metadata(path, {GOLDEN: golden.to_json()})


def read_golden(path: str | Path) -> GoldenValues:
    """The golden values in the metadata of the file at ``path``.

    Args:
        path: the ONNX file.

    Raises:
        CheckpointError: the file is missing or damaged, or holds none.

    Example:
        >>> read_golden("student.onnx").tolerance
        'equal'
    """
    text = read_metadata(path).get(GOLDEN)
    if text is None:
        raise CheckpointError(f"{path} holds no golden values: export it again with this version of qface")
    return GoldenValues.from_json(text, path)


def selftest(file: str | Path, providers: Sequence[str] | None = None) -> SelfTest:
    """Compare what onnxruntime computes here with the golden values in ``file``. Does not change ``file``.

    Args:
        file: an ONNX file that :func:`qface.export` wrote; no network, since golden values are in such files only.
        providers: onnxruntime's execution providers in order of preference; by default the CPU, and for a file for GPUs
            CUDA where it works.

    Raises:
        CheckpointError: the file is missing or damaged, or holds no golden values.
        ConfigError: a provider is unknown to the installed onnxruntime.
        QFaceError: onnxruntime cannot run the file.

    Example:
        >>> qface.selftest("student.onnx").agrees
        True
    """
    golden = read_golden(file)
    if providers is None:
        providers = providers_for(read_metadata(file).get("target", "cpu"))
    embedder = OnnxEmbedder(file, providers=providers)
    return golden.compare(_embedded(embedder, golden.images), embedder.runtime)
