"""The stress protocol: fixed changes of faces, each of one kind, which training does not use in this form.

Each condition changes every image, and the same image always in the same way. Where :mod:`qface.data.augmentation`
turns a face on a cylinder, blurs it evenly and stores it as JPEG, these turn it as a plane before a near camera, blur
it along a line and store it as WebP: a student that has learned the changes of its training, and nothing else, shows.
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

from qface.data.images import IndexedImages
from qface.errors import ConfigError, ImagesError

__all__ = ["STRESS_CONDITIONS", "StressedImages"]

Pixels = npt.NDArray[np.uint8]  # [height, width, 3]
Rng = np.random.Generator


class StressedImages(IndexedImages):
    """The images of ``source`` under one condition.

    Args:
        source: uint8 crops.
        condition: one of :data:`STRESS_CONDITIONS`.
        seed: of what differs from image to image, such as the side that a face turns to.

    Raises:
        ConfigError: there is no such condition.
        ImagesError: (when read) the images are normalized already.

    Example:
        >>> from qface.data.images import TensorImages
        >>> faces = TensorImages(torch.zeros(2, 3, 112, 112, dtype=torch.uint8))
        >>> StressedImages(faces, "small").read([1]).shape
        torch.Size([1, 3, 112, 112])
    """

    def __init__(self, source: IndexedImages, condition: str, seed: int = 0) -> None:
        if condition not in STRESS_CONDITIONS:
            raise ConfigError(f"a stress condition is one of {', '.join(STRESS_CONDITIONS)}, not {condition!r}")
        self._source, self._condition, self._seed = source, condition, seed
        self.labels = source.labels

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images at ``indices``, changed."""
        images = self._source.read(indices)
        if images.dtype != torch.uint8:
            raise ImagesError("stress conditions change bytes: pass a folder or uint8 images, not normalized floats")
        pixels = images.cpu().permute(0, 2, 3, 1).numpy()
        change, kind = STRESS_CONDITIONS[self._condition], zlib.crc32(self._condition.encode())
        changed = [
            change(face, np.random.default_rng((self._seed, index, kind)))
            for face, index in zip(pixels, indices, strict=True)
        ]
        return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).to(images.device)

    def content(self, index: int) -> bytes:
        """Bytes that tell the image from others, and this condition from others."""
        return f"{self._condition}\0{self._seed}\0".encode() + self._source.content(index)


def _misaligned(face: Pixels, rng: Rng) -> Pixels:
    """Rotated by 10 degrees and shifted by 6 pixels each way, as by landmarks that miss."""
    angle, aside, down = (int(side) for side in rng.choice((-1, 1), 3))
    image, shift = Image.fromarray(face), (6 * aside, 6 * down)
    return np.asarray(image.rotate(10 * angle, Image.Resampling.BICUBIC, translate=shift, fillcolor=_mean(face)))


def _turned(face: Pixels, rng: Rng) -> Pixels:
    """A plane, turned by 40 degrees before a camera two widths away."""
    angle = np.deg2rad(40.0) * rng.choice((-1, 1))
    height, width = face.shape[:2]
    across, depth, distance = np.cos(angle), np.sin(angle), 2.0
    to_unit = np.array([[1 / width, 0, -0.5], [0, 1 / height, -0.5], [0, 0, 1]])
    seen = np.array([[across, 0, 0], [0, 1, 0], [depth / distance, 0, 1]])
    return _projected(face, np.linalg.inv(to_unit) @ np.linalg.inv(seen) @ to_unit)


def _projected(face: Pixels, places: npt.NDArray[np.float64]) -> Pixels:
    """Each pixel of the result is the one of ``face`` where the homography ``places`` [3, 3] sends it."""
    coefficients = (places / places[2, 2]).reshape(-1)[:8].tolist()
    image, size = Image.fromarray(face), (face.shape[1], face.shape[0])
    perspective, bicubic = Image.Transform.PERSPECTIVE, Image.Resampling.BICUBIC
    return np.asarray(image.transform(size, perspective, coefficients, bicubic, fillcolor=_mean(face)))


def _mean(face: Pixels) -> tuple[int, ...]:
    return tuple(int(value) for value in face.reshape(-1, 3).mean(0))


def _narrow(face: Pixels, rng: Rng) -> Pixels:
    """Squeezed to 65 % of its width, as a head that turns away is."""
    height, width = face.shape[:2]
    squeezed = Image.fromarray(face).resize((round(0.65 * width), height), Image.Resampling.LANCZOS)
    left = (width - squeezed.width) // 2
    return np.pad(np.asarray(squeezed), ((0, 0), (left, width - squeezed.width - left), (0, 0)), mode="edge")


def _small(face: Pixels, rng: Rng) -> Pixels:
    """24 pixels high, as a face far away."""
    image = Image.fromarray(face)
    small = image.resize((24 * image.width // image.height, 24), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.LANCZOS))


def _moved(face: Pixels, rng: Rng) -> Pixels:
    """Moved by 9 pixels along a line while the shutter was open."""
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
    """Stored as WebP of quality 5."""
    file = io.BytesIO()
    Image.fromarray(face).save(file, "WEBP", quality=5)
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _dark(face: Pixels, rng: Rng) -> Pixels:
    """A quarter of the light, and the noise of a sensor."""
    return _rounded(face / 4 + rng.normal(0, 6, face.shape))


def _sidelit(face: Pixels, rng: Rng) -> Pixels:
    """Under light from one side, which falls from 1.5 to 0.2 across the face."""
    gains = np.linspace(1.5, 0.2, face.shape[1])[:: int(rng.choice((-1, 1)))]
    return _rounded(face * gains[None, :, None])


def _masked(face: Pixels, rng: Rng) -> Pixels:
    """A medical mask over nose and mouth of the ArcFace template."""
    image = Image.fromarray(face)
    outline = [(20, 68), (56, 62), (92, 68), (88, 104), (74, 112), (38, 112), (24, 104)]
    ImageDraw.Draw(image).polygon(outline, fill=(150, 190, 205))
    return np.asarray(image)


def _sunglasses(face: Pixels, rng: Rng) -> Pixels:
    """Dark glasses over the eyes of the ArcFace template."""
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
"""Changes of one face [height, width, 3] by name."""
