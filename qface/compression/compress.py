"""The verb ``compress``: all stages in one call, at fixed bits or as a search for the smallest file within limits.

The search chooses bits per weight tensor with an average of 2 to 8, from one :func:`qface.sensitivity` table. Each
average is a trial: quantize, calibrate, export, and evaluate on other people. Trials are bisected, since fewer bits
lose more. Training comes last, because it takes longest.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from qface.choices import SENSITIVITY_IMAGES
from qface.compression.compress_config import CompressConfig, CompressionTarget
from qface.compression.judge import Judge
from qface.compression.run_record import RunRecord
from qface.compression.timed_network import TimedNetwork, network_within
from qface.compression.trials import Compression, Trial, smallest_passing
from qface.data.content_digest import digest_of_images
from qface.data.folders import ImageFolder
from qface.data.identities import FIRST_HALF, SECOND_HALF
from qface.deployment import export
from qface.distillation import distill
from qface.errors import ConfigError, ExportError
from qface.files import as_path, check_folder, make_folder, replacing
from qface.graph.queries import is_quantized
from qface.mixed_precision import Sensitivity, allocate_bits, average_bits, bits_for, draft_file, sensitivity
from qface.model_digest import digests_of_network
from qface.models import load, save
from qface.models.resolve import NetworkLike, as_network
from qface.models.store import check_savable
from qface.progress import shows_progress
from qface.quantization import QuantizationConfig, calibrate, quantize
from qface.quantization.quantization_config import MAX_BITS
from qface.run_folder import run_folder

__all__ = ["compress"]

AVERAGE_BITS = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0)
"""Average bits per weight to try; steps are finer at low bits, where a bit costs more."""

_STUDENT = "student.safetensors"
_MIN_STEP = 0.25
"""Minimum difference in average bits between the largest trial that fits and the next one."""


@shows_progress
def compress(
    model: NetworkLike,
    images: str | Path,
    output: str | Path,
    target: CompressionTarget | None = None,
    config: CompressConfig | None = None,
    identities: str | Path | None = None,
    eval_identities: str | Path | None = None,
    run_dir: str | Path | None = None,
    progress: bool = False,
) -> Compression:
    """Quantize, calibrate, distill and export a network, and evaluate the file on other people.

    With ``config.weight_bits`` there is one trial at these bits. Otherwise a search finds the smallest file that meets
    ``target``; without ``max_drop``, the file with the most bits within ``max_mb`` and ``max_ms``. A call that was
    stopped continues in its run folder. If no file meets the target, none is written; the run folder has all trials.
    Does not change ``model``.

    Args:
        model: float network [N, 3, H, W] -> [N, D]: a module, the path of its file, or ``package.module:factory``.
        images: folder of 112x112 crops, one subfolder per person.
        output: file to write (``.onnx``).
        target: limits of the file; None means ``CompressionTarget()``, which has none.
        config: settings; None means ``CompressConfig()``.
        identities: people to tune on: ``"first-half"``, ``"second-half"``, or a file with one name per line; None means
            the first half.
        eval_identities: people to evaluate on; None means the second half. Nobody may be in both.
        run_dir: folder of the trials; None means ``output`` with the suffix ``.run``.
        progress: show progress on stderr.

    Returns:
        All trials, the chosen one, and why the search ended.

    Raises:
        ConfigError: there are neither limits nor fixed bits, somebody is in both groups of people, the FPR needs more
            impostor pairs, no bits meet ``max_mb`` or ``max_ms``, or the run folder belongs to another compression.
        ImagesError: the images cannot be read or have no labels.
        CheckpointError: the model's file or the run folder cannot be read.
        ExportError: a file cannot be written.
        UnsupportedLayerError: a layer cannot be quantized or exported; the message names it.

    Example:
        >>> target = qface.CompressionTarget(at_fpr="1e-1")
        >>> config = qface.CompressConfig(weight_bits=6, activation_bits=6, distill="never")
        >>> qface.compress("teacher.onnx", "faces/", "small.onnx", target, config).chosen.name
        'w6a6'
    """
    output, target, config = as_path(output), target or CompressionTarget(), config or CompressConfig()
    if not target.has_limits and config.weight_bits is None:
        raise ConfigError("there is no target: give max_drop, max_mb or max_ms, or fixed bits (weight_bits, --bits)")
    if output.suffix != ".onnx":
        raise ExportError(f"the name of an exported file must end in .onnx, got {output}")
    check_folder(output)
    teacher = as_network(model)
    check_savable(teacher)
    if is_quantized(teacher):
        raise ConfigError("this network is quantized already: compress the float network that it was made from")
    tuning, judged = _people(images, identities, eval_identities)
    folder = output.with_suffix(".run") if run_dir is None else Path(run_dir)
    with run_folder(folder, _inputs(teacher, (tuning, judged), target, config)):
        judge = Judge(teacher, judged, target, folder / "reference")
        found = _Search(teacher, tuning, judge, target, config, folder).run()
        if found.chosen is not None:
            _copy(folder / found.chosen.name / "student.onnx", output)
            save(teacher, folder / "teacher.safetensors")
            _record(images, output, found, (identities, eval_identities)).write(folder)
    return found


def _people(
    images: str | Path, identities: str | Path | None, eval_identities: str | Path | None
) -> tuple[ImageFolder, ImageFolder]:
    if (identities is None) != (eval_identities is None):
        raise ConfigError("give both people to tune on and people to evaluate on, or neither")
    tuning = ImageFolder(images, identities or FIRST_HALF)
    judged = ImageFolder(images, eval_identities or SECOND_HALF)
    both = sorted(set(tuning.names) & set(judged.names))
    if both:
        raise ConfigError(
            f"{len(both)} people are in both groups (first: {both[0]}): evaluate on people who are not tuned on"
        )
    return tuning, judged


def _inputs(
    teacher: nn.Module, people: tuple[ImageFolder, ImageFolder], target: CompressionTarget, config: CompressConfig
) -> dict[str, object]:
    """Return a digest or the values of everything that the trials depend on."""
    return {
        **digests_of_network(teacher),
        "images to tune on": digest_of_images(people[0]),
        "images to evaluate on": digest_of_images(people[1]),
        "target": asdict(target),
        "config": asdict(config),
    }


@dataclass
class _Search:
    """The trials of one compression, each made once."""

    teacher: nn.Module
    tuning: ImageFolder
    judge: Judge
    target: CompressionTarget
    config: CompressConfig
    folder: Path

    def __post_init__(self) -> None:
        self.trials: dict[str, Trial] = {}
        self.configs: dict[float, QuantizationConfig] = {}

    def run(self) -> Compression:
        """Make the trials and choose one."""
        chosen, stopped = self._within_limits() if self.config.weight_bits is None else self._at_fixed_bits()
        faces = self.judge.faces
        return Compression(
            self.target,
            100 * self.judge.tpr,
            len(faces),
            faces.num_identities,
            tuple(self.trials.values()),
            chosen,
            stopped,
            str(self.folder),
        )

    def _at_fixed_bits(self) -> tuple[Trial | None, str]:
        assert self.config.weight_bits is not None
        average = float(self.config.weight_bits)
        self.configs[average] = QuantizationConfig(self.config.weight_bits, self.config.activation_bits)
        trial = self._trial(average, distilled=self.config.distill != "never")
        if trial.misses:
            return None, f"{trial.name} has the given bits, and misses the target: {_listed(trial)}"
        return trial, "the bits were given"

    def _within_limits(self) -> tuple[Trial | None, str]:
        averages = self._averages()
        return self._best_within(averages) if self.target.max_drop is None else self._smallest(averages)

    def _best_within(self, averages: list[float]) -> tuple[Trial | None, str]:
        trial = self._trial(averages[-1], distilled=self.config.distill != "never")
        if trial.misses:
            return None, f"{trial.name} has the most bits that fit, and misses the target: {_listed(trial)}"
        return trial, "these are the most bits that the limits allow"

    def _smallest(self, averages: list[float]) -> tuple[Trial | None, str]:
        at = smallest_passing(len(averages), lambda index: self._trial(averages[index]).keeps)
        if at is None:
            return self._trained_largest(averages)
        # Each further bit width adds nodes, so a very small network's file may grow as its bits fall.
        kept = min((trial for trial in self.trials.values() if trial.keeps), key=lambda trial: trial.mb)
        if self.config.distill == "for-size":
            return self._trained_down(averages[:at], kept)
        if at == 0:
            return kept, "there are no fewer bits"
        smaller = "" if self.config.distill == "never" else "; distill='for-size' trains smaller files as well"
        return kept, f"{self._name(averages[at - 1])} loses too much without training{smaller}"

    def _trained_largest(self, averages: list[float]) -> tuple[Trial | None, str]:
        """Train the student with the most bits, if that can help it to meet the target."""
        largest = self._trial(averages[-1])
        if self.config.distill == "never" or _is_too_large(largest, self.target):
            return None, f"{largest.name} is the largest file allowed, and misses the target: {_listed(largest)}"
        trained = self._trial(averages[-1], distilled=True)
        if trained.misses:
            return None, f"{trained.name} is the largest file allowed, and misses the target: {_listed(trained)}"
        if self.config.distill == "for-size":
            return self._trained_down(averages[:-1], trained)
        return trained, "calibration alone misses the target at any bits, and training meets it"

    def _trained_down(self, averages: list[float], kept: Trial) -> tuple[Trial, str]:
        """Train ever smaller files until one misses the target; ``kept`` is larger than all of them."""
        for average in reversed(averages):
            trial = self._trial(average, distilled=True)
            if trial.misses:
                return kept, f"{trial.name} loses too much after training too"
            kept = trial
        return kept, "there are no fewer bits"

    @functools.cached_property
    def timed(self) -> TimedNetwork:
        """The network to quantize and its time."""
        return network_within(self.teacher, self.tuning, self.target, self.config, self.folder)

    @property
    def network(self) -> nn.Module:
        """The network to quantize."""
        return self.timed.network

    @functools.cached_property
    def table(self) -> Sensitivity:
        """The sensitivity of the network's weights; the run folder keeps a copy."""
        table = sensitivity(
            self.network,
            self.tuning,
            activation_bits=(),
            num_images=min(SENSITIVITY_IMAGES, self.config.calibration.num_images),
            run_dir=self.folder / "sensitivity",
        )
        with replacing(self.folder / "sensitivity.json") as temporary:
            temporary.write_text(json.dumps(table.to_dict()) + "\n", encoding="utf-8")
        return table

    def _averages(self) -> list[float]:
        """Return the average bits to try, ascending; the last one has the most bits that ``max_mb`` allows."""
        if self.target.max_mb is None or self._megabytes(self._config(MAX_BITS)) <= self.target.max_mb:
            return list(AVERAGE_BITS)
        largest = allocate_bits(
            self.network,
            self.tuning,
            self.target.max_mb,
            activation_bits=self.config.activation_bits,
            table=self.table,
        )
        most = average_bits(self.table, largest)
        self.configs[most] = largest
        return [average for average in AVERAGE_BITS if average < most - _MIN_STEP] + [most]

    def _config(self, average: float) -> QuantizationConfig:
        if average not in self.configs:
            self.configs[average] = bits_for(self.table, average, self.config.activation_bits)
        return self.configs[average]

    def _megabytes(self, config: QuantizationConfig) -> float:
        with draft_file(self.network, config, self.tuning) as file:
            return file.stat().st_size / 1e6

    def _name(self, average: float, distilled: bool = False) -> str:
        return f"w{average:.3g}a{self.config.activation_bits}" + ("-distilled" if distilled else "")

    def _trial(self, average: float, distilled: bool = False) -> Trial:
        """Return the trial with about ``average`` bits per weight; make it if it is new."""
        name = self._name(average, distilled)
        if name not in self.trials:
            self.trials[name] = self._kept_trial(name, average, distilled)
        return self.trials[name]

    def _kept_trial(self, name: str, average: float, distilled: bool) -> Trial:
        folder = self.folder / name
        make_folder(folder)
        trial = Trial.read(folder)
        if trial is None:
            student = self._distilled(average) if distilled else self._calibrated(average)
            file = export(load(student), folder / "student.onnx", images=self.tuning)
            trial = self._judged(name, file, self._mean_weight_bits(average), distilled)
            trial.write(folder)
        return trial

    def _mean_weight_bits(self, average: float) -> float:
        config = self._config(average)
        return average_bits(self.table, config) if config.overrides else float(config.weight_bits)

    def _calibrated(self, average: float) -> Path:
        """Return the file of the calibrated student; calibrate it if it is new.

        What follows starts from this file, so that a stopped run continues alike on a machine that rounds otherwise.
        """
        folder = self.folder / self._name(average)
        file, run = folder / _STUDENT, folder / "calibration"
        if not file.exists():
            make_folder(folder)
            student = quantize(self.network, self._config(average))
            save(calibrate(student, self.tuning, self.config.calibration, run_dir=run), file)
        shutil.rmtree(run, ignore_errors=True)
        return file

    def _distilled(self, average: float) -> Path:
        """Return the file of the distilled student; train it if it is new."""
        folder = self.folder / self._name(average, distilled=True)
        file = folder / _STUDENT
        if not file.exists():
            start, run = load(self._calibrated(average)), folder / "distillation"
            save(distill(start, self.teacher, self.tuning, self.config.training, run, resume=True), file)
        return file

    def _judged(self, name: str, file: Path, weight_bits: float, distilled: bool) -> Trial:
        drops = self.judge(file)
        drop = drops.plain
        trial = Trial(
            name=name,
            weight_bits=round(weight_bits, 2),
            mb=file.stat().st_size / 1e6,
            tpr=100 * (self.judge.tpr - drop.drop),
            drop=100 * drop.drop,
            drop_low=100 * drop.interval.low,
            drop_high=100 * drop.interval.high,
            drop_bound=100 * drop.upper,
            ms=self.timed.ms,
            distilled=distilled,
            stress={condition: 100 * each.upper for condition, each in drops.stress.items()},
        )
        return replace(trial, misses=tuple(_misses(trial, self.target)))


