"""Reading a float ONNX graph back as a torch network, since many face networks are published as ``.onnx`` only.

``onnx_file`` reads, ``image_input`` tells what the graph takes, and ``importer`` walks over it with the rules in
``operators`` and ``spatial_operators``, which make the layers that :mod:`qface.graph.aten` makes. Opsets 7 to 23, in
fp32 or fp16. The result is checked: torch and onnxruntime must agree on it.
"""

from qface.models.onnx_import.image_input import ImageInput, described_input, find_image_input
from qface.models.onnx_import.load_onnx import load_onnx
from qface.models.onnx_import.onnx_file import read_onnx

__all__ = ["ImageInput", "described_input", "find_image_input", "load_onnx", "read_onnx"]
