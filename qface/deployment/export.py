"""``export``: a model to an ONNX file."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from torch import Tensor, fx, nn

from qface._version import __version__
from qface.choices import TARGETS, InputType, TargetName, WeightFormatName
from qface.data.images import Images, normalize
from qface.data.sources import as_image_source
from qface.data.synthetic import synthetic_crops
from qface.deployment.agreement import (
    LAYER_IMAGES,
    compare_embeddings,
    compare_integers,
    without_rounded_activations,
)
from qface.deployment.float_writer import FLOAT_TARGETS, to_float_onnx
from qface.deployment.golden import golden_images, golden_tolerance, measure_golden, write_golden
from qface.deployment.inputs import (
    FLOAT_INPUT,
    UINT8_INPUT,
    as_model_sees,
    check_input,
    through_uint8,
    with_input_dtype,
)
from qface.deployment.integer_graph import IntegerGraph
from qface.deployment.lowering import lower
from qface.deployment.metadata import EMBEDDING, UNIT_LENGTH, read_metadata
from qface.deployment.nodes import OPSET
from qface.deployment.onnx_writer import to_onnx
from qface.deployment.runtime import OnnxEmbedder, providers_for
from qface.deployment.torch_onnx import torch_onnx_model
from qface.deployment.weight_formats import check_weight_format
from qface.errors import ConfigError, ExportError, ImagesError, one_line
from qface.files import as_path, replacing
from qface.models.resolve import NetworkLike, as_network
from qface.preprocessing import Preprocessing, example_input, preprocessing_of
from qface.provenance import provenance_of
from qface.quantization import is_quantized
from qface.quantization.binding import layers_near_ties
from qface.quantization.plan import count_activation_bits

__all__ = ["ACTIVATION_BITS", "TARGETS", "export"]

ACTIVATION_BITS = "activation_bits"
"""The metadata's key for the numbers of values that a file rounds to each number of bits."""

_log = logging.getLogger("qface")
_TINY = torch.finfo(torch.float32).tiny
_QUOTED = 300  # characters of an error of torch or onnx, which can fill a page


def export(
    model: NetworkLike,
    path: str | Path,
    weight_format: WeightFormatName = "packed",
    images: Images | None = None,
    input: InputType = FLOAT_INPUT,
    target: TargetName = "cpu",
    normalize: bool = False,
) -> Path:
    """Write ``model`` as an ONNX model with a dynamic batch, its preprocessing and provenance in the metadata.

    The metadata also hold golden values, by which :func:`qface.selftest` and any device tell what they compute.

    A calibrated student becomes an integer graph that qface writes itself; a float network becomes float32 ONNX. Input
    ``images`` [batch, 3, height, width]; output ``embedding`` float32 [batch, dimensions]. Does not change ``model``.

    Args:
        model: a calibrated student, or a float network: a module, the path of its file, or ``package.module:factory``.
        path: file to write, ``.onnx``.
        weight_format: of a student's weights: ``"packed"`` to their bits, which onnxruntime unpacks when it opens the
            file, or ``"int8"``, a byte each.
        images: faces on which the file is compared with the model, the first eight of them; None takes a few seeded
            synthetic ones. The metadata say which.
        input: what the file reads: ``"float32"``, normalized, or ``"uint8"``, the RGB bytes of the part and size that
            the preprocessing names. Whoever resizes for it rounds to whole gray levels.
        target: what a student's file is for: ``"cpu"`` computes with integers, the same on every processor. The others
            keep the integers of the weights but do not round activations: ``"cuda"`` computes in fp16, since
            onnxruntime has no integer convolution there, and ``"float32"`` in float32, for browsers, where that is
            faster than integers.
        normalize: end with an L2 normalization in float32, so that embeddings have unit length and a dot product is
            their cosine. The metadata say so under ``embedding``.

    Returns:
        The path.

    Raises:
        CheckpointError: the file of the network cannot be read.
        ConfigError: the student is not calibrated, there is no such weight format, input or target, or a float network
            is to be written for a target of its own.
        UnsupportedLayerError: a node has no integer form; it is named, and nothing is written.
        ExportError: the file cannot be written, the graph is not valid, or onnxruntime computes something else with
            it than the model; then no file is left.
        ImagesError: there are no images, or they cannot be used.

    Example:
        >>> qface.export(student, "copy.onnx", input="uint8").name
        'copy.onnx'
    """
    path = as_path(path)
    if path.suffix != ".onnx":
        raise ExportError(f"{path} does not end in .onnx; choose such a name")
    check_input(input)
    check_weight_format(weight_format)
    model = as_network(model)
    _check_target(target, model)
    crops, name = _verification_images(images)
    metadata = {"qface": __version__, "provenance": json.dumps(provenance_of(model)), "verified": name}
    metadata |= {"input": input, "target": target} | ({EMBEDDING: UNIT_LENGTH} if normalize else {})
    with replacing(path) as temporary:
        if is_quantized(model):
            lowered = lower(model)
            graph = with_input_dtype(input, lowered.with_unit_length() if normalize else lowered)
            if target not in FLOAT_TARGETS:
                _name_layers_near_ties(model)
                metadata[ACTIVATION_BITS] = json.dumps(count_activation_bits(cast(fx.GraphModule, model)))
            onnx.save(_written(graph, metadata, weight_format, target), temporary)
            _check(temporary)
            check = _check_embeddings if target in FLOAT_TARGETS else _check_layers
            check(model, graph, temporary, as_model_sees(graph, _compared(crops, graph.preprocessing)))
            tolerance = golden_tolerance(graph, target)
        else:
            network = copy.deepcopy(model).cpu().float().eval()  # that of a GPU in fp16 is checked on a CPU
            network = _UnitLength(network).eval() if normalize else network
            _export_float(network, temporary, metadata)
            _check(temporary)
            _check_float(network, temporary, _compared(crops, preprocessing_of(network)))
            tolerance = golden_tolerance(None, target)
        write_golden(temporary, measure_golden(OnnxEmbedder(temporary, providers_for(target)), tolerance))
    return path


