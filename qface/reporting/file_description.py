"""``describe``: kind, input, size and provenance of a file or network."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn

from qface.deployment import measure_size
from qface.deployment.inputs import FLOAT_INPUT
from qface.deployment.metadata import read_metadata
from qface.deployment.runtime import OnnxEmbedder
from qface.deployment.size.report import PARAMETERS, SizeEntry
from qface.errors import UnsupportedLayerError, one_line
from qface.evaluation.match_thresholds import MatchThresholds, thresholds_of
from qface.graph.queries import is_quantized
from qface.models import load
from qface.models.resolve import resolve_architecture
from qface.network_output import embedding_of
from qface.preprocessing import Preprocessing, PreprocessingOverride, example_input, overridden, preprocessing_of
from qface.provenance import provenance_of, written_provenance
from qface.pruning.budget import count_parameters
from qface.quantization import QuantizationPlan, inspect
from qface.quantization.plan import count_activation_bits, unrounded
from qface.reporting.exported_file import ExportedFile, is_exported
from qface.reporting.steps import steps_in_words

__all__ = ["FileDescription", "describe"]

_LOGGER = logging.getLogger("qface")
_FLOAT_BITS = 32  # bits of each weight of a loaded float network


@dataclass(frozen=True)
class FileDescription:
    """Kind, input, size and provenance of a file or network.

    Args:
        kind: ``"student"``, ``"float network"``, ``"exported student"``, ``"exported float network"``, or
            ``"ONNX file"`` if not written by qface.
        preprocessing: preprocessing of the network.
        input: ``"float32"`` for normalized images or ``"uint8"`` for pixels.
        dimensions: embedding dimension.
        parameters: number of parameters; with BatchNorm folded for students and ONNX files.
        weight_bits: number of weight tensors by bit width.
        activation_bits: number of quantized activation tensors by bit width; empty for float, None if unknown.
        bytes: size of the file; None without a file.
        steps: provenance, one sentence per step.
        thresholds: match thresholds of the file; None without.
        plan: plan of the layers for integer kernels; None if the file cannot be loaded as a float network.
    """

    kind: str
    preprocessing: Preprocessing
    input: str
    dimensions: int
    parameters: int
    weight_bits: Mapping[int, int]
    activation_bits: Mapping[int, int] | None
    bytes: int | None
    steps: tuple[str, ...]
    thresholds: MatchThresholds | None
    plan: QuantizationPlan | None

    @property
    def is_student(self) -> bool:
        """True for a quantized network."""
        return self.kind in ("student", "exported student")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON, merged with those of the plan."""
        plan = {"integer_share": None, "layers": None} if self.plan is None else self.plan.to_dict()
        return {name: value for name, value in asdict(self).items() if name != "plan"} | plan


def describe(model: str | Path, bits: int = 6, preprocessing: PreprocessingOverride | None = None) -> FileDescription:
    """Describe a model file, or a network by name.

    Args:
        model: a file, ``package.module:factory``, or one of :data:`qface.models.MODEL_NAMES`.
        bits: bit width of the plan of a float network.
        preprocessing: preprocessing, or some of its fields, to use instead of those of the file.

    Raises:
        CheckpointError: the file, name or factory does not exist, or the file is damaged.
        ConfigError: ``bits`` is out of range.
        TraceError, UnsupportedLayerError: as in :func:`qface.inspect`.

    Example:
        >>> describe("student.onnx").kind
        'exported student'
    """
    text = str(model)
    if not text.lower().endswith(".onnx"):
        size = os.path.getsize(text) if os.path.isfile(text) else None
        return _of_network(resolve_architecture(text, preprocessing), bits, size)
    path = Path(text)
    if is_exported(path):
        return _of_exported(path, bits, preprocessing)
    return _of_other(OnnxEmbedder(path, preprocessing=preprocessing), bits)


def _of_network(network: nn.Module, bits: int, size: int | None) -> FileDescription:
    quantized = is_quantized(network)
    parameters, weight_bits = _counts(measure_size(network).entries) if quantized else _float_counts(network)
    return FileDescription(
        kind="student" if quantized else "float network",
        preprocessing=preprocessing_of(network),
        input=FLOAT_INPUT,
        dimensions=_dimensions(network),
        parameters=parameters,
        weight_bits=weight_bits,
        activation_bits=count_activation_bits(cast(fx.GraphModule, network)) if quantized else {},
        bytes=size,
        steps=steps_in_words(provenance_of(network)),
        thresholds=None,
        plan=inspect(network, bits),
    )


def _counts(entries: Iterable[SizeEntry]) -> tuple[int, dict[int, int]]:
    """Return the number of parameters, and the number of weight tensors by bit width."""
    known = [entry for entry in entries if entry.kind in PARAMETERS]
    bits = Counter(entry.bits for entry in known if entry.kind == "weight" and entry.bits is not None)
    return sum(entry.elements for entry in known), dict(sorted(bits.items()))


def _float_counts(network: nn.Module) -> tuple[int, dict[int, int]]:
    weighted = [layer for layer in network.modules() if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear))]
    return count_parameters(network), {_FLOAT_BITS: len(weighted)}


def _dimensions(network: nn.Module) -> int:
    with torch.no_grad():
        return int(embedding_of(unrounded(network)(example_input(network))).shape[1])


def _of_exported(path: Path, bits: int, preprocessing: PreprocessingOverride | None) -> FileDescription:
    file = ExportedFile.read(path)
    parameters, weight_bits = _counts(measure_size(path).entries)
    quantized = file.quantized is not None
    return FileDescription(
        kind="exported student" if quantized else "exported float network",
        preprocessing=overridden(file.preprocessing, preprocessing),
        input=file.input,
        dimensions=file.dimensions,
        parameters=parameters,
        weight_bits=weight_bits,
        activation_bits=file.activation_bits,
        bytes=path.stat().st_size,
        steps=steps_in_words(file.steps),
        thresholds=file.thresholds,
        plan=None if quantized else inspect(load(path), bits),
    )


def _of_other(embedder: OnnxEmbedder, bits: int) -> FileDescription:
    """Describe an ONNX file of another program or of an older qface."""
    path = embedder.path
    parameters, weight_bits = _counts(measure_size(path).entries)
    plan = _plan_of_other(path, embedder.preprocessing, bits)
    return FileDescription(
        kind="ONNX file",
        preprocessing=embedder.preprocessing,
        input=embedder.input,
        dimensions=int(embedder(torch.zeros(1, 3, *embedder.preprocessing.size)).shape[1]),
        parameters=parameters,
        weight_bits=weight_bits,
        activation_bits=None if plan is None else {},
        bytes=path.stat().st_size,
        steps=steps_in_words(written_provenance(read_metadata(path).get("provenance", "[]"), path)),
        thresholds=thresholds_of(path),
        plan=plan,
    )


def _plan_of_other(path: Path, reads: Preprocessing, bits: int) -> QuantizationPlan | None:
    """Return the plan of a float network; None if it is quantized or has unsupported operators."""
    try:
        network = load(path, preprocessing=replace(reads, source="given"))  # the default was already logged
    except UnsupportedLayerError as error:
        _LOGGER.warning("no plan for integer kernels: %s", one_line(error))
        return None
    return inspect(network, bits)
