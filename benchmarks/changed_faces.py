"""Ablate training augmentation: train students with each augmentation alone, with all and with none.

Students are evaluated on unchanged faces and with the stress protocol.

    python benchmarks/changed_faces.py [--data ../shared] [--network mobilefacenet] [--bits 6] [--arms none --arms all]
                                      [--seed 0] [--every 5] [--epochs N] [--max-steps N] [-o runs/changed_faces]
                                      [--json FILE]

Calibration and training use the first half of the LFW identities. The exported file is evaluated in onnxruntime on the
second half; the stress protocol uses every fifth identity of it (``--every``). "not trained" is the calibrated student.
Each arm is saved at once; repeat the command to resume after the last saved arm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import click
import numpy as np
from harness.benchmark_command import BenchmarkCommand
from harness.held_out import Halves
from harness.recipes import CALIBRATION_IMAGES, NETWORKS
from harness.records import Record, Records, digest_of_file
from harness.report_files import write_json
from rich.console import Console
from rich.table import Table
from torch import nn

import qface
from qface.data.subset import Subset
from qface.evaluation import as_embedder, embed, evaluate_stress
from qface.evaluation.embedding import Embedder, Embeddings
from qface.files import make_folder, temporary_folder

NOT_TRAINED, FPR = "not trained", "1e-4"
_PARTS = tuple(field.name for field in fields(qface.AugmentationConfig))


def _alone(*parts: str) -> qface.AugmentationConfig:
    """Return settings with only ``parts``, each at its default probability."""
    whole = qface.AugmentationConfig()
    return replace(qface.AugmentationConfig.none(), **{part: getattr(whole, part) for part in parts})


ARMS: dict[str, qface.AugmentationConfig | None] = {
    NOT_TRAINED: None,
    "none": None,
    "all": qface.AugmentationConfig(),
    "half": qface.AugmentationConfig(**{part: getattr(qface.AugmentationConfig(), part) / 2 for part in _PARTS}),
    "geometry": _alone("misalignment", "turn"),
    "appearance": _alone("low_resolution", "blur", "compression", "exposure", "color", "gray"),
    **{part: _alone(part) for part in _PARTS},
}


@click.command(cls=BenchmarkCommand)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared"), show_default=True)
@click.option("--network", type=click.Choice(list(NETWORKS)), default="mobilefacenet", show_default=True)
@click.option("--bits", default=6, show_default=True)
@click.option("--arms", type=click.Choice(list(ARMS)), multiple=True, default=list(ARMS))
@click.option("--seed", default=0, show_default=True)
@click.option("--every", type=click.IntRange(1), default=5, show_default=True, help="Stress every n-th identity.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training images.  [default: the recipe's]")
@click.option("--max-steps", type=click.IntRange(1), help="Maximum number of training steps.  [default: all epochs]")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/changed_faces"), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write all figures to this file.")
def main(
    data: Path,
    network: str,
    bits: int,
    arms: Sequence[str],
    seed: int,
    every: int,
    epochs: int | None,
    max_steps: int | None,
    output: Path,
    json_file: Path | None,
) -> None:
    """Train and evaluate each arm, then print and write the loss against the float network."""
    make_folder(output)
    weights = data / "weights" / NETWORKS[network]
    teacher, halves, records = qface.load(weights), Halves(data / "data"), Records(output)
    found: dict[str, Record] = {}
    for arm in arms:
        training = qface.DistillConfig(epochs=epochs, max_steps=max_steps, seed=seed, augmentation=ARMS[arm])
        settings = {"training": asdict(training), "bits": bits, "every": every, "weights": digest_of_file(weights)}
        settings |= {"images": CALIBRATION_IMAGES}
        name = f"{network}-w{bits}a{bits}-{arm.replace(' ', '-')}-seed{seed}"

        def measure(arm: str = arm, training: qface.DistillConfig = training) -> Record:
            with temporary_folder() as folder:
                file = folder / "student.onnx"
                qface.export(_student(teacher, halves, bits, None if arm == NOT_TRAINED else training), file)
                return judged(as_embedder(file), as_embedder(teacher), halves, every)

        found[arm] = records.recall(name, settings, measure)
    Console(width=max(Console().width, 150)).print(table(found, f"{network}, w{bits}a{bits}, seed {seed}"))
    if json_file is not None:
        write_json(json_file, {"network": network, "bits": bits, "seed": seed, "every": every, "arms": found})


def _student(teacher: nn.Module, halves: Halves, bits: int, training: qface.DistillConfig | None) -> nn.Module:
    student = qface.calibrate(qface.quantize(teacher, bits), halves.tuning)
    return student if training is None else qface.distill(student, teacher, halves.tuning, training)


def judged(model: Embedder, teacher: Embedder, halves: Halves, every: int) -> Record:
    """Evaluate both models on unchanged faces and, with each ``every``-th identity, under stress."""
    images = halves.held_out
    assert images.labels is not None
    embeddings: list[Embeddings] = [embed(each, images) for each in (model, teacher)]
    few = Subset(images, np.flatnonzero(images.labels.numpy() % every == 0).tolist())
    stressed = evaluate_stress(model, few, reference=teacher)
    return {
        "model": halves.figures(embeddings[0], embeddings[1]),
        "teacher": halves.figures(embeddings[1], embeddings[1]),
        "stress": stressed.to_dict()["figures"],
    }


def table(found: dict[str, Record], title: str) -> Table:
    """Return the loss of TPR in percentage points, one row per arm and one column per condition."""
    result = Table(title=f"{title}: loss of TPR in points; stress at FPR {FPR}, degraded probes, unchanged gallery")
    conditions = [each["condition"] for each in next(iter(found.values()))["stress"]][1:]
    fprs = list(next(iter(found.values()))["model"]["tpr"])
    for heading in ("arm", *fprs, *conditions, "mean"):
        result.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm, record in found.items():
        plain = [_lost(record["teacher"]["tpr"][fpr], record["model"]["tpr"][fpr]) for fpr in fprs]
        stress = [_lost(each["reference_tpr_at_fpr"][FPR], each["tpr_at_fpr"][FPR]) for each in record["stress"][1:]]
        known = [loss for loss in stress if loss is not None]
        mean = float(np.mean(known)) if known else None
        result.add_row(arm, *("-" if loss is None else f"{loss:.2f}" for loss in [*plain, *stress, mean]))
    return result


def _lost(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else 100 * (before - after)


if __name__ == "__main__":
    main()
