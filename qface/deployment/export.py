"""Export of a model to an ONNX file."""

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
from qface.checks import check_choice
from qface.choices import InputType, TargetName, WeightFormatName
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
from qface.errors import ConfigError, ExportError, ImagesError, one_line
from qface.files import as_path, replacing
from qface.graph.queries import is_quantized
from qface.models.resolve import NetworkLike, as_network
from qface.preprocessing import Preprocessing, example_input, preprocessing_of
from qface.provenance import provenance_of
from qface.quantization.binding import layers_near_ties
from qface.quantization.plan import count_activation_bits

__all__ = ["ACTIVATION_BITS", "export"]

ACTIVATION_BITS = "activation_bits"
"""Metadata key for the number of quantized activations at each bit width."""

_log = logging.getLogger("qface")
_TINY = torch.finfo(torch.float32).tiny
_QUOTED = 300  # maximum characters quoted from an error of torch or onnx, which can fill a page


def export(
    model: NetworkLike,
    path: str | Path,
    weight_format: WeightFormatName = "packed",
    images: Images | None = None,
    input: InputType = FLOAT_INPUT,
    target: TargetName = "cpu",
    normalize: bool = False,
) -> Path:
    """Export ``model`` to ONNX and check that onnxruntime computes the same embeddings.

    A calibrated student becomes an integer graph; a float network becomes float32 ONNX. The file has the input
    ``images`` [batch, 3, height, width] and the output ``embedding`` float32 [batch, dimensions], with a dynamic batch
    size. Its metadata hold preprocessing, provenance, and golden values for :func:`qface.selftest`. Does not change
    ``model``.

    Args:
        model: a calibrated student or a float network: a module, the path of its file, or ``package.module:factory``.
        path: ``.onnx`` file to write.
        weight_format: storage of a student's weights: ``"packed"`` stores each at its bit width, and onnxruntime
            unpacks them at load time; ``"int8"`` stores one byte per weight.
        images: faces for the comparison with the model; the first eight are used. None: seeded synthetic images. The
            metadata record which.
        input: input type of the file: ``"float32"``, normalized, or ``"uint8"``, RGB bytes of the crop and size in the
            preprocessing. The caller resizes uint8 images, and so rounds them to integer gray levels.
        target: platform of a student's file. ``"cpu"`` computes with integers, with equal results on every processor.
            The others keep integer weights but do not round activations: ``"cuda"`` computes in fp16, because
            onnxruntime has no integer convolution on GPUs; ``"float32"`` is for browsers, where float32 is faster than
            integers.
        normalize: append an L2 normalization in float32, so that the dot product of two embeddings is their cosine.
            The metadata record it under ``embedding``.

    Returns:
        The path of the written file.

    Raises:
        CheckpointError: the network's file cannot be read.
        ConfigError: the student is not calibrated; weight_format, input or target is unknown; or the model is a float
            network and target is not ``"cpu"``.
        UnsupportedLayerError: a node has no integer form; the message names it, and no file is written.
        ExportError: the file cannot be written, the graph is invalid, or onnxruntime does not reproduce the model's
            embeddings; no file is left.
        ImagesError: there are no images, or they cannot be used.

    Example:
        >>> qface.export(student, "copy.onnx", input="uint8").name
        'copy.onnx'
    """
    path = as_path(path)
    if path.suffix != ".onnx":
        raise ExportError(f"path must end in .onnx, got {path}")
    check_choice(InputType, input=input)
    check_choice(WeightFormatName, weight_format=weight_format)
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
            onnx.save(_student_model(graph, metadata, weight_format, target), temporary)
            _check(temporary)
            check = _check_embeddings if target in FLOAT_TARGETS else _check_layers
            check(model, graph, temporary, as_model_sees(graph, _comparison_images(crops, graph.preprocessing)))
            tolerance = golden_tolerance(graph, target)
        else:
            network = copy.deepcopy(model).cpu().float().eval()  # the model may be fp16 on a GPU; the check runs on CPU
            network = _UnitLength(network).eval() if normalize else network
            _export_float(network, temporary, metadata)
            _check(temporary)
            _check_float(network, temporary, _comparison_images(crops, preprocessing_of(network)))
            tolerance = golden_tolerance(None, target)
        write_golden(temporary, measure_golden(OnnxEmbedder(temporary, providers_for(target)), tolerance))
    return path


def _name_layers_near_ties(student: nn.Module) -> None:
    near = layers_near_ties(cast(fx.GraphModule, student))
    if near:
        _log.warning(
            "%d layers may round differently on other processors (first: %r); see docs/exactness.md",
            len(near),
            near[0],
        )


