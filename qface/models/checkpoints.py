"""Reading tensors from files of others, and telling from keys and shapes which network they belong to."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qface.errors import CheckpointError
from qface.models.iresnet import IRESNET_BLOCKS, IResNet
from qface.models.mobilefacenet import MobileFaceNet
from qface.models.pickled_modules import read_pickled_module
from qface.preprocessing import Preprocessing, crop_for

__all__ = ["fill", "read_tensors", "recognize", "without_wrapper"]

_WRAPPERS = ("state_dict", "model_state_dict", "model", "backbone")
_IRESNET_BLOCK = re.compile(r"layer([1-4])\.(\d+)\.conv1\.weight")


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a ``.safetensors`` or torch file by name, and its metadata.

    Torch files are read with ``weights_only=True``: nothing in them is executed. Of a whole pickled module, parameters
    and buffers are taken, likewise without running its code (:mod:`qface.models.pickled_modules`).

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else than tensors.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, False for names that no file can have
        raise CheckpointError(f"there is no file {path}; check the path")
    tensors, metadata = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else (_read_torch(path), {})
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; is it a model file?")
    return tensors, metadata


def without_wrapper(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """With the names that a network has which is in no ``DataParallel``: without ``module.`` before each of them."""
    if not all(name.startswith("module.") for name in tensors):
        return tensors
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no complete safetensors file ({error}); fetch it again") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path):
            return read_pickled_module(path)
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors, and qface does not run code from files; "
            "save its state_dict() and load that"
        ) from error
    except Exception as error:  # torch checks little, so damaged bytes may raise anything
        raise CheckpointError(f"{path} is no complete torch file; fetch it again") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} does not hold a state_dict of tensors; save model.state_dict() and load that")
    return {str(name): value for name, value in content.items()}


def recognize(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[nn.Module, Preprocessing]:
    """The network that a bare checkpoint belongs to, not yet filled, and what it most likely reads.

    Raises:
        CheckpointError: it is neither an IResNet nor a MobileFaceNet.
    """
    if "linear7.conv.weight" in tensors and "linear1.conv.weight" in tensors:
        _check_dimensions(tensors, {"linear7.conv.weight": 4, "linear1.conv.weight": 4}, path)
        return _mobilefacenet(tensors)
    if "fc.weight" in tensors and "layer4.0.conv1.weight" in tensors and "features.weight" in tensors:
        _check_dimensions(tensors, {"fc.weight": 2}, path)
        return _iresnet(tensors, path)
    names = ", ".join(list(tensors)[:3])
    raise CheckpointError(
        f"{path} holds neither an IResNet nor a MobileFaceNet (its first tensors: {names}); "
        "pass the network itself as model="
    )


def _check_dimensions(tensors: Mapping[str, Tensor], wanted: Mapping[str, int], path: str | Path) -> None:
    """Of the tensors whose shapes say how large the network is."""
    for name, dimensions in wanted.items():
        shape = list(tensors[name].shape)
        if len(shape) != dimensions or 0 in shape:
            raise CheckpointError(f"{path}: {name} has the shape {shape}, and needs {dimensions} dimensions")


def _mobilefacenet(tensors: Mapping[str, Tensor]) -> tuple[nn.Module, Preprocessing]:
    height, width = (16 * side for side in tensors["linear7.conv.weight"].shape[2:])
    size = (height, width)
    model = MobileFaceNet(len(tensors["linear1.conv.weight"]), size)
    return model, Preprocessing(crop=crop_for(size), size=size, source="default")


def _iresnet(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[nn.Module, Preprocessing]:
    counts = [0, 0, 0, 0]
    for name in tensors:
        match = _IRESNET_BLOCK.fullmatch(name)
        if match:
            counts[int(match[1]) - 1] += 1
    first, second, third, fourth = counts
    blocks = (first, second, third, fourth)
    if blocks not in IRESNET_BLOCKS.values():
        raise CheckpointError(
            f"{path} is an IResNet with {blocks} blocks, none of depth {', '.join(map(str, IRESNET_BLOCKS))}"
        )
    return IResNet(blocks, len(tensors["fc.weight"])), Preprocessing(source="default")


def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Load ``tensors`` into ``model``, all of them or none.

    Raises:
        CheckpointError: names or shapes differ; the message counts them and names the first.
    """
    wanted = model.state_dict()
    missing = sorted(name for name in wanted if name not in tensors and not name.endswith("num_batches_tracked"))
    unexpected = sorted(set(tensors) - set(wanted))
    if missing or unexpected:
        example = missing[0] if missing else unexpected[0]
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {len(missing)} tensors are missing and {len(unexpected)} are "
            f"not known to it (first: {example}); load it into the network it was saved from"
        )
    wrong = [name for name, value in tensors.items() if value.shape != wanted[name].shape]
    if wrong:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {len(wrong)} tensors have another shape (first: {wrong[0]}, "
            f"{list(tensors[wrong[0]].shape)} instead of {list(wanted[wrong[0]].shape)})"
        )
    model.load_state_dict(dict(tensors), strict=False)