def _misses(trial: Trial, target: CompressionTarget) -> Iterator[str]:
    if target.max_drop is not None and trial.drop_bound > target.max_drop:
        yield (
            f"it loses {trial.drop:.2f} percentage points of TPR, with {target.confidence:.0%} confidence "
            f"at most {trial.drop_bound:.2f}"
        )
    for condition, bound in trial.stress.items():
        if target.max_drop is not None and bound > target.max_drop:
            yield f"it loses up to {bound:.2f} percentage points under the condition {condition!r}"
    if _is_too_large(trial, target):
        yield f"{trial.mb:.3f} MB"


def _is_too_large(trial: Trial, target: CompressionTarget) -> bool:
    """True for a file above ``max_mb``, which training cannot change."""
    return target.max_mb is not None and trial.mb > target.max_mb


def _listed(trial: Trial) -> str:
    return ", ".join(trial.misses)


def _copy(source: Path, output: Path) -> None:
    with replacing(output) as temporary:
        shutil.copyfile(source, temporary)


def _record(
    images: str | Path,
    output: Path,
    found: Compression,
    people: tuple[str | Path | None, str | Path | None],
) -> RunRecord:
    """Return the record that ``qface report`` reads."""
    assert found.chosen is not None
    folder = Path(found.run_dir)
    trained, sensitivities = folder / found.chosen.name / "distillation" / "log.jsonl", folder / "sensitivity.json"
    tuning, judged = people
    return RunRecord(
        teacher=str(folder / "teacher.safetensors"),
        student=str(folder / found.chosen.name / _STUDENT),
        file=str(output),
        images=str(images),
        tuning_people=str(tuning or FIRST_HALF),
        eval_people=str(judged or SECOND_HALF),
        sensitivity=str(sensitivities) if sensitivities.exists() else None,
        log=str(trained) if trained.exists() else None,
        trials=tuple(trial.to_dict() for trial in found.trials),
        stopped=found.stopped,
    )
