"""Read checkpoints of other projects and recognize their architecture by tensor names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qface.archives import names_in
from qface.errors import CheckpointError, one_line
from qface.files import check_file
from qface.limits import elements_of
from qface.models.insightface_mbf import InsightFaceMobileFaceNet
from qface.models.iresnet import IRESNET_BLOCKS, IResNet
from qface.models.mobilefacenet import MobileFaceNet
from qface.models.state_dicts import network_tensors, state_dict_of
from qface.pickles import read_torch_file
from qface.preprocessing import Preprocessing, crop_for

__all__ = ["fill", "preprocessing_for", "read_tensors", "recognize"]

_DTYPES = frozenset(
    {
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    }
)
_IRESNET_BLOCK = re.compile(r"layer([1-4])\.(\d+)\.conv1\.weight")


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a ``.safetensors`` or torch file by name, and its metadata.

    Torch files are read without running code from them (:mod:`qface.pickles`). If a checkpoint has
    several entries, the one of the network is read (:mod:`qface.models.state_dicts`).

    Raises:
        CheckpointError: the file is missing or damaged, or contains no plain tensors.
        LimitError: the file asks for more depth, objects or memory than :mod:`qface.limits` allows.
    """
    path = Path(path)
    check_file(path)
    tensors, metadata = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else (_read_torch(path), {})
    if not tensors:
        raise CheckpointError(f"{path} contains no tensors; check that it is a model file")
    unprintable = next((name for name in tensors if not name.isprintable()), None)
    if unprintable is not None:
        raise CheckpointError(f"{path} is damaged: a tensor has the name {unprintable[:50]!r}; download it again")
    unknown = next((name for name, value in tensors.items() if value.dtype not in _DTYPES), None)
    if unknown is not None:
        raise CheckpointError(
            f"{path}: {unknown} has the unsupported dtype {str(tensors[unknown].dtype).removeprefix('torch.')}; "
            "convert it to float32"
        )
    return tensors, metadata


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({one_line(error, 200)}); download it again"
        ) from error
    for name, tensor in tensors.items():
        elements_of(tensor.shape, f"{path}: {name}")
    return tensors, metadata


def _read_torch(path: Path) -> dict[str, Tensor]:
    if is_torchscript(path):
        raise CheckpointError(
            f"{path} is a TorchScript archive, which contains code, and qface does not run code from files; "
            "export the network to .onnx, or save torch.jit.load(file).state_dict()"
        )
    return state_dict_of(read_torch_file(path), path)


def is_torchscript(path: Path) -> bool:
    """True if ``torch.jit.save`` wrote the file: it is a zip archive with constants and code."""
    names = names_in(path)
    return any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names)


_MOBILEFACENET = ("linear7.conv.weight", "linear1.conv.weight")
_IRESNET = ("fc.weight", "features.weight", "layer4.0.conv1.weight")
_MBF = ("features.layers.2.weight", "conv_sep.layers.0.weight", "layers.0.layers.0.weight")


