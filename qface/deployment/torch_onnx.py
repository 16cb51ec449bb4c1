"""ONNX export by torch's TorchScript exporter, which needs no extra package."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Sequence

import onnx
import torch
from torch import Tensor, nn

__all__ = ["torch_onnx_model"]


def torch_onnx_model(
    module: nn.Module,
    inputs: Sequence[Tensor],
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset: int,
) -> onnx.ModelProto:
    """Export ``module`` to ONNX with a dynamic first dimension of every input and output.

    Hides the exporter's deprecation warnings. Its exceptions, which may be of any type, propagate.
    """
    written = io.BytesIO()
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                tuple(inputs),
                written,  # type: ignore[arg-type]
                dynamo=False,
                opset_version=opset,
                input_names=list(input_names),
                output_names=list(output_names),
                dynamic_axes={each: {0: "batch"} for each in (*input_names, *output_names)},
            )
    finally:
        logger.setLevel(level)
    return onnx.load_from_string(written.getvalue())
