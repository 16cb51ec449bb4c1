"""Stress conditions: fixed corruptions of faces that differ from the training augmentation.

Each condition changes all images, and each image in a reproducible way. The corruptions are implemented differently
from :mod:`qface.data.augmentation` (a turned plane instead of a cylinder, motion blur instead of Gaussian blur, WebP
instead of JPEG), so that they show whether robustness generalizes beyond the augmentation.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from qface.checks import check_choice
from qface.data.images import IndexedImages
from qface.errors import ImagesError

__all__ = ["STRESS_CONDITIONS", "StressedImages"]

Pixels = npt.NDArray[np.uint8]  # [height, width, 3]
Rng = np.random.Generator


class StressedImages(IndexedImages):
    """Images of ``source`` under one stress condition.

    Args:
        source: uint8 crops.
        condition: one of :data:`STRESS_CONDITIONS`.
        seed: random seed of what varies between images, such as the direction of a turn.

    Raises:
        ConfigError: the condition is unknown.
        ImagesError: (when reading) the images are floats instead of uint8.

    Example:
        >>> from qface.data.images import TensorImages
        >>> faces = TensorImages(torch.zeros(2, 3, 112, 112, dtype=torch.uint8))
        >>> StressedImages(faces, "small").read([1]).shape
        torch.Size([1, 3, 112, 112])
    """

    def __init__(self, source: IndexedImages, condition: str, seed: int = 0) -> None:
        check_choice(STRESS_CONDITIONS, condition=condition)
        self._source, self._condition, self._seed = source, condition, seed
        self.labels = source.labels

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return the changed images at ``indices``."""
        images = self._source.read(indices)
        if images.dtype != torch.uint8:
            raise ImagesError("stress conditions need uint8 images: pass a folder or a uint8 tensor, not floats")
        pixels = images.cpu().permute(0, 2, 3, 1).numpy()
        change, kind = STRESS_CONDITIONS[self._condition], zlib.crc32(self._condition.encode())
        changed = [
            change(face, np.random.default_rng((self._seed, index, kind)))
            for face, index in zip(pixels, indices, strict=True)
        ]
        return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).to(images.device)

    def content(self, index: int) -> bytes:
        """Return bytes that identify the image, the condition and the seed."""
        return f"{self._condition}\0{self._seed}\0".encode() + self._source.content(index)


def _misaligned(face: Pixels, rng: Rng) -> Pixels:
    """Rotate by 10 degrees and shift by 6 pixels in x and y, like inaccurate landmarks."""
    angle, aside, down = (int(side) for side in rng.choice((-1, 1), 3))
    image, shift = Image.fromarray(face), (6 * aside, 6 * down)
    return np.asarray(image.rotate(10 * angle, Image.Resampling.BICUBIC, translate=shift, fillcolor=_mean(face)))


def _turned(face: Pixels, rng: Rng) -> Pixels:
    """Turn the face as a plane by 40 degrees, with the camera two crop widths away."""
    angle = np.deg2rad(40.0) * rng.choice((-1, 1))
    height, width = face.shape[:2]
    across, depth, distance = np.cos(angle), np.sin(angle), 2.0
    to_unit = np.array([[1 / width, 0, -0.5], [0, 1 / height, -0.5], [0, 0, 1]])
    seen = np.array([[across, 0, 0], [0, 1, 0], [depth / distance, 0, 1]])
    return _projected(face, np.linalg.inv(to_unit) @ np.linalg.inv(seen) @ to_unit)


def _projected(face: Pixels, places: npt.NDArray[np.float64]) -> Pixels:
    """Warp ``face`` by the homography ``places`` [3, 3] from output to input pixels."""
    coefficients = (places / places[2, 2]).reshape(-1)[:8].tolist()
    image, size = Image.fromarray(face), (face.shape[1], face.shape[0])
    perspective, bicubic = Image.Transform.PERSPECTIVE, Image.Resampling.BICUBIC
    return np.asarray(image.transform(size, perspective, coefficients, bicubic, fillcolor=_mean(face)))


def _mean(face: Pixels) -> tuple[int, ...]:
    return tuple(int(value) for value in face.reshape(-1, 3).mean(0))


def _narrow(face: Pixels, rng: Rng) -> Pixels:
    """Squeeze to 65 % of the width, like a head turned away."""
    height, width = face.shape[:2]
    squeezed = Image.fromarray(face).resize((round(0.65 * width), height), Image.Resampling.LANCZOS)
    left = (width - squeezed.width) // 2
    return np.pad(np.asarray(squeezed), ((0, 0), (left, width - squeezed.width - left), (0, 0)), mode="edge")


def _small(face: Pixels, rng: Rng) -> Pixels:
    """Downscale to a height of 24 pixels and upscale, like a distant face."""
    image = Image.fromarray(face)
    small = image.resize((24 * image.width // image.height, 24), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.LANCZOS))


def _moved(face: Pixels, rng: Rng) -> Pixels:
    """Blur by 9 pixels of motion in a random direction."""
    angle, image = rng.uniform(0, np.pi), Image.fromarray(face)
    steps = np.outer(np.arange(-4, 5), (np.cos(angle), np.sin(angle)))
    affine, bilinear, fill = Image.Transform.AFFINE, Image.Resampling.BILINEAR, _mean(face)
    shifted = [
        np.asarray(image.transform(image.size, affine, (1, 0, x, 0, 1, y), bilinear, fillcolor=fill))
        for x, y in steps.tolist()
    ]
    return _rounded(np.mean(shifted, axis=0))


def _rounded(values: npt.NDArray[np.floating]) -> Pixels:
    return values.round().clip(0, 255).astype(np.uint8)


def _stored(face: Pixels, rng: Rng) -> Pixels:
    """Compress as WebP of quality 5."""
    file = io.BytesIO()
    Image.fromarray(face).save(file, "WEBP", quality=5)
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _dark(face: Pixels, rng: Rng) -> Pixels:
    """Reduce the light to a quarter and add sensor noise."""
    return _rounded(face / 4 + rng.normal(0, 6, face.shape))


def _sidelit(face: Pixels, rng: Rng) -> Pixels:
    """Light the face from one side, with a gain from 1.5 to 0.2."""
    gains = np.linspace(1.5, 0.2, face.shape[1])[:: int(rng.choice((-1, 1)))]
    return _rounded(face * gains[None, :, None])


def _masked(face: Pixels, rng: Rng) -> Pixels:
    """Cover nose and mouth of the ArcFace template with a medical mask."""
    image = Image.fromarray(face)
    outline = [(20, 68), (56, 62), (92, 68), (88, 104), (74, 112), (38, 112), (24, 104)]
    ImageDraw.Draw(image).polygon(outline, fill=(150, 190, 205))
    return np.asarray(image)


def _sunglasses(face: Pixels, rng: Rng) -> Pixels:
    """Cover the eyes of the ArcFace template with dark glasses."""
    image = Image.fromarray(face)
    draw = ImageDraw.Draw(image)
    for left in (23, 59):
        draw.ellipse((left, 41, left + 30, 63), fill=(25, 25, 30))
    draw.line((50, 50, 62, 50), fill=(25, 25, 30), width=3)
    return np.asarray(image)


STRESS_CONDITIONS: dict[str, Callable[[Pixels, Rng], Pixels]] = {
    "misaligned": _misaligned,
    "turned": _turned,
    "narrow": _narrow,
    "small": _small,
    "moved": _moved,
    "stored": _stored,
    "dark": _dark,
    "sidelit": _sidelit,
    "masked": _masked,
    "sunglasses": _sunglasses,
}
"""Corruption of one face, uint8 [H, W, 3], by condition name."""
