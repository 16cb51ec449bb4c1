"""``allocate_bits``: bits for each weight, so that the exported file fits into a budget and loses least.

This lies behind export, since what a file takes beside its weights is known only there: names, nodes, biases, scales,
and the nodes that unpack each bit width that occurs. So files are written and measured; their weights are a sum.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from qface.data.images import Images
from qface.deployment.export import export
from qface.errors import ConfigError
from qface.files import temporary_folder
from qface.graph.capture import capture
from qface.models.resolve import NetworkLike, as_network
from qface.progress import shows_progress
from qface.quantization import CalibrationConfig, LayerBits, QuantizationConfig, calibrate, quantize
from qface.quantization.allocation import choose_bit_widths
from qface.quantization.quantization_config import MIN_BITS
from qface.quantization.sensitivity import SENSITIVITY_IMAGES, Sensitivity, read_sample, sensitivity

__all__ = ["allocate_bits", "average_bits", "bits_for", "draft_file"]

_MB = 10**6
_RESERVE = 2048
"""Bytes kept free for what the file's provenance will say of distillation."""
_BYTES_PER_BIT_WIDTH = 1250
"""About what the nodes take that unpack the weights of one bit width."""
_DRAFT_CALIBRATION = CalibrationConfig(num_images=8, gptq=False)
"""Enough to measure a file, whose size and time do not depend on its ranges; nor do they on GPTQ, which is slow."""


@shows_progress
def allocate_bits(
    model: NetworkLike,
    images: Images,
    budget_mb: float,
    identities: str | Path | None = None,
    activation_bits: int = 6,
    num_images: int = SENSITIVITY_IMAGES,
    batch_size: int = 16,
    table: Sensitivity | None = None,
    progress: bool = False,
) -> QuantizationConfig:
    """2 to 8 bits for each of the weights of ``model`` that change its embedding least within ``budget_mb``.

    It minimizes the sum over layers of what quantizing each alone costs (:func:`qface.sensitivity`), and makes sure
    of the budget by exporting. Pass the result to :func:`qface.quantize`. Does not change ``model``.

    Args:
        model: a float network: a module, the path of its file, or ``package.module:factory``.
        images: a folder of crops, a tensor, or a loader.
        budget_mb: greatest size of the file that :func:`qface.export` writes by default, in MB of 10^6 bytes.
        identities: of a folder, which identities: ``"first-half"``, ``"second-half"`` or a file of names.
        activation_bits: of what layers read, 2 to 8.
        num_images: images to look at, spread evenly over a folder or tensor; of a loader the first ones.
        batch_size: images at a time.
        table: what :func:`qface.sensitivity` found of the weights of ``model``; None measures it.
        progress: show the stages on stderr.

    Returns:
        A config whose ``weight_bits`` is that of most layers and whose ``overrides`` hold the others'.

    Raises:
        CheckpointError: the file of the network cannot be read.
        ConfigError: 2 bits everywhere do not fit into the budget, it is no number above 0, bits are out of range, or
            the model is quantized.
        ImagesError: the images cannot be used, or there are none.
        ExportError: the student of this network cannot be exported.
        TraceError: torch.export cannot follow the network.
        UnsupportedLayerError: a layer cannot be quantized or exported; it is named.

    Example:
        >>> config = qface.allocate_bits(teacher, "faces/", budget_mb=0.05)
        >>> student = qface.quantize(teacher, config)
    """
    if not math.isfinite(budget_mb) or budget_mb <= 0:
        raise ConfigError(f"budget_mb is {budget_mb}; it must be a number of megabytes above 0")
    model = as_network(model)
    faces = read_sample(images, identities, num_images)
    model = capture(model)  # once, for all students to come
    narrowest = QuantizationConfig(MIN_BITS, activation_bits)
    smallest = _file_bytes(model, narrowest, faces)
    budget = int(budget_mb * _MB) - _RESERVE
    if budget < smallest:
        raise ConfigError(
            f"{budget_mb} MB are too few: this network needs {(smallest + _RESERVE) / _MB:.3f} MB "
            f"with weights of {MIN_BITS} bits; raise the budget"
        )
    if table is None:
        table = sensitivity(model, faces, activation_bits=(), batch_size=batch_size, num_images=len(faces))
    return _fitting(model, narrowest, table, faces, budget, smallest)


def bits_for(table: Sensitivity, average: float, activation_bits: int) -> QuantizationConfig:
    """2 to 8 bits for each weight that lose least, with about ``average`` bits for a number.

    Args:
        table: with the losses of weights.
        average: 2 to 8; what a further bit width takes in the file counts as well.
        activation_bits: of what layers read, 2 to 8.

    Raises:
        ConfigError: the table has no losses of weights, or the average is below 2.
    """
    overhead = 8 * _BYTES_PER_BIT_WIDTH
    elements = sum(layer.elements for layer in table.layers)
    chosen = choose_bit_widths(table, int(average * elements) + overhead, overhead)
    return _with_bit_widths(QuantizationConfig(MIN_BITS, activation_bits), chosen)


def average_bits(table: Sensitivity, config: QuantizationConfig) -> float:
    """Bits of a weight in the mean over all numbers in the weights of ``table``."""
    bits = {name: layer.weight for name, layer in config.overrides.items()}
    total = sum(layer.elements * (bits.get(layer.name) or config.weight_bits) for layer in table.layers)
    return total / sum(layer.elements for layer in table.layers)


def _fitting(
    model: nn.Module, narrowest: QuantizationConfig, table: Sensitivity, faces: Tensor, budget: int, smallest: int
) -> QuantizationConfig:
    """The best bits of ``table`` whose file has at most ``budget`` bytes, of which ``narrowest`` has ``smallest``."""
    least = MIN_BITS * sum(layer.elements for layer in table.layers) + 8 * _BYTES_PER_BIT_WIDTH
    room = 8 * (budget - smallest) + least
    while True:
        config = _with_bit_widths(narrowest, choose_bit_widths(table, max(room, least), 8 * _BYTES_PER_BIT_WIDTH))
        excess = _file_bytes(model, config, faces) - budget
        if excess <= 0:
            return config
        room -= 8 * excess


def _with_bit_widths(config: QuantizationConfig, bit_widths: Mapping[str, int]) -> QuantizationConfig:
    ((most, _),) = Counter(bit_widths.values()).most_common(1)
    others = {name: LayerBits(weight=bits) for name, bits in bit_widths.items() if bits != most}
    return replace(config, weight_bits=most, overrides=others)


@contextmanager
def draft_file(model: nn.Module, config: QuantizationConfig, images: Images) -> Iterator[Path]:
    """The file of a student with ``config``, hardly calibrated, until the end of the block.

    Its size and its time are those of the real one, its embeddings are not.
    """
    student = calibrate(quantize(model, config), images, _DRAFT_CALIBRATION)
    with temporary_folder() as folder:
        yield export(student, folder / "student.onnx")


def _file_bytes(model: nn.Module, config: QuantizationConfig, faces: Tensor) -> int:
    with draft_file(model, config, faces) as file:
        return file.stat().st_size
