"""A trial of a compression, what came of all, and the search among them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qface.compression.compress_config import CompressionTarget
from qface.errors import CheckpointError
from qface.files import replacing
from qface.limits import named, parse_json
from qface.results import Result

__all__ = ["Compression", "Trial", "smallest_passing"]

_RECORD = "trial.json"


@dataclass(frozen=True)
class Trial:
    """One file that was made and judged. TPR and drop are in percent and percentage points.

    Args:
        name: average bits of weights and bits of activations, such as ``"w4.5a8"``.
        weight_bits: average over all weights.
        mb: size of the file in 10^6 bytes.
        tpr: of the file on the people it is judged on.
        drop: TPR of the float network minus that.
        drop_low: lower end of its two-sided confidence interval.
        drop_high: upper end.
        drop_bound: its one-sided upper bound, which the target is compared with.
        ms: median milliseconds of an image on one thread; None where no time is asked for.
        distilled: whether it was trained.
        misses: limits that it does not keep, in words; empty where it keeps all.
    """

    name: str
    weight_bits: float
    mb: float
    tpr: float
    drop: float
    drop_low: float
    drop_high: float
    drop_bound: float
    ms: float | None
    distilled: bool
    misses: tuple[str, ...] = ()

    @property
    def keeps(self) -> bool:
        """True if it keeps every limit of the target."""
        return not self.misses

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def write(self, folder: Path) -> None:
        """Keep it in ``folder``.

        Raises:
            ExportError: the folder cannot be written to.
        """
        with replacing(folder / _RECORD) as temporary:
            temporary.write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Trial | None:
        """The one that :meth:`write` kept in ``folder``; None where there is none.

        Raises:
            CheckpointError: its record is damaged.
        """
        path = folder / _RECORD
        if not path.exists():
            return None
        try:
            with named(path):
                record = parse_json(path.read_text(encoding="utf-8"), "its trial")
            values = {each.name: record[each.name] for each in fields(cls)}
            return cls(**{**values, "misses": tuple(values["misses"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: delete its folder, and run again") from error


@dataclass(frozen=True, repr=False)
class Compression(Result):
    """Result of :func:`qface.compress`.

    Args:
        target: what was asked for.
        float_tpr: TPR of the float network in percent, on the people that trials are judged on.
        images: images that trials are judged on.
        identities: people that they are judged on.
        trials: all that were made, in their order.
        chosen: the one that was written; None where none keeps the target.
        stopped: why the search ended, in a sentence.
        run_dir: folder with every trial's network and file.

    Example:
        >>> target = qface.CompressionTarget(max_mb=0.1, at_fpr="1e-1")
        >>> config = qface.CompressConfig(distill="never", calibration_images=16)
        >>> qface.compress("teacher.onnx", "faces/", "small.onnx", target, config).chosen.mb <= 0.1
        True
    """

    target: CompressionTarget
    float_tpr: float
    images: int
    identities: int
    trials: tuple[Trial, ...]
    chosen: Trial | None
    stopped: str
    run_dir: str

    def _key_figures(self) -> Mapping[str, object]:
        return {"chosen": self.chosen and self.chosen.name, "trials": len(self.trials), "stopped": self.stopped}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def figures(self) -> tuple[str, ...]:
        """Sentences on what the chosen file recognizes and loses; none where nothing was chosen."""
        trial = self.chosen
        if trial is None:
            return ()
        judged = f"{self.images:,} images of {self.identities:,} people who were not tuned on"
        recognized = (
            f"TPR {trial.tpr:.2f} % at FPR {self.target.at_fpr} on {judged}; that of the float network is "
            f"{self.float_tpr:.2f} %."
        )
        confidence = f"{self.target.confidence:.0%}"
        lost = (
            f"It loses {trial.drop:.2f} percentage points of TPR ({confidence} confidence interval over people: "
            f"{trial.drop_low:.2f} to {trial.drop_high:.2f}), and with {confidence} confidence at most "
            f"{trial.drop_bound:.2f}."
        )
        return recognized, lost


def smallest_passing(count: int, passes: Callable[[int], bool]) -> int | None:
    """The smallest number below ``count`` that passes, by bisection; None if the largest does not.

    It is exact where every number above one that passes does as well.

    Args:
        count: at least 1.
        passes: asked about each number at most once, the largest first.

    Example:
        >>> smallest_passing(11, lambda number: number >= 4)
        4
    """
    if not passes(count - 1):
        return None
    failing, passing = -1, count - 1
    while passing - failing > 1:
        middle = (failing + passing) // 2
        failing, passing = (failing, middle) if passes(middle) else (middle, passing)
    return passing
