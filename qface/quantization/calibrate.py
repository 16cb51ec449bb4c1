"""``calibrate``: set the scales and zero points of a student from images, and switch observers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from qface.data.images import Images, check_normalized, normalize
from qface.data.sample import sample_batches
from qface.data.sources import as_image_source, source_record
from qface.errors import ConfigError
from qface.memory_format import fastest_memory_format
from qface.models.resolve import as_network
from qface.preprocessing import preprocessing_of
from qface.progress import shows_progress, track
from qface.provenance import record_step
from qface.quantization.bias_correction import channel_means, correct_biases
from qface.quantization.calibration_config import CalibrationConfig
from qface.quantization.cross_layer_equalization import cross_layer_equalization
from qface.quantization.fake_quantize import NOT_CALIBRATED, LSQFakeQuantize
from qface.quantization.gptq import HessianCollector, gptq
from qface.quantization.quantized_layers import MAX_BIAS, WeightedLayer
from qface.training_mode import eval_mode

__all__ = ["calibrate", "check_calibrated", "scale_parameters", "set_observers"]

_LOGGER = logging.getLogger("qface")

_EQUALIZATION_IMAGES = 128
_BIAS_CORRECTION_IMAGES = 256  # 64 or 512 were no better


def quantizers(model: nn.Module) -> list[LSQFakeQuantize]:
    """Return the fake-quantize modules of ``model`` that have a scale of their own."""
    return [module for module in model.modules() if isinstance(module, LSQFakeQuantize)]


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
) -> fx.GraphModule:
    """Set all scales and zero points of a student from images.

    Changes ``student`` in place and returns it; of a path it loads, changes and returns the network, and the file stays
    as it is.

    The first calibration of a student runs four stages: cross-layer equalization, observation of float activations,
    GPTQ rounding of weights, and DFQ bias correction. A student that was calibrated before, and perhaps trained since,
    only gets new scales and zero points.

    Args:
        student: the result of :func:`qface.quantize`, or the path of its file.
        images: folder of 112x112 crops, tensor [N, 3, H, W], or loader.
        config: settings; None means ``CalibrationConfig()``.
        identities: people of a folder: ``"first-half"``, ``"second-half"``, or a file with one name per line; None
            means all.
        progress: show progress on stderr.

    Returns:
        ``student``, calibrated, with its observers off and its mode and device unchanged.

    Raises:
        CheckpointError: the file cannot be read.
        ConfigError: the model is not quantized.
        ImagesError: the images cannot be used.

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
    device = found[0].scale.device
    for quantizer in found:
        quantizer.activation_post_process.reset()
    parts = _mixed(batches, config.batch_size)
    with eval_mode(student), torch.no_grad():
        with _in_float(found):
            ready = _preparer(student, parts[0], device)
            if new and config.equalize:
                cross_layer_equalization(student, [ready(part) for part in _first(parts, _EQUALIZATION_IMAGES)])
            hessians = HessianCollector(student)
            with _observing(found), hessians if new and config.gptq else nullcontext():
                means = [channel_means(student, ready(part)) for part in track(parts, "observe")]
        for quantizer in track(found, "choose ranges"):
            quantizer.set_range()
            quantizer.activation_post_process.reset()
        _keep_biases_in_range(student)
        if new and config.gptq:
            gptq(hessians)
        if new and config.correct_biases:
            corrected = [ready(part) for part in _first(parts, _BIAS_CORRECTION_IMAGES)]
            correct_biases(student, corrected, means[: len(corrected)])
    stages = {"equalize": config.equalize, "gptq": config.gptq, "correct_biases": config.correct_biases}
    left_out = [name for name, wanted in stages.items() if wanted and not new]
    if left_out:
        _LOGGER.warning("this student was calibrated before, so these stages are skipped: %s", ", ".join(left_out))
    seen = {"images": sum(map(len, batches)), **source_record(source)}
    settings = {**seen, **{name: new and wanted for name, wanted in stages.items()}}
    return record_step(student, "calibrate", settings)


def _mixed(batches: list[Tensor], size: int) -> list[Tensor]:
    """Regroup the images into batches of about ``size``, each with people from the entire set."""
    images = torch.cat(batches)
    count = -(-len(images) // size)
    return [images[first::count] for first in range(count)]


def _preparer(student: fx.GraphModule, images: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function that normalizes a batch for ``student``, in its fastest memory format."""
    preprocessing = preprocessing_of(student)
    memory_format = fastest_memory_format(normalize(images[:1].to(device), preprocessing), student)
    return lambda part: normalize(part.to(device), preprocessing).contiguous(memory_format=memory_format)


def _first(parts: list[Tensor], num_images: int) -> list[Tensor]:
    """Return the first batches, with about ``num_images`` images."""
    return parts[: max(1, num_images // len(parts[0]))]


@contextmanager
def _in_float(found: list[LSQFakeQuantize]) -> Iterator[None]:
    for quantizer in found:
        quantizer.enable_fake_quant(False)
    try:
        yield
    finally:
        for quantizer in found:
            quantizer.enable_fake_quant()


@contextmanager
def _observing(found: list[LSQFakeQuantize]) -> Iterator[None]:
    for quantizer in found:
        quantizer.enable_observer()
    try:
        yield
    finally:
        for quantizer in found:
            quantizer.enable_observer(False)


def _keep_biases_in_range(student: fx.GraphModule) -> None:
    """Enlarge the scale of channels whose bias would overflow, such as channels that pruning left near zero."""
    for layer in student.modules():
        if isinstance(layer, WeightedLayer) and layer.bias is not None and layer.quant_context.inputs[0] is not None:
            input_scale = layer.quant_context.inputs[0].qparams().scale
            minimum = layer.bias.detach().abs() / (MAX_BIAS / 2 * input_scale)
            scale = layer.weight_fake_quant.scale
            scale.data.copy_(torch.maximum(scale.data, minimum))
