"""One view of everything the API accepts as ``images``: a folder, a file, a tensor, or a loader."""

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
    """Turn whatever a user passed as ``images`` into an :class:`ImageSource`.

    Args:
        images: a folder of 112x112 crops, a ``.rec`` or ``.bin`` file of InsightFace, a split of CFP (its folder
            ``Protocol/Split/FP``), a tensor [N, 3, H, W], a loader, or an :class:`ImageSource`.
        identities: for a folder, which identities to keep; see :class:`qface.data.folders.ImageFolder`.

    Raises:
        ImagesError: the images cannot be used, or ``identities`` are given for something that has no names.
    """
    if isinstance(images, (str, Path)):
        return _from_path(Path(images), identities)
    if identities is not None:
        raise ImagesError("people can be selected from a folder only, since other images carry no names")
    if isinstance(images, ImageSource):
        return images
    if isinstance(images, Tensor):
        return TensorImages(images)
    if isinstance(images, Iterable):
        return LoaderImages(images)
    raise ImagesError(f"images are a folder, a tensor or a loader, not {type(images).__name__}")


def _from_path(path: Path, identities: str | Path | None) -> ImageSource:
    is_folder = os.path.isdir(path)  # unlike Path.is_dir, False for names that no folder can have
    reader = CfpSplit if is_cfp_split(path) else _FILES.get(path.suffix.lower()) if not is_folder else None
    if reader is None:
        return ImageFolder(path, identities=identities)
    if identities is not None:
        raise ImagesError(f"people can be selected from a folder only; {path} carries no names")
    return reader(path)


def source_record(source: ImageSource) -> dict[str, Any]:
    """The record of ``source`` for provenance, besides the number of images: of a folder, its name and whom it shows.

    Args:
        source: the images.

    Returns:
        Of a folder ``folder``, its name without the folders that it lies in; ``identities``, the selection where there
        is one; and ``people``, how many are shown, where it has one subfolder a person. Empty for other sources.

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
    """``name`` without bytes that are no text, which no file in UTF-8 could hold."""
    return os.fsencode(name).decode("utf-8", "replace")
