"""Entries of the size report, and their sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qface.results import Result

__all__ = ["KINDS", "PARAMETERS", "TENSORS", "SizeEntry", "SizeReport"]

PARAMETERS = ("weight", "bias", "slope", "affine")
"""Kinds of entries that a float network has too."""
TENSORS = (*PARAMETERS, "scale", "zero_point", "constant")
KINDS = (*TENSORS, "header", "name", "node", "graph", "metadata")
"""Kinds of entries, in the order of reports; a tensor with several uses counts as the first of them.

``header`` is type, shape and framing of the tensors, ``name`` every place that names a value, node or tensor, ``node``
operators with their attributes, ``graph`` the interface and the frame of the graph, ``metadata`` the rest of the model.
"""

_MB, _MIB = 10**6, 2**20


@dataclass(frozen=True)
class SizeEntry:
    """One tensor, or all bytes of a file that serve one end.

    Args:
        name: the tensor as the file or network calls it; an operator; a field of the file.
        kind: one of :data:`KINDS`.
        bytes: on the disk, the tensor's data alone.
        elements: numbers of a tensor, else how often that occurs.
        bits: of a number as trained, as far as the source tells; None for what is no tensor.
    """

    name: str
    kind: str
    bytes: int
    elements: int
    bits: int | None = None

    @property
    def packed_bytes(self) -> int:
        """Bytes of the numbers without a wasted bit."""
        return self.bytes if self.bits is None else -(-self.elements * self.bits // 8)

    @property
    def fp32_bytes(self) -> int:
        """Bytes in a float network: four a parameter, none for what only integers need."""
        return 4 * self.elements if self.kind in PARAMETERS else 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "packed_bytes": self.packed_bytes, "fp32_bytes": self.fp32_bytes}


@dataclass(frozen=True, repr=False)
class SizeReport(Result):
    """Every entry of a file, or of the packed file that a network would become.

    Args:
        source: ``"file"``, counted on the disk, or ``"prediction"``, from a network: tensors only.
        entries: what the bytes are spent on.

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
        """Bytes of all entries; the size of the file where the source is one."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def mb(self) -> float:
        """Megabytes, 10^6 bytes."""
        return self.bytes / _MB

    @property
    def mib(self) -> float:
        """Mebibytes, 2^20 bytes."""
        return self.bytes / _MIB

    @property
    def fp32_bytes(self) -> int:
        """All parameters as float32, BatchNorm folded."""
        return sum(entry.fp32_bytes for entry in self.entries)

    def of_kind(self, kind: str) -> SizeReport:
        """The entries of one of :data:`KINDS`."""
        return replace(self, entries=tuple(entry for entry in self.entries if entry.kind == kind))

    @property
    def kinds(self) -> dict[str, SizeReport]:
        """A report for each kind that occurs, in the order of :data:`KINDS`."""
        reports = {kind: self.of_kind(kind) for kind in KINDS}
        return {kind: report for kind, report in reports.items() if report.entries}

    def totals(self) -> dict[str, int]:
        """Sums over all entries."""
        return {
            "bytes": self.bytes,
            "packed_bytes": sum(entry.packed_bytes for entry in self.entries),
            "fp32_bytes": self.fp32_bytes,
            "elements": sum(entry.elements for entry in self.entries),
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON: totals, totals of each kind, and the entries."""
        return {
            "source": self.source,
            **self.totals(),
            "kinds": {kind: report.totals() for kind, report in self.kinds.items()},
            "entries": [entry.to_dict() for entry in self.entries],
        }
