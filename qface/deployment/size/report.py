"""Size report: entries and their sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qface.results import Result

__all__ = ["KINDS", "PARAMETERS", "TENSORS", "SizeEntry", "SizeReport"]

PARAMETERS = ("weight", "bias", "slope", "affine")
"""Kinds of tensors that a float network has too."""
TENSORS = (*PARAMETERS, "scale", "zero_point", "constant")
KINDS = (*TENSORS, "header", "name", "node", "graph", "metadata")
"""Kinds of entries, in report order; a tensor with several uses counts as the first of its kinds.

``header`` is dtype, shape and framing of tensors, ``name`` all names of values, nodes and tensors, ``node`` operators
with their attributes, ``graph`` inputs, outputs and framing of the graph, ``metadata`` the rest of the model.
"""

_MB, _MIB = 10**6, 2**20


@dataclass(frozen=True)
class SizeEntry:
    """One tensor, or all bytes of a file with one purpose.

    Args:
        name: name of the tensor, operator, or protobuf field.
        kind: one of :data:`KINDS`.
        bytes: bytes in the file; of a tensor, its data only.
        elements: number of elements of a tensor, else the number of occurrences.
        bits: bits per element as trained, as far as the file shows; None for anything but a tensor.
    """

    name: str
    kind: str
    bytes: int
    elements: int
    bits: int | None = None

    @property
    def packed_bytes(self) -> int:
        """Bytes of the elements if packed without padding bits."""
        return self.bytes if self.bits is None else -(-self.elements * self.bits // 8)

    @property
    def fp32_bytes(self) -> int:
        """Bytes in a float32 network: four per parameter, none for scales and zero points."""
        return 4 * self.elements if self.kind in PARAMETERS else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON."""
        return {**asdict(self), "packed_bytes": self.packed_bytes, "fp32_bytes": self.fp32_bytes}


@dataclass(frozen=True, repr=False)
class SizeReport(Result):
    """Size of a model file by purpose, counted or predicted.

    Args:
        source: ``"file"`` if counted in a file, ``"prediction"`` if predicted from a network (tensors only).
        entries: bytes by purpose.

    Example:
        >>> qface.measure_size(student).bytes < qface.measure_size(student).fp32_bytes
        True
    """

    source: str
    entries: tuple[SizeEntry, ...]

    def _key_figures(self) -> Mapping[str, object]:
        return {"source": self.source, "bytes": self.bytes, "entries": len(self.entries)}

    @property
    def bytes(self) -> int:
        """Bytes of all entries; equals the file size if the source is a file."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def mb(self) -> float:
        """Size in MB (10^6 bytes)."""
        return self.bytes / _MB

    @property
    def mib(self) -> float:
        """Size in MiB (2^20 bytes)."""
        return self.bytes / _MIB

    @property
    def fp32_bytes(self) -> int:
        """Bytes of all parameters as float32, BatchNorm folded."""
        return sum(entry.fp32_bytes for entry in self.entries)

    def of_kind(self, kind: str) -> SizeReport:
        """Return a report with the entries of one kind.

        Args:
            kind: one of :data:`KINDS`.
        """
        return replace(self, entries=tuple(entry for entry in self.entries if entry.kind == kind))

    @property
    def kinds(self) -> dict[str, SizeReport]:
        """Reports by kind, for the kinds that occur, in the order of :data:`KINDS`."""
        reports = {kind: self.of_kind(kind) for kind in KINDS}
        return {kind: report for kind, report in reports.items() if report.entries}

    def totals(self) -> dict[str, int]:
        """Return the sums over all entries."""
        return {
            "bytes": self.bytes,
            "packed_bytes": sum(entry.packed_bytes for entry in self.entries),
            "fp32_bytes": self.fp32_bytes,
            "elements": sum(entry.elements for entry in self.entries),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return totals, totals by kind, and entries, for JSON."""
        return {
            "source": self.source,
            **self.totals(),
            "kinds": {kind: report.totals() for kind, report in self.kinds.items()},
            "entries": [entry.to_dict() for entry in self.entries],
        }
