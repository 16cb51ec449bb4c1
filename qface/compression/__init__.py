"""Compression to a target: trials of bits, judged on people who did not tune, until the smallest file is found."""

from qface.compression.compress import compress
from qface.compression.compress_config import CompressConfig, CompressionTarget
from qface.compression.trials import Compression, Trial

__all__ = ["CompressConfig", "Compression", "CompressionTarget", "Trial", "compress"]
