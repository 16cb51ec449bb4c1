"""The size report: what every byte of a model file is spent on.

An ONNX file is read as the protobuf fields that lie on the disk, each with its own tag and length, so that the entries
add up to the file's size to the byte; nothing is the remainder of something else. What a tensor is for follows from the
nodes that read it, through whatever unpacks it. A network or student is counted as its packed file will hold it:

    bytes = sum over weights of ceil(elements x bits / 8)
          + slopes + 4 x (biases + weight scales) + 9 x channels of BatchNorms that do not fold
          + 5 x activation quantizers with a range of their own

That leaves out what only a file has: names, nodes, types and shapes.
"""

from qface.deployment.size.measure import measure_size
from qface.deployment.size.report import KINDS, PARAMETERS, TENSORS, SizeEntry, SizeReport

__all__ = ["KINDS", "PARAMETERS", "TENSORS", "SizeEntry", "SizeReport", "measure_size"]
