"""Folders of aligned face crops, flat or with one subfolder per identity."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from qface.data.decoding import UNREADABLE, decode, size_of
from qface.data.identities import composed, select_identities
from qface.data.images import IndexedImages, named_content
from qface.errors import ImagesError
from qface.preprocessing import CROP_SIZE

__all__ = ["EXTENSIONS", "ImageFolder", "not_allowed", "warn_of_others"]

_LOGGER = logging.getLogger("qface")

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
"""Extensions of image files, compared in lower case."""

ResultT = TypeVar("ResultT")


class ImageFolder(IndexedImages):
    """Folder of 112x112 crops: ``root/<identity>/*`` with labels, or flat ``root/*`` without.

    Hidden files are ignored; other files without one of :data:`EXTENSIONS` are ignored with a warning. All file headers
    are checked at once, so a wrong folder fails early; damaged pixels are found when an image is read.

    Args:
        root: the folder.
        identities: identities to keep; see :func:`qface.data.select_identities`.

    Attributes:
        root: the folder.
        paths: the images, sorted by identity, then by file name.
        labels: int64 [len(paths)], index into ``names``; None for a flat folder.
        names: the kept identities, sorted; empty for a flat folder.
        all_names: all identities on disk, sorted.
        selection: ``"first-half"``, ``"second-half"`` or the name of the file with the kept identities; None for all.

    Raises:
        ImagesError: the folder is missing, empty or mixes both layouts; ``identities`` do not match it; or images are
            unreadable or not 112x112.
    """

    def __init__(self, root: str | Path, identities: str | Path | None = None) -> None:
        self.root = Path(root)
        self.selection = None if identities is None else Path(identities).name
        loose, persons = _scan(self.root)
        if identities is not None and not persons:
            raise ImagesError(f"identities cannot be selected from {self.root}: it has no subfolders per identity")
        self.all_names = sorted(persons, key=composed)
        self.names = select_identities(self.all_names, identities) if persons else []
        self.paths = loose or [path for name in self.names for path in persons[name]]
        self.labels = _labels([len(persons[name]) for name in self.names]) if persons else None
        self._check_headers()

    @property
    def num_identities(self) -> int:
        """Number of kept identities; 0 for a flat folder."""
        return len(self.names)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Decode the images at ``indices`` to uint8 [len(indices), 3, 112, 112] in RGB.

        Raises:
            ImagesError: images are damaged; the message counts them.
        """
        pixels = np.empty((len(indices), CROP_SIZE, CROP_SIZE, 3), dtype=np.uint8)
        for position, index in enumerate(indices):
            try:
                pixels[position] = decode(self.paths[index])
            except UNREADABLE as error:
                wanted = [self.paths[index] for index in indices]
                damaged = [path for path in wanted if _attempt(decode, path) is None]
                raise ImagesError(self._unreadable(damaged or [self.paths[index]], len(wanted))) from error
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def content(self, index: int) -> bytes:
        """Return name and bytes of the file at ``index``.

        Raises:
            ImagesError: it cannot be read.
        """
        return named_content(self.paths[index], composed(self._relative(self.paths[index])))

    def _check_headers(self) -> None:
        sizes = [(path, _attempt(size_of, path)) for path in self.paths]
        unreadable = [path for path, size in sizes if size is None]
        misfits = [(path, size) for path, size in sizes if size is not None and size != (CROP_SIZE, CROP_SIZE)]
        complaints = []
        if unreadable:
            complaints.append(self._unreadable(unreadable, len(self)))
        if misfits:
            path, (width, height) = misfits[0]
            complaints.append(
                f"{len(misfits)} of {len(self)} images in {self.root} are not {CROP_SIZE}x{CROP_SIZE} "
                f"(first: {self._relative(path)} is {width}x{height}): align and crop them first"
            )
        if complaints:
            raise ImagesError("; ".join(complaints))

    def _unreadable(self, paths: Sequence[Path], of: int) -> str:
        return (
            f"{len(paths)} of {of} files in {self.root} cannot be read as images "
            f"(first: {self._relative(paths[0])}): remove or repair them"
        )

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _scan(root: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """Return the images directly in ``root`` and those of its subfolders by name; one of both is empty."""
    if not os.path.isdir(root):  # Path.is_dir raises for invalid names
        raise ImagesError(f"{root} is not a folder: pass a folder of {CROP_SIZE}x{CROP_SIZE} face crops")
    try:
        with os.scandir(root) as entries:
            folders = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        loose, others = _images_in(root)
        found = {name: _images_in(root / name) for name in folders}
    except OSError as error:
        raise not_allowed(error) from error
    persons = {name: images for name, (images, _) in found.items() if images}
    others += [path for _, passed_over in found.values() for path in passed_over]
    gone = sorted(name for name, (images, passed_over) in found.items() if passed_over and not images)
    if loose and persons:
        raise ImagesError(
            f"{root} has both {len(loose)} images (first: {loose[0].name}) and {len(persons)} subfolders of images: "
            "keep one layout"
        )
    if not loose and not persons:
        raise ImagesError(
            f"{root} has no images: expected <identity>/<image> or <image>, ending in {', '.join(sorted(EXTENSIONS))}"
        )
    warn_of_others(root, others, gone)
    return loose, persons


def warn_of_others(root: Path, others: Sequence[Path], gone: Sequence[str] = ()) -> None:
    """Warn about ignored files under ``root``, and about identities ``gone`` that have no other files."""
    if not others:
        return
    people = f"; {len(gone)} identities have no image and are ignored (first: {gone[0]})" if gone else ""
    _LOGGER.warning(
        "%s: %d files are not in a supported image format and are ignored (first: %s)%s: convert them to JPEG or PNG",
        root,
        len(others),
        min(path.relative_to(root).as_posix() for path in others),
        people,
    )


def not_allowed(error: OSError) -> ImagesError:
    """Return the error for a folder that cannot be read."""
    return ImagesError(f"{error.filename} cannot be read ({error.strerror}): fix its permissions")


def _images_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the sorted images of ``folder`` and its other files, without hidden files."""
    with os.scandir(folder) as entries:
        files = [folder / entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    images = [file for file in files if _is_image(file)]
    return sorted(images, key=lambda path: composed(path.name)), [file for file in files if not _is_image(file)]


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in EXTENSIONS


def _labels(counts: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def _attempt(reader: Callable[[Path], ResultT], path: Path) -> ResultT | None:
    try:
        return reader(path)
    except UNREADABLE:
        return None
