"""``describe``: what a file or network is, what it reads, and how it was made."""

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
from qface.models import load
from qface.models.resolve import resolve_architecture
from qface.network_output import embedding_of
from qface.preprocessing import Preprocessing, PreprocessingOverride, example_input, overridden, preprocessing_of
from qface.provenance import provenance_of, written_provenance
from qface.pruning.budget import count_parameters
from qface.quantization import QuantizationPlan, inspect, is_quantized
from qface.quantization.plan import count_activation_bits, unrounded
from qface.reporting.exported_file import ExportedFile, is_exported
from qface.reporting.steps import steps_in_words

__all__ = ["FileDescription", "describe"]

_LOGGER = logging.getLogger("qface")
_FLOAT_BITS = 32  # of every weight of a float network, once it is loaded


@dataclass(frozen=True)
class FileDescription:
    """Kind, input, size and origin of a file or network.

    Args:
        kind: ``"student"``, ``"float network"``, ``"exported student"``, ``"exported float network"`` or
            ``"ONNX file"``, one that qface did not write.
        preprocessing: what it reads.
        input: ``"float32"``, normalized, or ``"uint8"``, the bytes of images.
        dimensions: length of the embedding.
        parameters: numbers that were learned; of a student or an ONNX file with BatchNorm folded.
        weight_bits: number of weights of each number of bits.
        activation_bits: number of values that are rounded to each number of bits; empty where none is, None where
            the file does not say.
        bytes: size of the file; None of a network without one.
        steps: those that made it, a sentence each.
        thresholds: those in the file.
        plan: the layers that integer kernels compute or would compute; None of a file that is no network in torch.
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
        """True if it has bits of its own."""
        return self.kind in ("student", "exported student")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; those of the plan stand beside the others."""
        plan = {"integer_share": None, "layers": None} if self.plan is None else self.plan.to_dict()
        return {name: value for name, value in asdict(self).items() if name != "plan"} | plan


def describe(model: str | Path, bits: int = 6, preprocessing: PreprocessingOverride | None = None) -> FileDescription:
    """Describe a file that qface reads, or a network by its name.

    Args:
        model: a file, ``package.module:factory``, or one of :data:`qface.models.MODEL_NAMES`.
        bits: that the plan gives a float network.
        preprocessing: what the network reads, or some fields of that, in place of what is found.

    Raises:
        CheckpointError: there is no such file, name or factory, or the file is damaged.
        ConfigError: ``bits`` are out of range.
        TraceError, UnsupportedLayerError: as :func:`qface.inspect`.

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
    """The number of parameters, and of weights by their bits."""
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
    """A file of others, or of an older qface."""
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
    """The plan of a float network; None if it is quantized or has operators that cannot be imported."""
    try:
        network = load(path, preprocessing=replace(reads, source="given"))  # a default was named before
    except UnsupportedLayerError as error:
        _LOGGER.warning("no plan of integer layers: %s", one_line(error))
        return None
    return inspect(network, bits)
