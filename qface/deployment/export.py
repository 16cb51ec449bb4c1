"""``export``: a model to an ONNX file."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from qface._version import __version__
from qface.data.images import Images, as_image_source, normalise
from qface.deployment.agreement import LAYER_IMAGES, compare_layers, synthetic_crops
from qface.deployment.graph import IntegerGraph
from qface.deployment.lowering import lower
from qface.deployment.onnx_writer import OPSET, to_onnx
from qface.errors import ExportError, one_line
from qface.files import replacing
from qface.models.provenance import provenance_of
from qface.models.tracing import example_input
from qface.preprocessing import preprocessing_of
from qface.quantization import is_quantized

__all__ = ["export"]

_QUOTED = 300  # characters of an error of torch or onnx, which can fill a page


def export(model: nn.Module, path: str | Path, container: str = "packed", images: Images | None = None) -> Path:
    """Write ``model`` as an ONNX model with a dynamic batch, its preprocessing and provenance in the metadata.

    A calibrated student becomes an integer graph that qface writes itself; a float network becomes float32 ONNX. Input
    ``images`` [batch, 3, height, width], normalised; output ``embedding`` [batch, dimensions].

    Args:
        model: a calibrated student, or a float network.
        path: file to write, ``.onnx``.
        container: of a student's weights: ``"packed"`` to their bits, which onnxruntime unpacks when it opens the file,
            or ``"int8"``, a byte each.
        images: faces on which each layer of a student's file is compared with the student's, the first eight of them;
            None takes a few seeded synthetic ones. The metadata say which.

    Returns:
        The path.

    Raises:
        ConfigError: the student is not calibrated, or there is no such container.
        UnsupportedLayerError: a node has no integer form; it is named, and nothing is written.
        ExportError: the file cannot be written, the graph is not valid, or onnxruntime computes something else with
            it than the student; then no file is left.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ExportError(f"{path} does not end in .onnx; choose such a name")
    metadata = {"qface": __version__, "provenance": json.dumps(provenance_of(model))}
    with replacing(path) as temporary:
        if is_quantized(model):
            crops, name = _verification_images(images)
            graph = lower(model)
            onnx.save(to_onnx(graph, metadata | {"verified": name}, container), temporary)
            _check(temporary)
            _check_layers(model, graph, temporary, normalise(crops, graph.preprocessing))
        else:
            _export_float(model, temporary, metadata)
            _check(temporary)
    return path


def _verification_images(images: Images | None) -> tuple[Tensor, str]:
    """A few images, and what they are."""
    if images is None:
        crops = synthetic_crops()
        return crops, f"{len(crops)} synthetic images"
    crops = next(iter(as_image_source(images).batches(LAYER_IMAGES)))[:LAYER_IMAGES]
    return crops, f"{len(crops)} given images"


def _check_layers(student: nn.Module, graph: IntegerGraph, file: Path, inputs: Tensor) -> None:
    layers = compare_layers(student, graph, file, inputs)
    wrong = [layer for layer in layers if not layer.agrees]
    if wrong:
        first = wrong[0]
        raise ExportError(
            f"onnxruntime computes something else than the student in {len(wrong)} of {len(layers)} layers (first: "
            f"{first.layer}, {first.different} of {first.elements} integers, by up to {first.greatest_step}); nothing "
            "was written, please report this processor and network"
        )


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
        raise ExportError(
            f"torch cannot export this network: {one_line(error, _QUOTED)}; replace what it names"
        ) from error
    written = onnx.load(str(path))
    onnx.helper.set_model_props(written, {"preprocessing": preprocessing_of(model).to_json(), **metadata})
    onnx.save(written, str(path))


def _check_interface(model: nn.Module, images: Tensor) -> None:
    try:
        with torch.no_grad():
            output = model(images)
    except Exception as error:  # the user's own code runs here
        raise ExportError(
            f"the network does not run on images {list(images.shape)}: {one_line(error, _QUOTED)}; "
            "it must read images only, of the size in its Preprocessing"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise ExportError("the network must return one tensor, the embeddings [N, dimensions]")


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the exported graph is not valid ONNX: {one_line(error, _QUOTED)}; please report this network"
        ) from error