def recognize(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[nn.Module, Preprocessing, Mapping[str, Tensor]]:
    """Build the network that a state dict belongs to; its names may have a common prefix.

    Returns:
        The network without the weights, its likely Preprocessing, and its tensors without the prefix.

    Raises:
        CheckpointError: the names fit no known architecture, or the shapes fit no size of it.
    """
    for markers, network_of in _NETWORKS.items():
        own = network_tensors(tensors, markers, path)
        if all(name in own for name in markers):
            return *network_of(own, path), own
    looked_for = "; ".join(f"{_NAMES[markers]} by {', '.join(markers)}" for markers in _NETWORKS)
    names = ", ".join(list(tensors)[:3])
    raise CheckpointError(
        f"{path} fits no known architecture ({looked_for}); its {len(tensors)} tensors begin with {names}: pass your "
        "network as model= (command line: qface quantize package.module:factory --weights FILE), or export it to .onnx"
    )


def _check_dimensions(tensors: Mapping[str, Tensor], wanted: Mapping[str, int], path: str | Path) -> None:
    """Check the number of dimensions of tensors from whose shapes the sizes of the network are taken."""
    for name, dimensions in wanted.items():
        shape = list(tensors[name].shape)
        if len(shape) != dimensions or 0 in shape:
            raise CheckpointError(
                f"{path} is damaged: {name} has the shape {shape} but needs {dimensions} sizes >= 1; download it again"
            )


def _mobilefacenet(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[nn.Module, Preprocessing]:
    _check_dimensions(tensors, {"linear7.conv.weight": 4, "linear1.conv.weight": 4}, path)
    height, width = (16 * side for side in tensors["linear7.conv.weight"].shape[2:])
    model = MobileFaceNet(len(tensors["linear1.conv.weight"]), (height, width))
    return model, preprocessing_for(height, width)


def preprocessing_for(height: int, width: int) -> Preprocessing:
    """Return the default Preprocessing for this image size: the complete crop, or its central 112x96 part."""
    size = (height, width)
    return Preprocessing(crop=crop_for(size), size=size, source="default")


def _iresnet(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[nn.Module, Preprocessing]:
    _check_dimensions(tensors, {"fc.weight": 2}, path)
    counts = [0, 0, 0, 0]
    for name in tensors:
        match = _IRESNET_BLOCK.fullmatch(name)
        if match:
            counts[int(match[1]) - 1] += 1
    first, second, third, fourth = counts
    blocks = (first, second, third, fourth)
    if blocks not in IRESNET_BLOCKS.values():
        raise CheckpointError(
            f"{path} is an IResNet with {blocks} blocks per stage, but only the depths "
            f"{', '.join(map(str, IRESNET_BLOCKS))} are known; pass your network as model="
        )
    return IResNet(blocks, len(tensors["fc.weight"])), Preprocessing(source="default")


def _mbf(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[nn.Module, Preprocessing]:
    _check_dimensions(tensors, {"features.layers.2.weight": 2, "layers.0.layers.0.weight": 4}, path)
    first, second, third, fourth = (len(_blocks_of_mbf(tensors, layer)) for layer in (1, 3, 5, 7))
    features, scale = len(tensors["features.layers.2.weight"]), len(tensors["layers.0.layers.0.weight"]) // 64
    if scale < 1:
        raise CheckpointError(
            f"{path}: layers.0.layers.0.weight of an mbf must have >= 64 output channels; pass your network as model="
        )
    return InsightFaceMobileFaceNet(features, (first or 1, second, third, fourth), scale), Preprocessing(
        source="default"
    )


def _blocks_of_mbf(tensors: Mapping[str, Tensor], layer: int) -> set[str]:
    """Return the indices of the bottlenecks in layer ``layer`` of an mbf; empty if it is a convolution."""
    pattern = re.compile(rf"layers\.{layer}\.layers\.(\d+)\.layers\.0\.layers\.0\.weight")
    return {match[1] for name in tensors if (match := pattern.fullmatch(name))}


_NETWORKS = {_MOBILEFACENET: _mobilefacenet, _IRESNET: _iresnet, _MBF: _mbf}
_NAMES = {_MOBILEFACENET: "MobileFaceNet", _IRESNET: "IResNet", _MBF: "InsightFace's mbf"}


def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Load ``tensors`` into ``model`` if all names and shapes match.

    Raises:
        CheckpointError: names or shapes differ; the message gives their number and the first one.
    """
    wanted = model.state_dict()
    missing = sorted(name for name in wanted if name not in tensors and not name.endswith("num_batches_tracked"))
    unexpected = sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        example = missing[0] if missing else unexpected[0]
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {len(missing)} tensors are missing and {len(unexpected)} are "
            f"unexpected (first: {example}); load it into the network it was saved from"
        )
    wrong = [name for name, value in tensors.items() if value.shape != wanted[name].shape]
    if wrong:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {len(wrong)} tensors have another shape (first: {wrong[0]}, "
            f"{list(tensors[wrong[0]].shape)} instead of {list(wanted[wrong[0]].shape)}); load it into the network it "
            "was saved from"
        )
    model.load_state_dict(dict(tensors), strict=False)
