"""``allocate_bits``: a width for each weight, so that the exported file fits into a budget and loses least.

This lies behind export, since what a file takes beside its weights is known only there: names, nodes, biases, scales,
and the nodes that unpack each width that occurs. So files are written and measured; their weights are a sum.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from qface.data.images import Images
from qface.deployment.export import export
from qface.errors import ConfigError
from qface.quantization import LayerBits, QuantizationConfig, calibrate, quantize
from qface.quantization.allocation import choose_widths
from qface.quantization.config import MIN_BITS
from qface.quantization.sensitivity import SENSITIVITY_IMAGES, Sensitivity, read_sample, sensitivity

__all__ = ["allocate_bits"]

_MB = 10**6
_RESERVE = 2048
"""Bytes kept free for what the file's provenance will say of distillation."""
_BYTES_A_WIDTH = 1250
"""About what the nodes take that unpack the weights of one width."""
_CALIBRATION_IMAGES = 8
"""Enough to measure a file, whose size does not depend on its ranges."""


def allocate_bits(
    model: nn.Module,
    images: Images,
    budget_mb: float,
    people: str | Path | None = None,
    activation_bits: int = 6,
    count: int = SENSITIVITY_IMAGES,
    batch_size: int = 16,
    progress: bool = False,
) -> QuantizationConfig:
    """Widths of 2 to 8 bits for the weights of ``model`` that change its embedding least within ``budget_mb``.

    It minimises the sum over layers of what quantizing each alone costs (:func:`qface.sensitivity`), and makes sure
    of the budget by exporting. Pass the result to :func:`qface.quantize`.

    Args:
        model: a float network.
        images: a folder of crops, a tensor, or a loader.
        budget_mb: greatest size of the file that :func:`qface.export` writes by default, in MB of 10^6 bytes.
        people: of a folder, which identities: ``"first-half"``, ``"second-half"`` or a file of names.
        activation_bits: width of what layers read, 2 to 8.
        count: images to look at, spread evenly over a folder or tensor; of a loader the first ones.
        batch_size: images at a time.
        progress: show a progress bar.

    Returns:
        A config whose ``weight_bits`` is the width of most layers and whose ``overrides`` hold the others'.

    Raises:
        ConfigError: 2 bits everywhere do not fit into the budget, it is no number above 0, a width is out of range, or
            the model is quantized.
        ImagesError: the images cannot be used, or there are none.
        ExportError: the student of this network cannot be exported.
        TraceError: torch.fx cannot trace the network.
        UnsupportedLayerError: a layer cannot be quantized or exported; it is named.
    """
    if not math.isfinite(budget_mb) or budget_mb <= 0:
        raise ConfigError(f"budget_mb is {budget_mb}; it must be a number of megabytes above 0")
    faces = read_sample(images, people, count)
    narrowest = QuantizationConfig(MIN_BITS, activation_bits)
    smallest = _file_bytes(model, narrowest, faces)
    budget = int(budget_mb * _MB) - _RESERVE
    if budget < smallest:
        raise ConfigError(
            f"{budget_mb} MB are too few: this network needs {(smallest + _RESERVE) / _MB:.3f} MB "
            f"with weights of {MIN_BITS} bits; raise the budget"
        )
    table = sensitivity(model, faces, activation_bits=(), batch_size=batch_size, count=len(faces), progress=progress)
    return _fitting(model, narrowest, table, faces, budget, smallest)


def _fitting(
    model: nn.Module, narrowest: QuantizationConfig, table: Sensitivity, faces: Tensor, budget: int, smallest: int
) -> QuantizationConfig:
    """The best widths of ``table`` whose file has at most ``budget`` bytes, of which ``narrowest`` has ``smallest``."""
    least = MIN_BITS * sum(layer.elements for layer in table.layers) + 8 * _BYTES_A_WIDTH
    room = 8 * (budget - smallest) + least
    while True:
        config = _with_widths(narrowest, choose_widths(table, max(room, least), 8 * _BYTES_A_WIDTH))
        excess = _file_bytes(model, config, faces) - budget
        if excess <= 0:
            return config
        room -= 8 * excess


def _with_widths(config: QuantizationConfig, widths: Mapping[str, int]) -> QuantizationConfig:
    ((most, _),) = Counter(widths.values()).most_common(1)
    others = {name: LayerBits(weight=bits) for name, bits in widths.items() if bits != most}
    return replace(config, weight_bits=most, overrides=others)


def _file_bytes(model: nn.Module, config: QuantizationConfig, faces: Tensor) -> int:
    """Size of the file that a student with ``config`` becomes."""
    student = calibrate(quantize(model, config), faces, count=_CALIBRATION_IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        return export(student, Path(folder) / "student.onnx").stat().st_size
