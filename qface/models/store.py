"""``load`` and ``save``: read model files of several formats, write qface's own format.

qface's format is a safetensors file with the state dict as tensors. Its metadata hold ``format`` ("qface"),
``format_version``, and in JSON ``graph`` (:mod:`qface.graph.graph_data`), ``preprocessing`` and ``provenance``.
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
FORMAT_VERSION = "5"
_READ_VERSIONS = ("4", FORMAT_VERSION)  # format 4 has no offsets of weights
_SUFFIX = ".safetensors"

MODEL_NAMES = ("mobilefacenet", "mbf", *(f"iresnet{depth}" for depth in IRESNET_BLOCKS))
"""Names of architectures; :func:`load` builds them with random weights."""


@torch.random.fork_rng(devices=[])  # building layers draws initial weights
def load(
    path_or_name: str | Path, model: nn.Module | None = None, preprocessing: PreprocessingOverride | None = None
) -> nn.Module:
    """Load a model in eval mode on the CPU, with its :class:`Preprocessing` attached.

    Changes ``model`` in place if given, and returns it.

    Args:
        path_or_name: one of these:

            - a file that :func:`save` wrote;
            - a checkpoint of an InsightFace IResNet, InsightFace mbf or MobileFaceNet, as safetensors or torch file
              (a state dict or a pickled module; only tensors are read, and fp16 becomes fp32);
            - a ``.pt2`` file that ``torch.export.save`` wrote (nothing is unpickled);
            - a float ``.onnx`` file of opset 7 to 23;
            - one of :data:`MODEL_NAMES`, for this architecture with random weights.
        model: your own network, into which the weights of the file are loaded.
        preprocessing: the input Preprocessing if the file has none or a wrong one: a :class:`Preprocessing`, or a
            mapping with the fields to change. For an ``.onnx`` file it describes the input of the graph; normalization
            inside the graph is moved into the Preprocessing of the returned network.

    Returns:
        The network from images [N, 3, H, W] to embeddings [N, D].

    Raises:
        CheckpointError: the file is missing or damaged, does not fit the network, or contains NaN or infinity.
        LimitError: the file asks for more memory, objects or operators than :mod:`qface.limits` allows.
        TraceError: the network in a ``.pt2`` file cannot be captured.
        UnsupportedLayerError: an ``.onnx`` or ``.pt2`` file uses an operator that cannot be imported.
        ConfigError: ``path_or_name`` is not a path, ``model`` is not a module, or ``preprocessing`` has an unknown
            field or a value out of range.

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
        raise CheckpointError(f"{path} contains its own network: omit model=, or load the weights from another file")
    from qface.models.onnx_import import load_onnx  # imported here so that loading other files does not import onnx

    network, reads = load_onnx(path, preprocessing)
    check_finite(network.state_dict(), path)
    return with_preprocessing(network, reads)


def _from_exported_program(
    path: str | Path, model: nn.Module | None, preprocessing: PreprocessingOverride | None
) -> nn.Module:
    if model is not None:
        raise CheckpointError(f"{path} contains its own network: omit model=, or load the weights from another file")
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
    if version not in _READ_VERSIONS:
        raise CheckpointError(_other_version(path, version))
    try:
        with named(path):
            graph = parse_json(metadata["graph"], "the saved graph")
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} has no valid graph in its metadata ({one_line(error, 200)}); write the file again with qface.save"
        ) from error
    import_module("qface.quantization")  # registers the layers of quantized networks
    try:
        with named(path):
            return graph_from_data(graph, tensors, size)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _other_version(path: str | Path, version: str | None) -> str:
    """Return the error text for a file of another format version."""
    known = int(version) if version is not None and version.isdecimal() and len(version) < 10 else 0
    formats = f"(format {known}, this version reads {FORMAT_VERSION})"
    if known > int(FORMAT_VERSION):
        return f"{path} was written by a newer qface {formats}; update qface"
    return f"{path} was written by an older qface {formats}; create it again, a student with qface quantize"


def save(model: nn.Module, path: str | Path) -> None:
    """Write ``model`` with its graph, weights, preprocessing and provenance to one file for :func:`load`.

    Does not change ``model``. To convert a file to this format, call ``save(load(file), path)``.

    Args:
        model: a network from images [N, 3, H, W] to embeddings [N, D].
        path: the file to write; its name must end in ``.safetensors``.

    Raises:
        ConfigError: ``model`` is not a module.
        TraceError: torch.export cannot capture ``model``.
        UnsupportedLayerError: ``model`` uses a layer or function that cannot be saved; the message names it.
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
    """Sort the header of a safetensors file, whose metadata safetensors writes in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()
        file.seek(8)
        file.write(ordered.ljust(length))  # the format allows spaces after the header, so the data keep their offsets


def check_savable(model: nn.Module) -> None:
    """Check before a long computation that :func:`save` can write ``model``.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        TraceError: torch.export cannot capture ``model``.
        UnsupportedLayerError: ``model`` uses a layer or function that cannot be saved; the message names it.
    """
    _as_data(model, "this network")


def _as_data(model: nn.Module, name: str | Path) -> tuple[str, dict[str, Tensor]]:
    """Return the graph of ``model`` in JSON and its tensors, after checking that they rebuild ``model``."""
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
    """Check before a long computation that a model file can be written to ``path``.

    Args:
        path: the file to write; its name must end in ``.safetensors``, by which :func:`load` recognizes it.

    Raises:
        ExportError: the name ends in something else, or the folder does not exist or is not writable.
    """
    if as_path(path).suffix.lower() != _SUFFIX:
        raise ExportError(f"cannot write {path}: the name of a model file must end in {_SUFFIX}")
    check_folder(path)


def _is_used(tensor: str, graph: Mapping[str, Any]) -> bool:
    """True if a node uses ``tensor``; a GraphModule may also hold layers that no node calls."""
    return tensor in graph["tensors"] or any(tensor.startswith(f"{layer}.") for layer in graph["layers"])
