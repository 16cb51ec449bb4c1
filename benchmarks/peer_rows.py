"""Rows of the comparison with other tools, and the packages that these need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tool:
    """A tool that runs in an environment of its own.

    Args:
        script: script in ``peer_tools/``.
        requirements: packages, one tuple per call of pip.
    """

    script: str
    requirements: tuple[tuple[str, ...], ...]


TOOLS = {
    "onnxruntime": Tool("onnxruntime_static.py", (("onnxruntime==1.31.1", "onnx==1.23.2", "sympy"),)),
    "NNCF": Tool("nncf_ptq.py", (("openvino==2026.4.1", "nncf==3.4.0"),)),
    "Brevitas": Tool("brevitas_ptq.py", (("torch==2.13.0",), ("brevitas==0.13.4", "onnx==1.23.2", "tqdm"))),
    # AIMET imports torchvision, whose builds belong to one torch each.
    "AIMET": Tool("aimet_ptq.py", (("torch==2.14.1", "torchvision==0.29.1"), ("aimet-torch==2.42.0",))),
}


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        method: key of :data:`TOOLS`, or ``"float"``, ``"qface"`` or ``"QuantFace"``.
        weight_bits: weight bits.
        activation_bits: activation bits.
        variant: what tells rows of the same method and bits apart.
        options: settings for the script of the tool.
        trained: the row trains for one epoch.
    """

    method: str
    weight_bits: int
    activation_bits: int
    variant: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = False

    @property
    def bits(self) -> str:
        """Bits of weights and activations, such as ``w6a6``; empty for float."""
        return "" if self.method == "float" else f"w{self.weight_bits}a{self.activation_bits}"

    @property
    def label(self) -> str:
        """Method and variant for the table."""
        return f"{self.method}, {self.variant}" if self.variant else self.method

    @property
    def name(self) -> str:
        """Name for the command line and for files."""
        return "-".join([self.method, *self.variant.split(), *self.bits.split()]).lower()

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the figures, apart from network and images."""
        tool = TOOLS.get(self.method)
        return {
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "trained": self.trained,
            "requirements": None if tool is None else tool.requirements,
            **self.options,
        }


FLOAT = Row("float", 32, 32)

_NNCF = {"preset": "mixed", "fast_bias_correction": True}
# As in Brevitas' own table of its best settings for MobileNetV2 with weights per channel. GPTQ gets fewer images, since
# it runs the network once per layer.
_BREVITAS = {
    "batch_size": 32,
    "calibration_images": 512,
    "equalize_iterations": 20,
    "weight_ranges": "mse",
    "activation_ranges": "stats",
    "activation_percentile": 99.99,
    "gptq": True,
    "gptq_images": 128,
}
# At 4 bits these ranges lose everything. MSE ranges take more than a minute per batch, so they get fewer images.
_BREVITAS_4_BITS = {**_BREVITAS, "activation_ranges": "mse", "calibration_images": 64}
# Qualcomm's settings for its current processor: weights per channel, nothing rounded between convolution and PReLU.
_AIMET = {
    "batch_size": 32,
    "quant_scheme": "tf_enhanced",
    "config": "htp_quantsim_config_v81_per_channel_linear.json",
}

ROWS = (
    FLOAT,
    *(Row("onnxruntime", 8, 8, name, {"calibrate_method": name}) for name in ("MinMax", "Percentile", "Entropy")),
    Row("NNCF", 8, 8, options=_NNCF),
    *(Row("Brevitas", *bits, options=_BREVITAS) for bits in ((8, 8), (6, 6), (4, 8))),
    Row("Brevitas", 4, 4, options=_BREVITAS_4_BITS),
    *(Row("AIMET", *bits, options=_AIMET) for bits in ((8, 8), (6, 6), (4, 8))),
    *(Row("qface", *bits) for bits in ((8, 8), (6, 6), (4, 8), (4, 4))),
    Row("QuantFace", 6, 6, "one epoch", trained=True),
    Row("qface", 6, 6, "one epoch", trained=True),
)
EVERY_ROW = {row.name: row for row in ROWS}
