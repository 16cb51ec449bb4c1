"""Export of students to integer ONNX files, and tools to run, verify, time and measure these files."""

from qface.deployment.agreement import Agreement, LayerAgreement, verify
from qface.deployment.export import export
from qface.deployment.golden import SelfTest, selftest
from qface.deployment.integer_graph import IntegerGraph
from qface.deployment.latency import median_milliseconds
from qface.deployment.lowering import lower
from qface.deployment.runtime import OnnxEmbedder
from qface.deployment.size import SizeEntry, SizeReport, measure_size

__all__ = [
    "Agreement",
    "IntegerGraph",
    "LayerAgreement",
    "OnnxEmbedder",
    "SelfTest",
    "SizeEntry",
    "SizeReport",
    "export",
    "lower",
    "measure_size",
    "median_milliseconds",
    "selftest",
    "verify",
]
