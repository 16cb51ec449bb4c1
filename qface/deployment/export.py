"""``export``: a model to an ONNX file."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import fx, nn

from qface._version import __version__
from qface.deployment.lowering import lower
from qface.deployment.onnx_writer import OPSET, to_onnx
from qface.errors import ExportError
from qface.files import replacing
from qface.models.provenance import provenance_of
from qface.models.tracing import example_input
from qface.preprocessing import preprocessing_of
from qface.quantization import is_quantized

__all__ = ["export"]


def export(model: nn.Module, path: str | Path) -> Path:
    """Write ``model`` as an ONNX model with a dynamic batch, its preprocessing and provenance in the metadata.

    A calibrated student becomes an integer graph that qface writes itself; a float network becomes float32 ONNX. Input
    ``images`` [batch, 3, height, width], normalised; output ``embedding`` [batch, dimensions].

    Returns:
        The path.

    Raises:
        ConfigError: the student is not calibrated.
        UnsupportedLayerError: a node has no integer form; it is named, and nothing is written.
        ExportError: the file cannot be written, or the graph is not valid.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ExportError(f"{path} does not end in .onnx; choose such a name")
    metadata = {"qface": __version__, "provenance": json.dumps(provenance_of(model))}
    with replacing(path) as temporary:
        if is_quantized(model):
            assert isinstance(model, fx.GraphModule)
            onnx.save(to_onnx(lower(model), metadata), temporary)
        else:
            _export_float(model, temporary, metadata)
        _check(temporary)
    return path


def _export_float(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    training = model.training
    # torch's own exporter; the TorchScript one needs no further package. It warns that it is the older one.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (example_input(model, 1),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["embedding"],
            dynamic_axes={"images": {0: "batch"}, "embedding": {0: "batch"}},
        )
    model.train(training)
    written = onnx.load(str(path))
    onnx.helper.set_model_props(written, {"preprocessing": preprocessing_of(model).to_json(), **metadata})
    onnx.save(written, str(path))


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"the exported graph is not valid ONNX: {reason}; please report this network") from error
