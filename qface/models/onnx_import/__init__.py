"""Reading a float ONNX graph back as a torch network, since many face networks are published as ``.onnx`` only.

Each ONNX node becomes a layer or function of torch, on a torch.fx graph; the network can then be pruned, quantized and
saved as any other. Covered is what face networks are made of, IResNet and MobileFaceNet as InsightFace publishes them
and their like, in opsets 11 to 20. What is covered is checked: torch and onnxruntime must agree on the result.
"""

from qface.models.onnx_import.load_onnx import load_onnx

__all__ = ["load_onnx"]