def _student_model(graph: IntegerGraph, metadata: dict[str, str], weight_format: str, target: str) -> onnx.ModelProto:
    if target in FLOAT_TARGETS:
        return to_float_onnx(graph, metadata, weight_format, FLOAT_TARGETS[target])
    return to_onnx(graph, metadata, weight_format)


def _check_target(target: str, model: nn.Module) -> None:
    check_choice(TargetName, target=target)
    if target != "cpu" and not is_quantized(model):
        raise ConfigError(
            f"target {target!r} is for students only; leave it out: a float network's file runs on any processor"
        )


def _verification_images(images: Images | None) -> tuple[Tensor, str]:
    """Return a few images for the comparison and their description for the metadata."""
    if images is None:
        crops = synthetic_crops()
        return crops, f"{len(crops)} synthetic images"
    batch = next(iter(as_image_source(images).batches(LAYER_IMAGES)), None)
    if batch is None:
        raise ImagesError("there are no images to compare file and model; pass at least one")
    crops = batch[:LAYER_IMAGES]
    return crops, f"{len(crops)} given images"


def _comparison_images(crops: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Concatenate ``crops`` and the test images of golden values, both normalized."""
    return torch.cat([normalize(crops, preprocessing), preprocessing.normalize(golden_images(preprocessing.size))])


def _check_layers(student: nn.Module, graph: IntegerGraph, file: Path, inputs: Tensor) -> None:
    agreement = compare_integers(student, graph, OnnxEmbedder(file, providers=["CPUExecutionProvider"]), iter([inputs]))
    layers = agreement.layers
    wrong = [layer for layer in layers if not layer.agrees]
    if wrong:
        first = wrong[0]
        raise ExportError(
            f"onnxruntime and the student differ in {len(wrong)} of {len(layers)} layers (first: {first.layer}, "
            f"{first.different} of {first.elements} integers, by up to {first.max_difference}); no file was written: "
            "please report this processor and network"
        )
    if not agreement.agrees:  # onnxruntime optimizes the whole file differently from single layers
        raise ExportError(
            "onnxruntime and the student agree in each layer but not in the whole file (minimum cosine "
            f"{agreement.min_cosine:.6f}); no file was written: please report this processor and network"
        )


def _check_embeddings(student: nn.Module, graph: IntegerGraph, file: Path, inputs: Tensor) -> None:
    target = read_metadata(file)["target"]
    embedder = OnnxEmbedder(file, providers_for(target))
    agreement = compare_embeddings(without_rounded_activations(student), embedder, [inputs])
    if not agreement.agrees:
        raise ExportError(
            f"onnxruntime and the student without activation rounding differ for target {target} (cosines of "
            f"{agreement.images} embeddings: mean {agreement.mean_cosine:.6f}, minimum {agreement.min_cosine:.6f}); "
            "no file was written: export with target cpu"
        )


def _check_float(network: nn.Module, file: Path, inputs: Tensor) -> None:
    embedder = OnnxEmbedder(file, providers=["CPUExecutionProvider"])
    images = inputs if embedder.input == FLOAT_INPUT else through_uint8(inputs, embedder.preprocessing)
    agreement = compare_embeddings(network, embedder, [images])
    if not agreement.agrees:
        raise ExportError(
            f"onnxruntime and the network differ (minimum cosine {agreement.min_cosine:.6f}); no file was written: "
            "check the network for random operations and for branches on Python values"
        )


class _UnitLength(nn.Module):
    """Wrapper that divides the embeddings of ``network`` by their Euclidean norms."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing_of(network)

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.network(images)
        # torch's exporter expands the norm of F.normalize and then loses the embedding dimension.
        lengths: Tensor = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
        return embeddings / lengths.clamp_min(_TINY)


class _Uint8Input(nn.Module):
    """Wrapper that takes RGB bytes and normalizes them for ``network``."""

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
        model, images = _Uint8Input(model, preprocessing_of(model)).eval(), images.byte()
    try:
        written = torch_onnx_model(model, (images,), ["images"], ["embedding"], OPSET)
    except Exception as error:  # torch's tracer may raise any type
        raise ExportError(
            f"torch cannot export this network ({one_line(error, _QUOTED)}); replace the operation it names"
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
            "its only input must be images of the size in its Preprocessing"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise ExportError("the network must return one tensor, the embeddings [N, dimensions]; wrap it so that it does")


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the exported graph is not valid ONNX ({one_line(error, _QUOTED)}); please report this network"
        ) from error
