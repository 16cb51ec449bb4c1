"""Preprocessing: the part of the aligned 112x112 face crop that a network reads, and how bytes become floats.

A :class:`Preprocessing` travels with a model through every verb and lies in the metadata of every file that qface
writes, so that nobody has to remember which network wants which mean.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qface.checks import check_module
from qface.choices import ColorOrder
from qface.errors import CheckpointError, ConfigError
from qface.limits import check, named, parse_json

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
"""Side of the aligned face crop in pixels (the ArcFace template)."""

_LOGGER = logging.getLogger("qface")
_ATTRIBUTE = "preprocessing"
_KEPT = "_user_preserved_attributes"  # torch.fx's name
_COLORS = get_args(ColorOrder)

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Preprocessing:
    """From an aligned 112x112 RGB crop of bytes to the float tensor that a network reads.

    Args:
        crop: top, left, bottom, right of the part of the 112x112 crop that is used, in pixels.
        size: height and width the network reads; the crop is resized to it bilinearly where it differs.
        color: channel order that the network reads, ``"RGB"`` or ``"BGR"``.
        mean: per channel in the order of ``color``, in bytes (0..255).
        std: likewise; the network reads ``(x - mean) / std``.
        source: who says so: ``"given"`` by the user, ``"file"`` for its metadata, ``"graph"`` for the operators at the
            start of an ONNX graph, ``"default"`` where nobody does. It is not compared and not written.

    Raises:
        ConfigError: a field is out of range.
        LimitError: the size has more pixels than :mod:`qface.limits` allows.

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
                f"crop {self.crop} is not (top, left, bottom, right) inside the {CROP_SIZE}x{CROP_SIZE} template"
            )
        if not _numbers(self.size, 2, Integral) or min(self.size) < 1:
            raise ConfigError(f"size {self.size} is not (height, width) in pixels")
        check("image", self.size[0] * self.size[1], f"the preprocessing with the size {self.size}")
        if self.color not in _COLORS:
            raise ConfigError(f"color {self.color!r} is none of {', '.join(_COLORS)}")
        if not _numbers(self.mean, 3, Real) or not _numbers(self.std, 3, Real) or min(self.std) <= 0:
            raise ConfigError("mean and std need three numbers each, and std positive ones")

    def __call__(self, crops: Tensor) -> Tensor:
        """Normalize ``crops``, uint8 [N, 3, 112, 112] in RGB, to float32 [N, 3, *size] on the same device."""
        top, left, bottom, right = self.crop
        pixels = crops[:, :, top:bottom, left:right].float()
        if (bottom - top, right - left) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False)
        return self.normalize(pixels)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalize ``pixels``, RGB [N, 3, *size] of 0..255 in any type, to float32."""
        floats = self._between_orders(pixels).float()
        return (floats - self._per_channel(self.mean, floats)) / self._per_channel(self.std, floats)

    def to_bytes(self, images: Tensor) -> Tensor:
        """The RGB pixels that :meth:`normalize` made ``images`` of, rounded, as uint8 [N, 3, *size]."""
        pixels = images * self._per_channel(self.std, images) + self._per_channel(self.mean, images)
        return self._between_orders(pixels.round().clamp(0, 255).byte())

    def _between_orders(self, pixels: Tensor) -> Tensor:
        """From RGB to the order of ``color``, or back, which is the same."""
        return pixels.flip(1) if self.color == "BGR" else pixels

    @staticmethod
    def _per_channel(values: tuple[float, float, float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, 3, 1, 1)

    def describe(self) -> str:
        """One line for reports: what the network reads, and who says so."""
        height, width = self.size
        crop = "" if self.crop == (0, 0, CROP_SIZE, CROP_SIZE) else f" of the crop {','.join(map(str, self.crop))}"
        mean, std = (_short(values) for values in (self.mean, self.std))
        return f"{self.color} {height}x{width}{crop}, mean {mean}, std {std} ({self.source})"

    def to_json(self) -> str:
        """One line of JSON, as it lies in file metadata."""
        return json.dumps(
            {
                "crop": [int(value) for value in self.crop],  # numpy's numbers have no JSON
                "size": [int(value) for value in self.size],
                "color": self.color,
                "mean": [float(value) for value in self.mean],
                "std": [float(value) for value in self.std],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """Read what :meth:`to_json` wrote; ``mean`` and ``std`` may also be single numbers.

        Raises:
            ConfigError: the text is not such an object.
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
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise ConfigError(f"the preprocessing record {text[:200]!r} cannot be read: {error}") from error


