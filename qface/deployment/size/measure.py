"""``measure_size``, which counts or predicts the bytes of a model file."""

from __future__ import annotations

from pathlib import Path

from qface.deployment.size.files import entries_of_file
from qface.deployment.size.networks import entries_of_network
from qface.deployment.size.report import SizeReport
from qface.models.resolve import NetworkLike, as_architecture
from qface.quantization import QuantizationConfig

__all__ = ["measure_size"]


def measure_size(model_or_file: NetworkLike, bits: int | QuantizationConfig = 6) -> SizeReport:
    """Count the bytes of an ONNX file by purpose, or predict them for a network.

    Does not change ``model_or_file``.

    Args:
        model_or_file: an ``.onnx`` file, counted exactly; a student, predicted from its quantizers; or a float network,
            predicted as its student with ``bits``. A network is a module, the path of its file,
            ``package.module:factory``, or the name of an architecture, since weights do not matter here.
        bits: bits of a float network's student, 2 to 8 (default 6), or a config; ignored for files and students.

    Returns:
        A report with the bytes of each entry, and sums by kind.

    Raises:
        CheckpointError: the file is missing, damaged, or stores weights in external files.
        ConfigError: bits are out of range.
        TraceError: torch.export cannot trace the network.
        UnsupportedLayerError: a layer has weights that cannot be quantized; the message names it.

    Example:
        >>> qface.measure_size("student.onnx").bytes == Path("student.onnx").stat().st_size
        True
    """
    if isinstance(model_or_file, (str, Path)) and str(model_or_file).lower().endswith(".onnx"):
        return SizeReport("file", tuple(entries_of_file(Path(model_or_file))))
    return SizeReport("prediction", tuple(entries_of_network(as_architecture(model_or_file), bits)))
