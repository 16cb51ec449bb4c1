"""The canonical form of a network: one named layer per operation, dropout gone, BatchNorm folded.

Quantization, lowering and everything behind them then need to know layers only, by their type. The result computes what
the network computes in eval mode.
"""

from qface.quantization.canonical.canonicalize import canonicalize

__all__ = ["canonicalize"]
