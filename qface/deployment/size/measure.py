"""The verb ``measure_size``."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qface.deployment.size.files import entries_of_file
from qface.deployment.size.networks import entries_of_network
from qface.deployment.size.report import SizeReport
from qface.models import load
from qface.quantization import QuantizationConfig

__all__ = ["measure_size"]


def measure_size(model_or_file: nn.Module | str | Path, bits: int | QuantizationConfig = 6) -> SizeReport:
    """Count the bytes of a file by purpose, or predict them.

    Args:
        model_or_file: an ``.onnx`` file, counted to the byte; a student, calibrated or not, counted from its
            quantizers; a float network, counted as its student at ``bits``; or whatever else :func:`qface.load` reads.
        bits: of a float network's student, or a config; all others have theirs.

    Raises:
        CheckpointError: the file is missing, damaged, or keeps its weights in other files.
        ConfigError: bits are out of range.
        TraceError: torch.export cannot follow the network.
        UnsupportedLayerError: a layer has weights that cannot be quantized; it is named.

    Example:
        >>> qface.measure_size("student.onnx").bytes == Path("student.onnx").stat().st_size
        True
    """
    if isinstance(model_or_file, nn.Module):
        return SizeReport("prediction", tuple(entries_of_network(model_or_file, bits)))
    path = Path(model_or_file)
    if path.suffix.lower() == ".onnx":
        return SizeReport("file", tuple(entries_of_file(path)))
    return measure_size(load(model_or_file), bits)