def _name_layers_near_ties(student: nn.Module) -> None:
    near = layers_near_ties(cast(fx.GraphModule, student))
    if near:
        _log.warning(
            "%d layers may round otherwise on processors of another kind, the first is %r (docs/exactness.md)",
            len(near),
            near[0],
        )


def _written(graph: IntegerGraph, metadata: dict[str, str], weight_format: str, target: str) -> onnx.ModelProto:
    if target in FLOAT_TARGETS:
        return to_float_onnx(graph, metadata, weight_format, FLOAT_TARGETS[target])
    return to_onnx(graph, metadata, weight_format)


def _check_target(target: str, model: nn.Module) -> None:
    if target not in TARGETS:
        raise ConfigError(f"target {target!r} is none of {', '.join(TARGETS)}")
    if target != "cpu" and not is_quantized(model):
        raise ConfigError(
            f"the target {target!r} is for students only; a float network's file runs on any processor: leave it out"
        )


def _verification_images(images: Images | None) -> tuple[Tensor, str]:
    """A few images, and what they are."""
    if images is None:
        crops = synthetic_crops()
        return crops, f"{len(crops)} synthetic images"
    batch = next(iter(as_image_source(images).batches(LAYER_IMAGES)), None)
    if batch is None:
        raise ImagesError("there are no images to compare the file on: pass at least one")
    crops = batch[:LAYER_IMAGES]
    return crops, f"{len(crops)} given images"


def _compared(crops: Tensor, preprocessing: Preprocessing) -> Tensor:
    """``crops`` and the test images that golden values are of, normalized."""
    return torch.cat([normalize(crops, preprocessing), preprocessing.normalize(golden_images(preprocessing.size))])


def _check_layers(student: nn.Module, graph: IntegerGraph, file: Path, inputs: Tensor) -> None:
    agreement = compare_integers(student, graph, OnnxEmbedder(file, providers=["CPUExecutionProvider"]), iter([inputs]))
    layers = agreement.layers
    wrong = [layer for layer in layers if not layer.agrees]
    if wrong:
        first = wrong[0]
        raise ExportError(
            f"onnxruntime computes something else than the student in {len(wrong)} of {len(layers)} layers (first: "
            f"{first.layer}, {first.different} of {first.elements} integers, by up to {first.greatest_step}); nothing "
            "was written, please report this processor and network"
        )
    if not agreement.agrees:  # layers were run one by one: the whole file is optimized otherwise
        raise ExportError(
            "onnxruntime computes something else than the student with the whole file: cosines of "
            f"{agreement.least_cosine:.6f} at the least; nothing was written, please report this processor and network"
        )


def _check_embeddings(student: nn.Module, graph: IntegerGraph, file: Path, inputs: Tensor) -> None:
    target = read_metadata(file)["target"]
    embedder = OnnxEmbedder(file, providers_for(target))
    agreement = compare_embeddings(without_rounded_activations(student), embedder, [inputs])
    if not agreement.agrees:
        raise ExportError(
            f"for the target {target} onnxruntime computes something else than the student with unrounded activations: "
            f"the cosines of {agreement.images} embeddings are {agreement.mean_cosine:.6f} on average, "
            f"{agreement.least_cosine:.6f} at the least; nothing was written, export this network for the target cpu"
        )


def _check_float(network: nn.Module, file: Path, inputs: Tensor) -> None:
    embedder = OnnxEmbedder(file, providers=["CPUExecutionProvider"])
    images = inputs if embedder.input == FLOAT_INPUT else through_uint8(inputs, embedder.preprocessing)
    agreement = compare_embeddings(network, embedder, [images])
    if not agreement.agrees:
        raise ExportError(
            f"onnxruntime computes something else than the network: cosines of {agreement.least_cosine:.6f} at the "
            "least; nothing was written. Does it do something by chance, or depend on values in Python?"
        )


class _UnitLength(nn.Module):
    """``network``, whose embeddings are divided by their Euclidean norms."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing_of(network)

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.network(images)
        # Not F.normalize, of which torch's exporter expands the norm and loses the embedding's length.
        lengths: Tensor = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
        return embeddings / lengths.clamp_min(_TINY)


class _OfBytes(nn.Module):
    """``network`` from RGB bytes, which it normalizes as ``preprocessing`` says."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing

    def forward(self, images: Tensor) -> Any:
        return self.network(self.preprocessing.normalize(images))


def _export_float(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    images = example_input(model, 1)
    _check_interface(model, images)
    if metadata["input"] == UINT8_INPUT:
        model, images = _OfBytes(model, preprocessing_of(model)).eval(), images.byte()
    try:
        written = torch_onnx_model(model, (images,), ["images"], ["embedding"], OPSET)
    except Exception as error:  # torch raises whatever its tracer meets
        raise ExportError(
            f"torch cannot export this network: {one_line(error, _QUOTED)}; replace what it names"
        ) from error
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
