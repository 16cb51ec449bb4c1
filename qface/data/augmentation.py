"""Random augmentation of training images, which depends only on the seed and the step.

Distillation needs no labels, since the teacher embeds the augmented image too: any change of a face can be trained on.
Student and teacher get the same image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from qface.checks import check_share

__all__ = ["AugmentationConfig", "augmented"]

_CHANGES = 3
"""Random stream of the augmentation, distinct from those of :mod:`qface.distillation.batch_sampler`."""

_ROTATION = 15.0  # maximum, degrees
_SCALE = 0.15  # maximum of |log(scale)|
_SHIFT = 0.08  # maximum, relative to the side
_YAW = 60.0  # maximum, degrees
_PITCH = 25.0  # maximum, degrees
_RADIUS = 1.35
"""Radius of the cylinder that models a turned face, in half crop widths: the ears are just outside the crop."""
_MIN_SIDE = 20  # minimum height of a face with low resolution, pixels
_BLUR = 2.0  # maximum standard deviation, pixels
_QUALITY = (10, 70)  # JPEG quality
_EXPOSURE = 0.7  # maximum of |log(gamma)| and |log(contrast)|
_BRIGHTNESS = 0.25  # maximum, relative to the pixel range
_COLOR = 0.3  # maximum change of a channel's gain
_COVERED = (0.1, 0.5)  # sides of the occluding rectangle relative to the crop


@dataclass(frozen=True)
class AugmentationConfig:
    """Probability of each augmentation of a training image, from 0 (never) to 1 (always).

    Augmentations are drawn independently, so an image can get several.

    Args:
        misalignment: rotate, scale and shift, like inaccurate landmarks.
        turn: turn by yaw and pitch, modeled on a cylinder.
        low_resolution: downscale, then upscale.
        blur: Gaussian blur.
        compression: JPEG compression of low quality.
        exposure: gamma, brightness and contrast.
        color: gains of the color channels.
        gray: convert to grayscale.
        occlusion: cover with a rectangle of one color or of noise.
        mixture: blend with another face of the batch.

    Raises:
        ConfigError: a probability is not in [0, 1].

    Example:
        >>> AugmentationConfig(mixture=0).mixture
        0
    """

    misalignment: float = 0.3
    turn: float = 0.3
    low_resolution: float = 0.15
    blur: float = 0.15
    compression: float = 0.15
    exposure: float = 0.3
    color: float = 0.2
    gray: float = 0.1
    occlusion: float = 0.15
    mixture: float = 0.1

    def __post_init__(self) -> None:
        check_share(**{f"augmentation {field.name}": getattr(self, field.name) for field in fields(self)})

    @classmethod
    def none(cls) -> AugmentationConfig:
        """Return settings without any augmentation."""
        return cls(**{field.name: 0.0 for field in fields(cls)})


class _Draws:
    """Uniform random numbers in [0, 1), one row per image that is changed."""

    def __init__(self, numbers: npt.NDArray[np.float64]) -> None:
        self._numbers = numbers

    def between(self, column: int, low: float, high: float) -> Tensor:
        """Return uniform numbers from ``low`` to ``high``, float32 [n]."""
        return torch.from_numpy(low + (high - low) * self._numbers[:, column]).float()

    def seeds(self, column: int) -> list[int]:
        """Return one integer seed per image."""
        return [int(number * 2**31) for number in self._numbers[:, column]]


_COLUMNS = 6  # maximum number of draws of an augmentation per image


def augmented(
    images: Tensor, mates: Tensor, config: AugmentationConfig, seed: int, step: int, first: int = 0
) -> Tensor:
    """Return augmented ``images``, which depend only on seed, step and position in the batch.

    Args:
        images: uint8 [n, 3, H, W].
        mates: the image to blend each image with, of the same shape.
        config: probability of each augmentation.
        seed: random seed.
        step: number of the batch.
        first: position of the first image in the batch; with several processes, each augments its own slice.

    Returns:
        uint8 [n, 3, H, W].

    Example:
        >>> faces = torch.zeros(4, 3, 112, 112, dtype=torch.uint8)
        >>> augmented(faces, faces.flip(0), AugmentationConfig(), seed=0, step=0).shape
        torch.Size([4, 3, 112, 112])
    """
    changed, others = images.cpu().float(), mates.cpu().float()
    for number, (name, change) in enumerate(_IN_ORDER.items()):
        rng = np.random.default_rng((seed, step, _CHANGES, number))
        drawn = rng.random((first + len(images), 1 + _COLUMNS))[first:]
        where = np.flatnonzero(drawn[:, 0] < getattr(config, name))
        if len(where):
            rows = torch.from_numpy(where)
            changed[rows] = change(changed[rows], others[rows], _Draws(drawn[where, 1:]))
    return changed.round().clamp(0, 255).to(images.device, torch.uint8)


def _mixture(faces: Tensor, mates: Tensor, draws: _Draws) -> Tensor:
    return torch.lerp(faces, mates, _each(draws.between(0, 0.2, 0.5)))


def _turn(faces: Tensor, mates: Tensor, draws: _Draws) -> Tensor:
    """Turn the face as a vertical cylinder by yaw and as a horizontal one by pitch, around its center."""
    rows, columns = _coordinates(faces)
    yaw, pitch = (torch.deg2rad(draws.between(at, -most, most))[:, None, None] for at, most in ((0, _YAW), (1, _PITCH)))
    return _sampled(faces, _turned(columns, yaw), _turned(rows, pitch))


def _turned(place: Tensor, angle: Tensor) -> Tensor:
    """Return the source coordinate of ``place``: a turn moves r sin(phi) to r sin(phi + angle)."""
    seen = (place / _RADIUS + torch.sin(angle)).clamp(-0.999, 0.999)  # shifted, so that the center stays in place
    return _RADIUS * torch.sin(torch.asin(seen) - angle)


def _misalignment(faces: Tensor, mates: Tensor, draws: _Draws) -> Tensor:
    rows, columns = _coordinates(faces)
    angle = torch.deg2rad(draws.between(0, -_ROTATION, _ROTATION))[:, None, None]
    scale = torch.exp(draws.between(1, -_SCALE, _SCALE))[:, None, None]
    across, down = (2 * draws.between(at, -_SHIFT, _SHIFT)[:, None, None] for at in (2, 3))
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    return _sampled(faces, cos * columns - sin * rows + across, sin * columns + cos * rows + down)


def _coordinates(faces: Tensor) -> tuple[Tensor, Tensor]:
    """Return row [H, 1] and column [1, W] coordinates of the pixels, from -1 to 1."""
    height, width = faces.shape[2:]
    return torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None]


def _sampled(faces: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Sample ``faces`` bilinearly at these coordinates; border pixels are repeated outside the image."""
    shape = (len(faces), *faces.shape[2:])
    places = torch.stack([columns.expand(shape), rows.expand(shape)], dim=-1)
    return F.grid_sample(faces, places, padding_mode="border", align_corners=True)


