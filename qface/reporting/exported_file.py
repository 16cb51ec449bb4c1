"""Metadata of files written by :func:`qface.export`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qface.deployment.export import ACTIVATION_BITS
from qface.deployment.golden import GoldenValues, read_golden
from qface.deployment.inputs import UINT8_INPUT
from qface.deployment.metadata import EMBEDDING, UNIT_LENGTH, read_metadata
from qface.errors import CheckpointError, one_line
from qface.evaluation.match_thresholds import MatchThresholds, thresholds_of
from qface.limits import MALFORMED, parse_json
from qface.preprocessing import Preprocessing, written_preprocessing
from qface.provenance import written_provenance

__all__ = ["ExportedFile", "is_exported"]

_NEEDED = ("preprocessing", "provenance", "input", "target", "verified", "qface")


@dataclass(frozen=True)
class ExportedFile:
    """Parsed metadata of an exported file.

    Args:
        name: name of the file.
        metadata: all metadata as strings.
        preprocessing: preprocessing of the network.
        steps: provenance, as from :func:`qface.provenance.provenance_of`.
        golden: stored embeddings of test images.
        thresholds: match thresholds; None if the file has none.
    """

    name: str
    metadata: Mapping[str, str]
    preprocessing: Preprocessing
    steps: tuple[dict[str, Any], ...]
    golden: GoldenValues
    thresholds: MatchThresholds | None

    @classmethod
    def read(cls, file: str | Path) -> ExportedFile:
        """Read the metadata of ``file``.

        Raises:
            CheckpointError: the file is missing or damaged, or was not written by ``export``.
        """
        metadata = read_metadata(file)
        missing = [key for key in _NEEDED if key not in metadata]
        if missing:
            raise CheckpointError(
                f"{file} has no {missing[0]!r} in its metadata: export it again with this version of qface"
            )
        return cls(
            Path(file).name.encode("utf-8", "replace").decode(),
            metadata,
            written_preprocessing(metadata["preprocessing"], file),
            written_provenance(metadata["provenance"], file),
            read_golden(file),
            thresholds_of(file),
        )

    @property
    def dimensions(self) -> int:
        """Embedding dimension."""
        return int(self.golden.embeddings.shape[1])

    @property
    def input(self) -> str:
        """Input type, a :data:`qface.choices.InputType`."""
        return self.metadata["input"]

    @property
    def target(self) -> str:
        """Export target, a :data:`qface.choices.TargetName`."""
        return self.metadata["target"]

    @property
    def reads_bytes(self) -> bool:
        """True if the input is uint8 and the file normalizes the images."""
        return self.input == UINT8_INPUT

    @property
    def has_unit_length(self) -> bool:
        """True if the file normalizes its embeddings."""
        return self.metadata.get(EMBEDDING) == UNIT_LENGTH

    @property
    def quantized(self) -> Mapping[str, Any] | None:
        """Provenance step of the quantization; None for a float network."""
        return next((step for step in reversed(self.steps) if step["step"] == "quantize"), None)

    @property
    def activation_bits(self) -> dict[int, int] | None:
        """Number of quantized activation tensors by bit width; None for files of older qface versions.

        Raises:
            CheckpointError: the metadata cannot be parsed.
        """
        if self.quantized is None or self.target != "cpu":
            return {}
        text = self.metadata.get(ACTIVATION_BITS)
        if text is None:
            return None
        try:
            return {int(bits): int(count) for bits, count in parse_json(text, "its activation bits").items()}
        except MALFORMED as error:
            raise CheckpointError(
                f"{self.name}: its {ACTIVATION_BITS} cannot be parsed ({one_line(error, 200)}); export it again"
            ) from error


def is_exported(file: str | Path) -> bool:
    """True if the ONNX file ``file`` has all metadata that :func:`qface.export` writes.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return read_metadata(file).keys() >= {*_NEEDED, "golden"}
