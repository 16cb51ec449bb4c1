"""``export``: a model to an ONNX file."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, fx, nn

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


def export(model: nn.Module, path: str | Path, container: str = "packed") -> Path:
    """Write ``model`` as an ONNX model with a dynamic batch, its preprocessing and provenance in the metadata.

    A calibrated student becomes an integer graph that qface writes itself; a float network becomes float32 ONNX. Input
    ``images`` [batch, 3, height, width], normalised; output ``embedding`` [batch, dimensions].

    Args:
        model: a calibrated student, or a float network.
        path: file to write, ``.onnx``.
        container: of a student's weights: ``"packed"`` to their bits, which onnxruntime unpacks when it opens the file,
            or ``"int8"``, a byte each.

    Returns:
        The path.

    Raises:
        ConfigError: the student is not calibrated, or there is no such container.
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
            onnx.save(to_onnx(lower(model), metadata, container), temporary)
        else:
            _export_float(model, temporary, metadata)
        _check(temporary)
    return path


def _export_float(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    model = copy.deepcopy(model).eval()
    images = example_input(model, 1)
    _check_interface(model, images)
    # torch's own exporter; the TorchScript one needs no further package. It warns that it is the older one.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (images,),
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["embedding"],
                dynamic_axes={"images": {0: "batch"}, "embedding": {0: "batch"}},
            )
    except Exception as error:  # torch raises whatever its tracer meets
        raise ExportError(f"torch cannot export this network: {_one_line(error)}; replace what it names") from error
    written = onnx.load(str(path))
    onnx.helper.set_model_props(written, {"preprocessing": preprocessing_of(model).to_json(), **metadata})
    onnx.save(written, str(path))


def _check_interface(model: nn.Module, images: Tensor) -> None:
    try:
        with torch.no_grad():
            output = model(images)
    except Exception as error:  # the user's own code runs here
        raise ExportError(
            f"the network does not run on images {list(images.shape)}: {_one_line(error)}; "
            "it must read images only, of the size in its Preprocessing"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise ExportError("the network must return one tensor, the embeddings [N, dimensions]")


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the exported graph is not valid ONNX: {_one_line(error)}; please report this network"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
