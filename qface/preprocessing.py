"""Preprocessing of aligned 112x112 face crops: crop, size, color order, mean and standard deviation.

Each model carries its :class:`Preprocessing`. Every function keeps it, and every file that qface writes stores it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qface.checks import check_choice, check_module
from qface.choices import ColorOrder
from qface.errors import CheckpointError, ConfigError
from qface.limits import MALFORMED, check, named, parse_json

__all__ = [
    "CROP_SIZE",
    "Preprocessing",
    "PreprocessingOverride",
    "attach",
    "crop_for",
    "dtype_of",
    "example_input",
    "overridden",
    "preprocessing_of",
    "warn_of_default",
    "with_preprocessing",
    "written_preprocessing",
]

CROP_SIZE = 112
"""Height and width of the aligned face crop in pixels (the ArcFace template)."""

_LOGGER = logging.getLogger("qface")
_ATTRIBUTE = "preprocessing"
_KEPT = "_user_preserved_attributes"  # torch.fx's name

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Preprocessing:
    """Conversion of aligned 112x112 RGB crops (uint8) to the float input of a network.

    Args:
        crop: (top, left, bottom, right) in pixels of the part of the 112x112 crop to use.
        size: (height, width) of the network's input in pixels; the part is resized bilinearly if its size differs.
        color: channel order of the network's input, ``"RGB"`` or ``"BGR"``.
        mean: mean of each channel on the scale 0..255, in the order of ``color``.
        std: standard deviation of each channel, likewise; the input is ``(x - mean) / std``.
        source: origin of the settings: ``"given"`` by the user, ``"file"`` (metadata), ``"graph"`` (operators at the
            start of an ONNX graph) or ``"default"``. It is neither compared nor saved.

    Raises:
        ConfigError: a field is out of range.
        LimitError: ``size`` has more pixels than :mod:`qface.limits` allows.

    Example:
        >>> Preprocessing(size=(112, 96), crop=(0, 8, 112, 104), color="BGR").size
        (112, 96)
    """

    crop: tuple[int, int, int, int] = (0, 0, CROP_SIZE, CROP_SIZE)
    size: tuple[int, int] = (CROP_SIZE, CROP_SIZE)
    color: ColorOrder = "RGB"
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)
    source: str = field(default="given", compare=False)

    def __post_init__(self) -> None:
        if not _numbers(self.crop, 4, Integral) or not _inside_template(*self.crop):
            raise ConfigError(
                f"crop must be (top, left, bottom, right) inside {CROP_SIZE}x{CROP_SIZE} pixels, got {self.crop}"
            )
        if not _numbers(self.size, 2, Integral) or min(self.size) < 1:
            raise ConfigError(f"size must be (height, width) in pixels, each >= 1, got {self.size}")
        check("image", self.size[0] * self.size[1], f"the preprocessing with the size {self.size}")
        check_choice(ColorOrder, color=self.color)
        if not _numbers(self.mean, 3, Real) or not _numbers(self.std, 3, Real) or min(self.std) <= 0:
            raise ConfigError(f"mean and std must be 3 numbers each, std > 0, got mean {self.mean}, std {self.std}")

    def __call__(self, crops: Tensor) -> Tensor:
        """Normalize ``crops``, uint8 [N, 3, 112, 112] in RGB, to float32 [N, 3, *size] on the same device."""
        top, left, bottom, right = self.crop
        pixels = crops[:, :, top:bottom, left:right].float()
        if (bottom - top, right - left) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False)
        return self.normalize(pixels)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalize ``pixels``, RGB [N, 3, *size] from 0 to 255 in any dtype, to float32."""
        floats = self._between_orders(pixels).float()
        return (floats - self._per_channel(self.mean, floats)) / self._per_channel(self.std, floats)

    def to_bytes(self, images: Tensor) -> Tensor:
        """Invert :meth:`normalize`: convert ``images``, float [N, 3, *size], to uint8 RGB pixels."""
        pixels = images * self._per_channel(self.std, images) + self._per_channel(self.mean, images)
        return self._between_orders(pixels.round().clamp(0, 255).byte())

    def _between_orders(self, pixels: Tensor) -> Tensor:
        """Convert RGB to the order of ``color``, or back."""
        return pixels.flip(1) if self.color == "BGR" else pixels

    @staticmethod
    def _per_channel(values: tuple[float, float, float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, 3, 1, 1)

    def describe(self) -> str:
        """Return the settings and their origin in one line."""
        height, width = self.size
        crop = "" if self.crop == (0, 0, CROP_SIZE, CROP_SIZE) else f" of the crop {','.join(map(str, self.crop))}"
        mean, std = (_short(values) for values in (self.mean, self.std))
        return f"{self.color} {height}x{width}{crop}, mean {mean}, std {std} ({self.source})"

    def to_json(self) -> str:
        """Return the settings as one line of JSON, the form in file metadata."""
        return json.dumps(
            {
                "crop": [int(value) for value in self.crop],  # json cannot write numpy integers
                "size": [int(value) for value in self.size],
                "color": self.color,
                "mean": [float(value) for value in self.mean],
                "std": [float(value) for value in self.std],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """Parse the output of :meth:`to_json`; ``mean`` and ``std`` may also be single numbers.

        Raises:
            ConfigError: the text is not such a JSON object.
        """
        try:
            fields: Mapping[str, Any] = parse_json(text, "the preprocessing record")
            return cls(
                crop=tuple(int(v) for v in fields["crop"]),  # type: ignore[arg-type]
                size=tuple(int(v) for v in fields["size"]),  # type: ignore[arg-type]
                color=fields.get("color", "RGB"),
                mean=_three(fields["mean"]),
                std=_three(fields["std"]),
            )
        except MALFORMED as error:
            raise ConfigError(
                f"the preprocessing {text[:200]!r} cannot be parsed ({error}): use the output of Preprocessing.to_json"
            ) from error


def written_preprocessing(text: str, path: str | Path) -> Preprocessing:
    """Parse ``text``, the preprocessing in the metadata of the file ``path``.

    Raises:
        CheckpointError: it cannot be parsed.
    """
    try:
        with named(path):
            return replace(Preprocessing.from_json(text), source="file")
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


PreprocessingOverride = Preprocessing | Mapping[str, Any]
"""A :class:`Preprocessing`, or a mapping of the fields to change in the preprocessing that was found."""

_FIELDS = tuple(each.name for each in fields(Preprocessing) if each.compare)


def overridden(found: Preprocessing, given: PreprocessingOverride | None) -> Preprocessing:
    """Return ``found`` with the fields of ``given``.

    A size without a crop also sets the crop (:func:`crop_for`).

    Raises:
        ConfigError: a field does not exist or is out of range.
    """
    if given is None or isinstance(given, Preprocessing):
        return given or found
    changes = dict(given)
    unknown = sorted(set(changes) - set(_FIELDS))
    if unknown:
        raise ConfigError(f"Preprocessing has no field {unknown[0]!r}; its fields are {', '.join(_FIELDS)}")
    if not changes:
        return found
    if "size" in changes and "crop" not in changes:
        changes["crop"] = crop_for(changes["size"])
    return replace(found, **changes, source="given")


def crop_for(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the crop for a network input of ``size``: columns 8 to 104 for 112x96, else all pixels."""
    if size == (CROP_SIZE, 96):
        return (0, 8, CROP_SIZE, 104)
    return (0, 0, CROP_SIZE, CROP_SIZE)


def warn_of_default(preprocessing: Preprocessing, path: str | Path) -> None:
    """Log the default preprocessing if neither the user nor the file ``path`` defines one."""
    if preprocessing.source == "default":
        _LOGGER.warning(
            "%s has no preprocessing in its metadata; the default is used: %s. Set it with --color, --mean, --std, "
            "--crop and --size, or preprocessing= in Python",
            path,
            preprocessing.describe(),
        )


def _short(values: tuple[float, float, float]) -> str:
    """Format ``values`` as one number if all are equal."""
    return ",".join(f"{value:g}" for value in (values[:1] if len(set(values)) == 1 else values))


def _numbers(values: Any, count: int, kind: Any) -> bool:
    """True if ``values`` is a tuple or list of ``count`` finite numbers of type ``kind``."""
    if not isinstance(values, (tuple, list)) or len(values) != count:
        return False
    return all(isinstance(value, kind) and math.isfinite(value) for value in values)


def _inside_template(top: int, left: int, bottom: int, right: int) -> bool:
    return 0 <= top < bottom <= CROP_SIZE and 0 <= left < right <= CROP_SIZE


def _three(value: Any) -> tuple[float, float, float]:
    if isinstance(value, (int, float)):
        return (float(value),) * 3
    first, second, third = (float(v) for v in value)
    return (first, second, third)


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """Return the preprocessing of ``model``, or the default if it has none."""
    carried = getattr(model, _ATTRIBUTE, None)
    return carried if isinstance(carried, Preprocessing) else Preprocessing(source="default")


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point parameter of ``model``; float32 if there is none."""
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32)


def with_preprocessing(model: ModuleT, preprocessing: Preprocessing) -> ModuleT:
    """Attach ``preprocessing`` to ``model``. Changes ``model`` in place and returns it.

    Args:
        model: a network in memory; for a file, use the argument ``preprocessing`` of :func:`qface.load`.
        preprocessing: conversion of face crops to the network's input.

    Returns:
        ``model``.

    Raises:
        ConfigError: ``model`` is not a torch.nn.Module.

    Example:
        >>> network = with_preprocessing(teacher, Preprocessing(color="BGR"))
        >>> preprocessing_of(network).color
        'BGR'
    """
    check_module(model)
    return attach(model, _ATTRIBUTE, preprocessing)


def attach(model: ModuleT, name: str, value: Any) -> ModuleT:
    """Set an attribute of ``model`` in place that copies keep, and return the model."""
    setattr(model, name, value)
    if isinstance(model, fx.GraphModule):
        # copy.deepcopy of a GraphModule keeps only attributes listed in ``meta``; a new dict, since copies share it.
        model.meta[_KEPT] = {**model.meta.get(_KEPT, {}), name: value}
    return model


def example_input(model: nn.Module, batch: int = 2) -> Tensor:
    """Return zeros [batch, 3, H, W] with the input size, dtype and device of ``model``."""
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    return torch.zeros(batch, 3, *preprocessing_of(model).size, device=device, dtype=dtype_of(model))
