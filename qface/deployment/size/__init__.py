"""Size report: the purpose of every byte of a model file.

An ONNX file is parsed as protobuf fields on the wire, each with its tag and length, so that the entries add up to the
file size exactly. The role of a tensor follows from the nodes that consume it, directly or through unpacking nodes. For
a network or student, the tensors of its packed file are predicted:

    bytes = sum over weights of ceil(elements x bits / 8)
          + slopes + 4 x (biases + weight scales) + 9 x channels of BatchNorms that are not folded
          + 5 x activation quantizers with a range of their own + channels of weights with offsets

A prediction leaves out names, nodes, types and shapes.
"""

from qface.deployment.size.measure import measure_size
from qface.deployment.size.report import KINDS, PARAMETERS, TENSORS, SizeEntry, SizeReport

__all__ = ["KINDS", "PARAMETERS", "TENSORS", "SizeEntry", "SizeReport", "measure_size"]
