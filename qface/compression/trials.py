"""The trials of a compression, its result, and the bisection over trials."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qface.compression.compress_config import CompressionTarget
from qface.errors import CheckpointError
from qface.files import replacing
from qface.limits import MALFORMED, read_json
from qface.results import Result

__all__ = ["Compression", "Trial", "smallest_passing"]

_RECORD = "trial.json"


@dataclass(frozen=True)
class Trial:
    """One exported file and its evaluation.

    Args:
        name: average bits of weights and bits of activations, such as ``"w4.5a8"``.
        weight_bits: average over all weights.
        mb: size of the file in MB (10^6 bytes).
        tpr: TPR of the file on the people to evaluate on, in percent.
        drop: TPR of the float network minus ``tpr``, in percentage points.
        drop_low: lower end of the two-sided confidence interval of ``drop``.
        drop_high: upper end of that interval.
        drop_bound: one-sided upper bound of ``drop``, which ``max_drop`` limits.
        ms: median time per image on one thread, in ms, measured once for the network; None without ``max_ms``.
        distilled: True if the student was trained.
        stress: one-sided upper bound of the drop under each evaluated stress condition, in percentage points. No
            condition is evaluated after the first one that misses ``max_drop``.
        misses: limits that the file does not meet, in words.
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
    stress: Mapping[str, float]
    misses: tuple[str, ...] = ()

    @property
    def keeps(self) -> bool:
        """True if the file meets every limit of the target."""
        return not self.misses

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    def write(self, folder: Path) -> None:
        """Write the trial to its folder.

        Args:
            folder: existing folder.

        Raises:
            ExportError: the folder cannot be written to.
        """
        with replacing(folder / _RECORD) as temporary:
            temporary.write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Trial | None:
        """Read the trial that :meth:`write` wrote; return None if there is none.

        Args:
            folder: folder of the trial.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = folder / _RECORD
        if not path.exists():
            return None
        try:
            record = read_json(path, "the trial")
            values = {each.name: record[each.name] for each in fields(cls)}
            return cls(**{**values, "misses": tuple(values["misses"])})
        except (OSError, *MALFORMED) as error:
            raise CheckpointError(f"{path} is damaged: delete its folder and run the command again") from error


@dataclass(frozen=True, repr=False)
class Compression(Result):
    """Result of :func:`qface.compress`.

    Args:
        target: limits of the file.
        float_tpr: TPR of the float network in percent, on the people to evaluate on.
        images: number of images to evaluate on.
        identities: number of people to evaluate on.
        trials: all trials, in the order in which they were made.
        chosen: the trial whose file was written; None if no trial meets the target.
        stopped: why the search ended, in words.
        run_dir: folder with the student and file of every trial.

    Example:
        >>> target = qface.CompressionTarget(max_mb=0.1, at_fpr="1e-1")
        >>> config = qface.CompressConfig(distill="never", calibration=qface.CalibrationConfig(num_images=16))
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
        """Return plain values, for JSON."""
        return asdict(self)

    def figures(self) -> tuple[str, ...]:
        """Return sentences on the TPR of the chosen file and its loss, for a model card."""
        trial = self.chosen
        if trial is None:
            return ()
        recognized = (
            f"TPR {trial.tpr:.2f} % at FPR {self.target.at_fpr} on {self.images:,} images of {self.identities:,} "
            f"people who were not tuned on; the float network has {self.float_tpr:.2f} %."
        )
        confidence = f"{self.target.confidence:.0%}"
        lost = (
            f"It loses {trial.drop:.2f} percentage points of TPR ({confidence} confidence interval over people: "
            f"{trial.drop_low:.2f} to {trial.drop_high:.2f}), and with {confidence} confidence at most "
            f"{trial.drop_bound:.2f}."
        )
        return (recognized, lost, *self._stress_figures(trial))

    def _stress_figures(self, trial: Trial) -> tuple[str, ...]:
        if not trial.stress:
            return ()
        bounds = ", ".join(f"{condition} {bound:.2f}" for condition, bound in trial.stress.items())
        return (f"With changed probes it loses, with {self.target.confidence:.0%} confidence, at most: {bounds}.",)


def smallest_passing(count: int, passes: Callable[[int], bool]) -> int | None:
    """Return the smallest number below ``count`` that passes, by bisection; None if ``count - 1`` fails.

    Args:
        count: number of candidates, >= 1.
        passes: test of one candidate, called at most once for each. The result is exact if every number above a passing
            one passes too.

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
