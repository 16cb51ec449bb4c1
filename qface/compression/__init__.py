"""All stages in one call: a file at fixed bits, or the smallest file within limits, evaluated on other people."""

from qface.compression.compress import compress
from qface.compression.compress_config import CompressConfig, CompressionTarget
from qface.compression.trials import Compression, Trial

__all__ = ["CompressConfig", "Compression", "CompressionTarget", "Trial", "compress"]
