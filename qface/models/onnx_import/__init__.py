"""Import of float ONNX files (opset 7 to 23, fp32 or fp16) as torch networks.

``onnx_file`` reads the file, ``image_input`` detects the input format, and ``importer`` converts the nodes with the
rules in ``operators`` and ``spatial_operators``, to the same layers as :mod:`qface.graph.aten`. Finally the network's
embeddings are compared with onnxruntime's.
"""

from qface.models.onnx_import.image_input import ImageInput, described_input, find_image_input
from qface.models.onnx_import.load_onnx import load_onnx
from qface.models.onnx_import.onnx_file import read_onnx

__all__ = ["ImageInput", "described_input", "find_image_input", "load_onnx", "read_onnx"]
