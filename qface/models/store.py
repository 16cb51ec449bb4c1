"""``load`` and ``save``: models of this package, checkpoints of others, and qface's own format.

The format is a safetensors file: the ``state_dict`` as tensors, and in the metadata ``format`` ("qface"),
``format_version``, ``graph`` (:mod:`qface.graph.graph_data`), ``preprocessing`` and ``provenance``, each JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from qface.checks import check_finite, check_module
from qface.errors import CheckpointError, ExportError, one_line
from qface.files import as_path, check_folder, replacing
from qface.graph.capture import capture
from qface.graph.graph_data import check_rebuilt, graph_from_data, graph_to_data
from qface.limits import named, parse_json
from qface.models.checkpoints import fill, read_tensors, recognize
from qface.models.exported_program import is_exported_program, load_exported_program
from qface.models.insightface_mbf import InsightFaceMobileFaceNet
from qface.models.iresnet import IRESNET_BLOCKS, iresnet
from qface.models.mobilefacenet import MobileFaceNet
from qface.models.state_dicts import network_tensors
from qface.preprocessing import (
    Preprocessing,
    PreprocessingOverride,
    overridden,
    preprocessing_of,
    warn_of_default,
    with_preprocessing,
    written_preprocessing,
)
from qface.provenance import provenance_of, with_provenance, written_provenance

__all__ = ["MODEL_NAMES", "check_model_file", "load", "save"]

FORMAT = "qface"
FORMAT_VERSION = "4"
_SUFFIX = ".safetensors"

MODEL_NAMES = ("mobilefacenet", "mbf", *(f"iresnet{depth}" for depth in IRESNET_BLOCKS))
"""Names that :func:`load` takes in place of a path, for a network with random weights."""


@torch.random.fork_rng(devices=[])  # layers draw weights at first
def load(
    path_or_name: str | Path, model: nn.Module | None = None, preprocessing: PreprocessingOverride | None = None
) -> nn.Module:
    """Load a model in eval mode, on the CPU, with its :class:`Preprocessing` attached.

    Changes ``model`` in place and returns it, where one is given.

    Args:
        path_or_name: a file that :func:`save` wrote; a checkpoint of an InsightFace IResNet or mbf or of a
            MobileFaceNet (safetensors, or torch: tensors, or a whole pickled module, of which only tensors are taken;
            fp16 becomes fp32); a ``.pt2`` file of ``torch.export.save``, of which nothing is unpickled
            (:mod:`qface.models.exported_program`); a float ``.onnx`` file (:mod:`qface.models.onnx_import`); or one of
            :data:`MODEL_NAMES`, which gives that architecture with random weights.
        model: a network of your own, into which the weights of the file are loaded; a module, since a path or name
            would bring an architecture or weights of its own.
        preprocessing: what the file reads, where it does not say or says it wrongly: a :class:`Preprocessing`, or a
            mapping of those of its fields that differ from what is found. Of an ``.onnx`` file it is what goes into
            the graph; what the graph then does to the image first becomes part of the network's Preprocessing.

    Raises:
        CheckpointError: the file is missing, damaged, of another network, or holds NaN.
        UnsupportedLayerError: an ``.onnx`` file holds an operation that cannot be imported.
        ConfigError: ``path_or_name`` is no path, ``model`` is no network, or ``preprocessing`` names no field, or a
            value out of range.

    Example:
        >>> network = qface.load("teacher.safetensors")
        >>> file = qface.load("teacher.onnx")
    """
    if model is not None:
        check_module(model)
    if as_path(path_or_name).suffix.lower() == ".onnx":
        return _from_onnx(path_or_name, model, preprocessing)
    if model is None and str(path_or_name) in MODEL_NAMES and not Path(path_or_name).exists():
        fresh = _fresh(str(path_or_name))
        return with_preprocessing(fresh, overridden(Preprocessing(source="default"), preprocessing)).eval()
    if is_exported_program(path_or_name):
        return _from_exported_program(path_or_name, model, preprocessing)
    tensors, metadata = read_tensors(path_or_name)
    check_finite(tensors, path_or_name)
    written = metadata.get("preprocessing")
    reads = None if written is None else overridden(written_preprocessing(written, path_or_name), preprocessing)
    loaded, likely = _fitting_network(tensors, metadata, path_or_name, model, reads)
    if metadata.get("format") == FORMAT:
        with_provenance(loaded, written_provenance(metadata.get("provenance", ""), path_or_name))
    reads = reads or overridden(likely, preprocessing)
    warn_of_default(reads, path_or_name)
    return with_preprocessing(loaded, reads).eval()


def _from_onnx(path: str | Path, model: nn.Module | None, preprocessing: PreprocessingOverride | None) -> nn.Module:
    if model is not None:
        raise CheckpointError(f"{path} brings its own network: leave out model=, or load weights from another file")
    from qface.models.onnx_import import load_onnx  # only here, so that other files need no onnx

    network, reads = load_onnx(path, preprocessing)
    check_finite(network.state_dict(), path)
    return with_preprocessing(network, reads)


def _from_exported_program(
    path: str | Path, model: nn.Module | None, preprocessing: PreprocessingOverride | None
) -> nn.Module:
    if model is not None:
        raise CheckpointError(f"{path} brings its own network: leave out model=, or load weights from another file")
    network, likely = load_exported_program(path)
    check_finite(network.state_dict(), path)
    return with_preprocessing(network, overridden(likely, preprocessing))


def _fresh(name: str) -> nn.Module:
    if name == "mbf":
        return InsightFaceMobileFaceNet()
    return MobileFaceNet() if name == "mobilefacenet" else iresnet(int(name.removeprefix("iresnet")))


def _fitting_network(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: str | Path,
    model: nn.Module | None,
    reads: Preprocessing | None,
) -> tuple[nn.Module, Preprocessing]:
    if model is not None:
        fill(model, network_tensors(tensors, _names_to_fill(model), path), path)
        return model, preprocessing_of(model)
    if metadata.get("format") == FORMAT:
        likely = Preprocessing()
        return _from_own_format(tensors, metadata, path, (reads or likely).size), likely
    recognized, likely, own = recognize(tensors, path)
    fill(recognized, own, path)
    return recognized, likely


def _names_to_fill(model: nn.Module) -> list[str]:
    return [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]


def _from_own_format(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: str | Path, size: tuple[int, int]
) -> nn.Module:
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(_other_version(path, version))
    try:
        with named(path):
            graph = parse_json(metadata["graph"], "the saved graph")
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} lacks its graph ({one_line(error, 200)}); save it again") from error
    import_module("qface.quantization")  # it registers the layers of students
    try:
        with named(path):
            return graph_from_data(graph, tensors, size)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _other_version(path: str | Path, version: str | None) -> str:
    """The message for a file of another format version."""
    known = version if version is not None and version.isdecimal() else "0"
    formats = f"(format {known}, this one reads {FORMAT_VERSION})"
    if int(known) > int(FORMAT_VERSION):
        return f"{path} was written by a newer qface {formats}; update qface"
    return f"{path} was written by an older qface {formats}; make it again, a student with qface quantize"


def save(model: nn.Module, path: str | Path) -> None:
    """Write ``model`` with its architecture, preprocessing and provenance; :func:`load` needs nothing else.

    Does not change ``model``.

    Args:
        model: a network; what is in a file already is written in this form with ``save(load(file), path)``.
        path: the file, ``.safetensors``.

    Raises:
        ConfigError: ``model`` is no network.
        TraceError: torch.export cannot follow the model.
        UnsupportedLayerError: the model uses a layer or function that cannot be saved as data; it is named.
        CheckpointError: a weight is NaN or infinite.
        ExportError: the file cannot be written, or its name does not end in ``.safetensors``.

    Example:
        >>> qface.save(student, "copy.safetensors")
    """
    check_module(model)
    check_model_file(path)
    written, tensors = _as_data(model, path)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "graph": written,
        "preprocessing": preprocessing_of(model).to_json(),
        "provenance": json.dumps(provenance_of(model)),
    }
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
            _sort_header(temporary)
        except (OSError, SafetensorError) as error:
            raise ExportError(f"cannot write {path}: {error}; is the disk full?") from error


def _sort_header(path: Path) -> None:
    """Give the header of a safetensors file one order: safetensors itself writes metadata in a random one."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()
        file.seek(8)
        file.write(ordered.ljust(length))  # data stay where they are, and blanks are allowed before them


