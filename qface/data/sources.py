"""Conversion of everything accepted as ``images`` (folder, file, tensor, loader) to an image source."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from qface.data.cfp import CfpSplit, is_cfp_split
from qface.data.folders import ImageFolder
from qface.data.images import Images, ImageSource, LoaderImages, TensorImages
from qface.data.records import RecordImages
from qface.data.verification_bin import VerificationBin
from qface.errors import ImagesError

__all__ = ["as_image_source", "source_record"]

_FILES = {".rec": RecordImages, ".bin": VerificationBin}


def as_image_source(images: Images, identities: str | Path | None = None) -> ImageSource:
    """Convert the argument ``images`` of a public function to an :class:`ImageSource`.

    Args:
        images: a folder of 112x112 crops, a ``.rec`` or ``.bin`` file of InsightFace, a split of CFP (its folder
            ``Protocol/Split/FP``), a tensor [N, 3, H, W], a loader, or an :class:`ImageSource`.
        identities: identities to keep from a folder; see :func:`qface.data.select_identities`.

    Returns:
        The image source; an :class:`ImageSource` is returned unchanged.

    Raises:
        ImagesError: the images cannot be used, or ``identities`` are given for images other than a folder.
    """
    if isinstance(images, (str, Path)):
        return _from_path(Path(images), identities)
    if identities is not None:
        raise ImagesError("identities can only be selected from a folder: pass a folder, or no identities")
    if isinstance(images, ImageSource):
        return images
    if isinstance(images, Tensor):
        return TensorImages(images)
    if isinstance(images, Iterable):
        return LoaderImages(images)
    raise ImagesError(f"images must be a folder, a file, a tensor or a loader, got {type(images).__name__}")


def _from_path(path: Path, identities: str | Path | None) -> ImageSource:
    is_folder = os.path.isdir(path)  # Path.is_dir raises for invalid names
    reader = CfpSplit if is_cfp_split(path) else _FILES.get(path.suffix.lower()) if not is_folder else None
    if reader is None:
        return ImageFolder(path, identities=identities)
    if identities is not None:
        raise ImagesError(f"identities can only be selected from a folder, and {path} is not one: pass no identities")
    return reader(path)


def source_record(source: ImageSource) -> dict[str, Any]:
    """Return the name and identities of a folder for the provenance of a model.

    Args:
        source: the images.

    Returns:
        ``folder``: name of the folder without its parents; ``identities``: the selection, if any; ``people``: number
        of identities, if the folder has subfolders. Empty for other sources.

    Example:
        >>> source_record(as_image_source("faces", "first-half"))
        {'folder': 'faces', 'identities': 'first-half', 'people': 6}
    """
    if not isinstance(source, ImageFolder):
        return {}
    selection = None if source.selection is None else _readable(source.selection)
    known = {"folder": _readable(source.root.resolve().name), "identities": selection, "people": source.num_identities}
    return {name: value for name, value in known.items() if value}


def _readable(name: str) -> str:
    """Replace bytes of ``name`` that are not valid UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")
