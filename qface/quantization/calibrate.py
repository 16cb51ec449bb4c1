"""``calibrate``: set the ranges of a student from images, and switch observers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from qface.choices import CALIBRATION_IMAGES
from qface.data.images import Images, check_normalized, normalize
from qface.data.sample import sample_batches
from qface.data.sources import as_image_source, source_record
from qface.errors import ConfigError
from qface.memory_format import fastest_memory_format
from qface.models.resolve import as_network
from qface.preprocessing import preprocessing_of
from qface.progress import shows_progress, track
from qface.provenance import record_step
from qface.quantization.bias_correction import channel_means
from qface.quantization.bias_correction import correct_biases as correct_channel_means
from qface.quantization.cross_layer_equalization import cross_layer_equalization
from qface.quantization.fake_quantize import LSQFakeQuantize
from qface.quantization.gptq import HessianCollector
from qface.quantization.gptq import gptq as gptq_weights
from qface.quantization.quantized_layers import MAX_BIAS, WeightedLayer
from qface.training_mode import eval_mode

__all__ = ["CALIBRATION_IMAGES", "calibrate", "scale_parameters", "set_observers"]

_LOGGER = logging.getLogger("qface")

_EQUALIZED = 128  # images at which equalization looks
_CORRECTED = 256  # and bias correction: with 64 or 512 it is no better


def quantizers(model: nn.Module) -> list[LSQFakeQuantize]:
    """All fake-quant modules with a range of their own, of activations and weights."""
    return [module for module in model.modules() if isinstance(module, LSQFakeQuantize)]


def set_observers(model: nn.Module, enabled: bool) -> None:
    """Let the ranges of ``model`` follow what it computes, or freeze them."""
    for quantizer in quantizers(model):
        quantizer.enable_observer(enabled)


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The scales of all quantizers of ``model``: what learned step sizes train."""
    return [quantizer.scale for quantizer in quantizers(model)]


@shows_progress
def calibrate(
    student: fx.GraphModule | str | Path,
    images: Images,
    identities: str | Path | None = None,
    num_images: int = CALIBRATION_IMAGES,
    batch_size: int = 64,
    progress: bool = False,
    equalize: bool = True,
    gptq: bool = True,
    correct_biases: bool = True,
) -> fx.GraphModule:
    """Set all ranges of ``student`` from the float values that ``images`` give rise to.

    Changes ``student`` in place and returns it; of a path it loads, changes and returns the network, and the file stays
    as it is.

    The first time, its channels are made to share one scale well before
    (:mod:`qface.quantization.cross_layer_equalization`), which changes weights but not what the float network computes;
    afterwards weights are rounded so that they make up for each other's errors (:mod:`qface.quantization.gptq`), and
    biases make up for what rounding does to the mean of each channel (:mod:`qface.quantization.bias_correction`). A
    student that was calibrated already, and perhaps trained since, gets new ranges only.

    Args:
        student: what :func:`qface.quantize` returned, or the path of its file.
        images: a folder of crops, a tensor, or a loader.
        identities: of a folder, which identities: ``"first-half"``, ``"second-half"`` or a file of names.
        num_images: images to look at, spread evenly over a folder or tensor; of a loader the first ones.
        batch_size: images at a time.
        progress: show the stages on stderr.
        equalize: of a new student, make the channels of each tensor share one scale well first.
        gptq: of a new student, round weights with GPTQ, so that they make up for each other's errors.
        correct_biases: of a new student, correct the mean of each channel last.

    Returns:
        ``student``, calibrated, its observers off, its mode and device as before.

    Raises:
        CheckpointError: the file cannot be read.
        ConfigError: the model is not quantized.
        ImagesError: the images cannot be used.

    Example:
        >>> student = qface.calibrate(qface.quantize(teacher, bits=6), "faces/")
    """
    network = as_network(student)
    found = quantizers(network)
    if not isinstance(network, fx.GraphModule) or not found:
        raise ConfigError("this network is not quantized; calibrate what qface.quantize returned")
    student = network
    new = not any(quantizer.calibrated for quantizer in found)
    source = as_image_source(images, identities)
    batches = sample_batches(source, num_images, batch_size)
    preprocessing = preprocessing_of(student)
    for batch in batches:
        check_normalized(batch, preprocessing)
    device = found[0].scale.device
    for quantizer in found:
        quantizer.activation_post_process.reset()
    parts = _mixed(batches, batch_size)
    with eval_mode(student), torch.no_grad():
        with _in_float(found):
            ready = _preparer(student, parts[0], device)
            if new and equalize:
                cross_layer_equalization(student, [ready(part) for part in _first(parts, _EQUALIZED)])
            hessians = HessianCollector(student)
            with _observing(found), hessians if new and gptq else nullcontext():
                means = [channel_means(student, ready(part)) for part in track(parts, "observe")]
        for quantizer in track(found, "choose ranges"):
            quantizer.set_range()
            quantizer.activation_post_process.reset()
        _keep_biases_in_range(student)
        if new and gptq:
            gptq_weights(hessians)
        if new and correct_biases:
            corrected = [ready(part) for part in _first(parts, _CORRECTED)]
            correct_channel_means(student, corrected, means[: len(corrected)])
    stages = {"equalize": equalize, "gptq": gptq, "correct_biases": correct_biases}
    left_out = [name for name, wanted in stages.items() if wanted and not new]
    if left_out:
        _LOGGER.warning("this student was calibrated before: it gets new ranges, without %s", ", ".join(left_out))
    seen = {"images": sum(map(len, batches)), **source_record(source)}
    settings = {**seen, **{name: new and wanted for name, wanted in stages.items()}}
    return record_step(student, "calibrate", settings)


def _mixed(batches: list[Tensor], size: int) -> list[Tensor]:
    """The images of ``batches`` in parts of about ``size``, each of them spread over all people."""
    images = torch.cat(batches)
    count = -(-len(images) // size)
    return [images[first::count] for first in range(count)]


def _preparer(student: fx.GraphModule, images: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The function that makes of ``images`` what ``student`` reads, in the order in memory that it is fastest in."""
    preprocessing = preprocessing_of(student)
    memory_format = fastest_memory_format(normalize(images[:1].to(device), preprocessing), student)
    return lambda part: normalize(part.to(device), preprocessing).contiguous(memory_format=memory_format)


def _first(parts: list[Tensor], num_images: int) -> list[Tensor]:
    """The first parts, with about ``num_images`` images."""
    return parts[: max(1, num_images // len(parts[0]))]


@contextmanager
def _in_float(found: list[LSQFakeQuantize]) -> Iterator[None]:
    """Round nothing."""
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
    """Widen the scale of channels whose bias would not fit its integers, as where pruning left weights near zero."""
    for layer in student.modules():
        if isinstance(layer, WeightedLayer) and layer.bias is not None and layer.quant_context.inputs[0] is not None:
            input_scale = layer.quant_context.inputs[0].qparams().scale
            least = layer.bias.detach().abs() / (MAX_BIAS / 2 * input_scale)
            scale = layer.weight_fake_quant.scale
            scale.data.copy_(torch.maximum(scale.data, least))