def check_savable(model: nn.Module) -> None:
    """Make sure, before long work, that :func:`save` will take ``model``.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        TraceError: torch.export cannot follow the model.
        UnsupportedLayerError: it uses a layer or function that cannot be saved as data; it is named.
    """
    _as_data(model, "this network")


def _as_data(model: nn.Module, name: str | Path) -> tuple[str, dict[str, Tensor]]:
    """The graph of ``model`` in JSON, and its tensors, from which :func:`load` has rebuilt it once."""
    graph_module = capture(model)
    graph = graph_to_data(graph_module)
    tensors = {
        key: value.detach().cpu().contiguous().clone()
        for key, value in graph_module.state_dict().items()
        if _is_used(key, graph)
    }
    check_finite(tensors, name)
    written = json.dumps(graph)
    check_rebuilt(graph_module, json.loads(written), tensors, preprocessing_of(model).size)
    return written, tensors


def check_model_file(path: str | Path) -> None:
    """Make sure, before long work, that :func:`load` will know a file of this name for what it is.

    Raises:
        ExportError: its name does not end in ``.safetensors``, or no file can be written there.
    """
    if as_path(path).suffix.lower() != _SUFFIX:
        raise ExportError(f"cannot write {path}: the name of a network's file ends in {_SUFFIX}")
    check_folder(path)


def _is_used(tensor: str, graph: Mapping[str, Any]) -> bool:
    """True if a node reads it; layers that none calls may hang on a GraphModule, and are not rebuilt."""
    return tensor in graph["tensors"] or any(tensor.startswith(f"{layer}.") for layer in graph["layers"])