def written_preprocessing(text: str, path: str | Path) -> Preprocessing:
    """Read the preprocessing in the metadata of the file at ``path``.

    Raises:
        CheckpointError: they cannot be read.
    """
    try:
        with named(path):
            return replace(Preprocessing.from_json(text), source="file")
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


PreprocessingOverride = Preprocessing | Mapping[str, Any]
"""A whole :class:`Preprocessing`, or only those of its fields that take the place of what was found."""

_FIELDS = tuple(each.name for each in fields(Preprocessing) if each.compare)


def overridden(found: Preprocessing, given: PreprocessingOverride | None) -> Preprocessing:
    """``found`` with what the user says in its place; a size that is given alone brings its crop.

    Raises:
        ConfigError: there is no such field, or it is out of range.
    """
    if given is None or isinstance(given, Preprocessing):
        return given or found
    changes = dict(given)
    unknown = sorted(set(changes) - set(_FIELDS))
    if unknown:
        raise ConfigError(f"a Preprocessing has no {unknown[0]!r}; its fields are {', '.join(_FIELDS)}")
    if not changes:
        return found
    if "size" in changes and "crop" not in changes:
        changes["crop"] = crop_for(changes["size"])
    return replace(found, **changes, source="given")


def crop_for(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of the 112x112 crop that a network of this size reads: a width of 96 means columns 8 to 104."""
    if size == (CROP_SIZE, 96):
        return (0, 8, CROP_SIZE, 104)
    return (0, 0, CROP_SIZE, CROP_SIZE)


def warn_of_default(preprocessing: Preprocessing, path: str | Path) -> None:
    """Name the default in one line where neither the user nor the file at ``path`` says what it reads."""
    if preprocessing.source == "default":
        _LOGGER.warning(
            "%s does not say what it reads; taken is %s. Set it with --color, --mean, --std, --crop and --size, or "
            "preprocessing= in Python",
            path,
            preprocessing.describe(),
        )


def _short(values: tuple[float, float, float]) -> str:
    """One number where all are equal."""
    return ",".join(f"{value:g}" for value in (values[:1] if len(set(values)) == 1 else values))


def _numbers(values: Any, count: int, kind: Any) -> bool:
    """True if ``values`` are ``count`` finite numbers of a kind of :mod:`numbers`."""
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
    """The preprocessing that ``model`` carries, or the default where it carries none."""
    carried = getattr(model, _ATTRIBUTE, None)
    return carried if isinstance(carried, Preprocessing) else Preprocessing(source="default")


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type that ``model`` reads: float32, or the one that it was cast to as a whole."""
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32)


def with_preprocessing(model: ModuleT, preprocessing: Preprocessing) -> ModuleT:
    """Attach ``preprocessing`` to ``model``. Changes ``model`` in place and returns it.

    Args:
        model: a network; of a file, :func:`qface.load` takes ``preprocessing``.
        preprocessing: what it reads.

    Raises:
        ConfigError: ``model`` is no network.

    Example:
        >>> network = with_preprocessing(teacher, Preprocessing(color="BGR"))
        >>> preprocessing_of(network).color
        'BGR'
    """
    check_module(model)
    return attach(model, _ATTRIBUTE, preprocessing)


def attach(model: ModuleT, name: str, value: Any) -> ModuleT:
    """Set an attribute in place that copies keep, and return the model.

    ``copy.deepcopy`` of a GraphModule drops every attribute that ``meta`` does not list.
    """
    setattr(model, name, value)
    if isinstance(model, fx.GraphModule):
        model.meta[_KEPT] = {**model.meta.get(_KEPT, {}), name: value}  # a new dict, since copies share ``meta``'s own
    return model


def example_input(model: nn.Module, batch: int = 2) -> Tensor:
    """Zeros [batch, 3, height, width] of the size, on the device and of the type of ``model``."""
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    return torch.zeros(batch, 3, *preprocessing_of(model).size, device=device, dtype=dtype_of(model))
