"""``allocate_bits``, which chooses bits per weight tensor for a maximum size of the exported file.

Only export knows what a file holds besides weights: names, nodes, biases, scales, and the nodes that unpack each bit
width. So a candidate is exported and measured; between candidates, the size changes by the bits of the weights.
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
from qface.mixed_precision.knapsack import choose_bit_widths
from qface.mixed_precision.sensitivity import SENSITIVITY_IMAGES, Sensitivity, read_sample, sensitivity
from qface.models.resolve import NetworkLike, as_network
from qface.progress import shows_progress
from qface.quantization import CalibrationConfig, LayerBits, QuantizationConfig, calibrate, quantize
from qface.quantization.quantization_config import MIN_BITS

__all__ = ["allocate_bits", "average_bits", "bits_for", "draft_file"]

_MB = 10**6
_RESERVE = 2048
"""Bytes reserved for the provenance of later distillation."""
_BYTES_PER_BIT_WIDTH = 1250
"""Approximate bytes of the nodes that unpack the weights of one bit width."""
_DRAFT_CALIBRATION = CalibrationConfig(num_images=8, gptq=False)
"""Calibration of a draft student: size and latency of the file depend on neither its ranges nor GPTQ, which is slow."""


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
    run_dir: str | Path | None = None,
) -> QuantizationConfig:
    """Choose 2 to 8 bits per weight tensor so that the exported file fits a size budget with minimum loss.

    It minimizes the sum of the layers' losses from :func:`qface.sensitivity`, and exports drafts to check the size.
    Pass the result to :func:`qface.quantize`. Does not change ``model``.

    Args:
        model: a float network: a module, the path of its file, or ``package.module:factory``.
        images: calibration set: a folder of crops, a tensor [N, 3, H, W], or a loader.
        budget_mb: maximum size of the exported file in MB (10^6 bytes), with the default settings of
            :func:`qface.export`.
        identities: identities to use of a folder: ``"first-half"``, ``"second-half"`` or a file of names; None for all.
        activation_bits: bits of the inputs of all convolutions and linear layers, 2 to 8 (default 6).
        num_images: number of images, evenly spaced in a folder or tensor, the first ones of a loader (default 32).
        batch_size: batch size (default 16).
        table: result of :func:`qface.sensitivity` for the weights of ``model``; None measures it.
        progress: True to show the stages on stderr.
        run_dir: folder for the losses measured so far, as for :func:`qface.sensitivity`; None (default) stores nothing.

    Returns:
        A config with the most frequent bits as ``weight_bits`` and the other layers in ``overrides``.

    Raises:
        CheckpointError: the file of the network cannot be read.
        ConfigError: even 2 bits everywhere exceed the budget, ``budget_mb`` is not > 0, bits are out of range, the
            model is already quantized, ``run_dir`` belongs to another run, or another run is using it.
        ImagesError: the images cannot be used, or there are none.
        ExportError: the student of this network cannot be exported, or ``run_dir`` cannot be written to.
        TraceError: torch.export cannot trace the network.
        UnsupportedLayerError: a layer cannot be quantized or exported; the message names it.

    Example:
        >>> config = qface.allocate_bits(teacher, "faces/", budget_mb=0.05)
        >>> student = qface.quantize(teacher, config)
    """
    if not math.isfinite(budget_mb) or budget_mb <= 0:
        raise ConfigError(f"budget_mb must be a number > 0 (MB), got {budget_mb}")
    model = as_network(model)
    faces = read_sample(images, identities, num_images)
    model = capture(model)  # once for all drafts
    narrowest = QuantizationConfig(MIN_BITS, activation_bits)
    smallest = _file_bytes(model, narrowest, faces)
    budget = int(budget_mb * _MB) - _RESERVE
    if budget < smallest:
        raise ConfigError(
            f"budget_mb must be >= {(smallest + _RESERVE) / _MB:.3f}, which this network needs with {MIN_BITS}-bit "
            f"weights, got {budget_mb}"
        )
    if table is None:
        table = sensitivity(
            model, faces, activation_bits=(), batch_size=batch_size, num_images=len(faces), run_dir=run_dir
        )
    return _fitting(model, narrowest, table, faces, budget, smallest)


def bits_for(table: Sensitivity, average: float, activation_bits: int) -> QuantizationConfig:
    """Choose bits per weight tensor with minimum loss and a given average number of bits.

    Args:
        table: losses of the weights.
        average: average bits per weight, 2 to 8; the unpacking nodes of each further bit width count too.
        activation_bits: bits of the inputs of all convolutions and linear layers, 2 to 8.

    Raises:
        ConfigError: the table has no losses of weights, or ``average`` is below 2.
    """
    overhead = 8 * _BYTES_PER_BIT_WIDTH
    elements = sum(layer.elements for layer in table.layers)
    chosen = choose_bit_widths(table, int(average * elements) + overhead, overhead)
    return _with_bit_widths(QuantizationConfig(MIN_BITS, activation_bits), chosen)


def average_bits(table: Sensitivity, config: QuantizationConfig) -> float:
    """Return the average bits per weight over all weight tensors of ``table``.

    Args:
        table: the layers.
        config: their bits.
    """
    bits = {name: layer.weight for name, layer in config.overrides.items()}
    total = sum(layer.elements * (bits.get(layer.name) or config.weight_bits) for layer in table.layers)
    return total / sum(layer.elements for layer in table.layers)


def _fitting(
    model: nn.Module, narrowest: QuantizationConfig, table: Sensitivity, faces: Tensor, budget: int, smallest: int
) -> QuantizationConfig:
    """Return the best config whose file has <= ``budget`` bytes."""
    minimum = MIN_BITS * sum(layer.elements for layer in table.layers) + 8 * _BYTES_PER_BIT_WIDTH
    room = 8 * (budget - smallest) + minimum
    while True:
        config = _with_bit_widths(narrowest, choose_bit_widths(table, max(room, minimum), 8 * _BYTES_PER_BIT_WIDTH))
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
    """Export a student calibrated on a few images, as a temporary file for the ``with`` block.

    Size and latency equal those of the final file; the embeddings do not.

    Args:
        model: a float network.
        config: bits and observers.
        images: calibration set.
    """
    student = calibrate(quantize(model, config), images, _DRAFT_CALIBRATION)
    with temporary_folder() as folder:
        yield export(student, folder / "student.onnx")


def _file_bytes(model: nn.Module, config: QuantizationConfig, faces: Tensor) -> int:
    with draft_file(model, config, faces) as file:
        return file.stat().st_size
