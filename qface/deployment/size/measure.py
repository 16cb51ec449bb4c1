"""The verb ``measure_size``."""

from __future__ import annotations

from pathlib import Path

from qface.deployment.size.files import entries_of_file
from qface.deployment.size.networks import entries_of_network
from qface.deployment.size.report import SizeReport
from qface.models.resolve import NetworkLike, as_architecture
from qface.quantization import QuantizationConfig

__all__ = ["measure_size"]


def measure_size(model_or_file: NetworkLike, bits: int | QuantizationConfig = 6) -> SizeReport:
    """Count the bytes of a file by purpose, or predict them. Does not change ``model_or_file``.

    Args:
        model_or_file: an ``.onnx`` file, counted to the byte; a student, calibrated or not, counted from its
            quantizers; or a float network, counted as its student at ``bits``. A network is a module, the path of its
            file, ``package.module:factory``, or a name, since weights do not matter here.
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
    if isinstance(model_or_file, (str, Path)) and str(model_or_file).lower().endswith(".onnx"):
        return SizeReport("file", tuple(entries_of_file(Path(model_or_file))))
    return SizeReport("prediction", tuple(entries_of_network(as_architecture(model_or_file), bits)))
