"""``calibrate``: set the scales and zero points of a student from images, and switch observers."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from qface.data.images import Images, check_normalized
from qface.data.sample import evenly, sample_batches
from qface.data.sources import as_image_source, source_record
from qface.errors import ConfigError
from qface.kept_memory import memory_kept
from qface.models.resolve import as_network
from qface.preprocessing import preprocessing_of
from qface.progress import shows_progress
from qface.provenance import record_step
from qface.quantization.calibration_config import CalibrationConfig
from qface.quantization.calibration_steps import CalibrationSteps, calibration_checkpoint
from qface.quantization.fake_quantize import NOT_CALIBRATED, quantizers
from qface.training_mode import eval_mode

__all__ = ["calibrate", "check_calibrated", "scale_parameters", "set_observers"]

_LOGGER = logging.getLogger("qface")


def set_observers(model: nn.Module, enabled: bool) -> None:
    """Switch all observers of ``model`` on or off.

    Args:
        model: a network that :func:`qface.quantize` returned.
        enabled: True to update scales and zero points in every forward pass, False to freeze them.
    """
    for quantizer in quantizers(model):
        quantizer.enable_observer(enabled)


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the scales of all quantizers, which LSQ trains.

    Args:
        model: a network that :func:`qface.quantize` returned; any other network has none.
    """
    return [quantizer.scale for quantizer in quantizers(model)]


def check_calibrated(model: nn.Module) -> None:
    """Refuse a student that has a scale that was never set; accept any network without quantizers.

    Args:
        model: the network to check.

    Raises:
        ConfigError: a scale was never set.
    """
    if not all(quantizer.calibrated for quantizer in quantizers(model)):
        raise ConfigError(NOT_CALIBRATED)


@shows_progress
def calibrate(
    student: fx.GraphModule | str | Path,
    images: Images,
    config: CalibrationConfig | None = None,
    identities: str | Path | None = None,
    progress: bool = False,
    run_dir: str | Path | None = None,
) -> fx.GraphModule:
    """Set all scales and zero points of a student from images.

    Changes ``student`` in place and returns it; of a path it loads, changes and returns the network, and the file stays
    as it is.

    The first calibration of a student runs three stages: cross-layer equalization, observation of float activations,
    and, layer by layer, GPTQ rounding of weights and correction of biases. A student that was calibrated before, and
    perhaps trained since, only gets new scales and zero points.

    Where there are fewer images than ``config.num_images``, mirror images are added, at most one of each. A mirrored
    face is a face, and with few bits it brings nearly as much as another image (docs/research/calibration.md).

    Args:
        student: the result of :func:`qface.quantize`, or the path of its file.
        images: folder of 112x112 crops, tensor [N, 3, H, W], or loader.
        config: settings; None means ``CalibrationConfig()``.
        identities: people of a folder: ``"first-half"``, ``"second-half"``, or a file with one name per line; None
            means all.
        progress: show progress on stderr.
        run_dir: folder for the state of a calibration that a signal stopped; the same call continues there, and ends
            with the same bytes as an uninterrupted one on a CPU with the same number of threads. None stores nothing.

    Returns:
        ``student``, calibrated, with its observers off and its mode and device unchanged.

    Raises:
        CheckpointError: the file or the run folder cannot be read.
        ConfigError: the model is not quantized, ``run_dir`` belongs to another calibration, or another run is using it.
        ExportError: ``run_dir`` cannot be created or written to.
        ImagesError: the images cannot be used.
        QFaceError: the network's embeddings of the images are NaN or infinite.

    Example:
        >>> student = qface.calibrate(qface.quantize(teacher, bits=6), "faces/")
    """
    network, config = as_network(student), config or CalibrationConfig()
    found = quantizers(network)
    if not isinstance(network, fx.GraphModule) or not found:
        raise ConfigError("this network is not quantized: run qface quantize, or call qface.quantize(model), first")
    student = network
    new = not any(quantizer.calibrated for quantizer in found)
    source = as_image_source(images, identities)
    batches = sample_batches(source, config.num_images, config.batch_size)
    preprocessing = preprocessing_of(student)
    for batch in batches:
        check_normalized(batch, preprocessing)
    originals = torch.cat(batches)
    mirrored = _mirrored(originals, config.num_images - len(originals))
    parts = _mixed(torch.cat([originals, mirrored]), config.batch_size)
    run: AbstractContextManager[Path | None] = nullcontext()
    if run_dir is not None:
        run = calibration_checkpoint(Path(run_dir), student, parts, config)
    with run as checkpoint, memory_kept(), eval_mode(student), torch.no_grad():
        CalibrationSteps(student, parts, config, new).run(checkpoint)
    stages = {"equalize": config.equalize, "gptq": config.gptq, "correct_biases": config.correct_biases}
    left_out = [name for name, wanted in stages.items() if wanted and not new]
    if left_out:
        _LOGGER.warning("this student was calibrated before, so these stages are skipped: %s", ", ".join(left_out))
    seen = {"images": len(originals), "mirror_images": len(mirrored), **source_record(source)}
    settings = {**seen, **{name: new and wanted for name, wanted in stages.items()}}
    return record_step(student, "calibrate", settings)


def _mirrored(images: Tensor, count: int) -> Tensor:
    """Return mirror images of up to ``count`` evenly spaced ``images``."""
    return images[evenly(len(images), count)].flip(-1)


def _mixed(images: Tensor, size: int) -> list[Tensor]:
    """Group ``images`` into batches of about ``size``, each with people from the entire set."""
    count = -(-len(images) // size)
    return [images[first::count] for first in range(count)]