def _low_resolution(faces: Tensor, mates: Tensor, draws: _Draws) -> Tensor:
    size = faces.shape[2:]
    smaller = [
        F.interpolate(face[None], scale_factor=float(scale), mode="bilinear", antialias=True)
        for face, scale in zip(faces, draws.between(0, _MIN_SIDE / size[0], 0.7), strict=True)
    ]
    return torch.cat([F.interpolate(face, size, mode="bicubic") for face in smaller])


def _blur(faces: Tensor, mates: Tensor, draws: _Draws) -> Tensor:
    """Blur each face with a Gaussian of its own width."""
    reach = math.ceil(2.5 * _BLUR)
    offsets = torch.arange(-reach, reach + 1)
    kernels = torch.exp(-((offsets / draws.between(0, 0.5, _BLUR)[:, None]) ** 2) / 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(3, dim=0)[:, None, None]
    padded = F.pad(faces, (reach,) * 4, mode="replicate").flatten(0, 1)[None]
    across = F.conv2d(padded, kernels, groups=len(kernels))
    return F.conv2d(across, kernels.transpose(2, 3), groups=len(kernels)).view_as(faces)


def _exposure(faces: Tensor, mates: Tensor, draws: _Draws) -> Tensor:
    gamma, contrast = (_each(torch.exp(draws.between(at, -_EXPOSURE, _EXPOSURE))) for at in (0, 1))
    brightness = _each(draws.between(2, -_BRIGHTNESS, _BRIGHTNESS))
    exposed = (faces.clamp(0, 255) / 255) ** gamma
    middle = exposed.mean((1, 2, 3), keepdim=True)
    return (255 * ((exposed - middle) * contrast + middle + brightness)).clamp(0, 255)


def _color(faces: Tensor, mates: Tensor, draws: _Draws) -> Tensor:
    gains = torch.stack([draws.between(channel, 1 - _COLOR, 1 + _COLOR) for channel in range(3)], dim=1)
    return (faces * gains[:, :, None, None]).clamp(0, 255)


def _gray(faces: Tensor, mates: Tensor, draws: _Draws) -> Tensor:
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R BT.601
    return (faces * luma).sum(1, keepdim=True).expand_as(faces)


def _occlusion(faces: Tensor, mates: Tensor, draws: _Draws) -> Tensor:
    rows, columns = ((place + 1) / 2 for place in _coordinates(faces))
    inside = torch.ones(len(faces), 1, *faces.shape[2:], dtype=torch.bool)
    for place, at in ((rows, 0), (columns, 2)):
        length = draws.between(at, *_COVERED)
        start = draws.between(at + 1, 0, 1) * (1 - length)
        low, high = (edge[:, None, None] for edge in (start, start + length))
        inside &= _each((place >= low) & (place <= high))
    return torch.where(inside, _covers(faces, draws), faces)


def _covers(faces: Tensor, draws: _Draws) -> Tensor:
    """Return a rectangle filling per face: noise or one color, each with probability 1/2."""
    covers = torch.empty_like(faces)
    for cover, seed, kind in zip(covers, draws.seeds(4), draws.between(5, 0, 1), strict=True):
        generator = torch.Generator().manual_seed(seed)
        size = cover.shape if kind < 0.5 else (3, 1, 1)
        cover.copy_(torch.rand(size, generator=generator) * 255)
    return covers


def _compression(faces: Tensor, mates: Tensor, draws: _Draws) -> Tensor:
    pixels = faces.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    qualities = draws.between(0, *_QUALITY).tolist()
    stored = np.stack([_as_jpeg(face, int(quality)) for face, quality in zip(pixels, qualities, strict=True)])
    return torch.from_numpy(stored).permute(0, 3, 1, 2).float()


def _as_jpeg(pixels: npt.NDArray[np.uint8], quality: int) -> npt.NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return np.asarray(image)


def _each(values: Tensor) -> Tensor:
    """Add dimensions so that one value (or one mask) per face broadcasts over channels and pixels."""
    return values[:, None] if values.ndim > 1 else values[:, None, None, None]


_IN_ORDER: dict[str, Callable[[Tensor, Tensor, _Draws], Tensor]] = {
    "mixture": _mixture,
    "turn": _turn,
    "misalignment": _misalignment,
    "occlusion": _occlusion,
    "exposure": _exposure,
    "color": _color,
    "gray": _gray,
    "blur": _blur,
    "low_resolution": _low_resolution,
    "compression": _compression,
}
"""Order of application: pose and cover of the face, light, lens, then file storage."""
