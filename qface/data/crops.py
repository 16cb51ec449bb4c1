"""The verb ``align``: write an aligned 112x112 crop for each photo in a folder."""

from __future__ import annotations

import logging
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from qface.data.alignment import Landmarks, align_face, landmark_fault
from qface.data.decoding import UNREADABLE, opened, upright
from qface.data.detection import Detector, default_detector, main_face
from qface.data.detector_files import load_detector
from qface.data.folders import EXTENSIONS, warn_of_others
from qface.data.identities import composed
from qface.data.landmarks import check_landmarks, read_landmarks
from qface.errors import ConfigError, ExportError, ImagesError, LimitError
from qface.files import make_folder, replacing
from qface.progress import shows_progress, track
from qface.results import Result

__all__ = ["AlignmentReport", "align", "write_crop"]

_LOGGER = logging.getLogger("qface")

Locate = Callable[[str, Image.Image], Landmarks | None]
"""Return the landmarks of the face in a photo, given its name and pixels; None without a face."""


@dataclass(frozen=True, repr=False)
class AlignmentReport(Result):
    """Counts and file names that :func:`align` returns.

    Args:
        photos: number of photos found.
        aligned: number of crops written by this run.
        present: number of crops that existed before.
        faceless: photos without a face. With a landmark file: photos that it does not list, or lists with five equal
            points.
        misplaced: photos whose landmarks cannot be a face, each with the reason
            (:func:`qface.data.alignment.landmark_fault`).
        unreadable: files that are damaged, 16-bit grayscale, or not JPEG, PNG, BMP, WebP or GIF by content.

    Example:
        >>> qface.align("photos", "crops", landmarks="landmarks.txt").unreadable
        ()
    """

    photos: int
    aligned: int
    present: int
    faceless: tuple[str, ...]
    misplaced: tuple[str, ...]
    unreadable: tuple[str, ...]

    def _key_figures(self) -> Mapping[str, object]:
        return {"photos": self.photos, "aligned": self.aligned, "present": self.present}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain Python values for JSON."""
        return asdict(self)


@shows_progress
def align(
    photos: str | Path,
    crops: str | Path,
    landmarks: str | Path | None = None,
    detector: Detector | str | Path | None = None,
    progress: bool = False,
) -> AlignmentReport:
    """Write a 112x112 PNG crop of the main face of each photo, aligned to the ArcFace template.

    A crop keeps the subfolder and name of its photo. Crops that already exist are skipped, so an interrupted run can
    be repeated. Photos are rotated by their EXIF orientation first.

    Args:
        photos: folder of photos; subfolders and links to folders are included, each folder once.
        crops: output folder; created if missing.
        landmarks: file with five landmarks per photo, named relative to ``photos``, in one of the formats of
            :mod:`qface.data.landmarks`; None detects faces.
        detector: a face detector, or the path of an SCRFD or YuNet ONNX file (:func:`qface.data.load_detector`); None
            uses :func:`qface.data.detection.default_detector`.
        progress: True to show progress on stderr.

    Returns:
        The number of crops written, and the photos that gave none.

    Raises:
        ImagesError: there are no photos; a folder or the landmark file cannot be read; or the landmark file names
            other photos, or most of its landmarks cannot be faces.
        ExportError: a crop cannot be written, two photos have the same crop path, or ``crops`` is ``photos``.
        DependencyError: no detector is installed.
        CheckpointError: the detector file is missing, damaged, or neither SCRFD nor YuNet.
        ConfigError: both ``landmarks`` and ``detector`` are given.

    Example:
        >>> qface.align("photos", "crops", landmarks="landmarks.txt").aligned
        1
    """
    if landmarks is not None and detector is not None:
        raise ConfigError("landmarks and detector exclude each other: pass only one of them")
    photos, crops = Path(photos), Path(crops)
    if _same(photos, crops):
        raise ExportError(f"crops cannot be written into the folder of the photos, {photos}: choose another folder")
    names = _photos(photos, crops)
    targets = _targets(names, crops)
    missing = {name: target for name, target in targets.items() if not os.path.exists(target)}
    locate = _locator(names, landmarks, detector) if missing else None
    faceless: list[str] = []
    misplaced: list[str] = []
    unreadable: list[str] = []
    for name, target in track(missing.items(), "align"):
        assert locate is not None
        try:
            with opened(photos / name) as file:
                photo = upright(file)
        except LimitError as error:
            _LOGGER.warning("%s is not aligned: %s", name, error)
            unreadable.append(name)
            continue
        except UNREADABLE:
            unreadable.append(name)
            continue
        points = locate(name, photo)
        crop = _crop(photo, points)
        if points is None or crop is None:
            faceless.append(name)
        elif reason := landmark_fault(points, photo.size):
            _LOGGER.warning("%s is not aligned: its landmarks are not a face: %s", name, reason)
            misplaced.append(f"{name}: {reason}")
        else:
            write_crop(crop, target)
    aligned = len(missing) - len(faceless) - len(misplaced) - len(unreadable)
    present = len(names) - len(missing)
    return AlignmentReport(len(names), aligned, present, tuple(faceless), tuple(misplaced), tuple(unreadable))


def _crop(photo: Image.Image, points: Landmarks | None) -> Image.Image | None:
    """Return the aligned crop; None without a face, which some detectors report as five equal points."""
    try:
        return None if points is None else align_face(photo, points)
    except ImagesError:
        return None


def _photos(root: Path, crops: Path) -> list[str]:
    """Return the sorted paths of all images under ``root``, relative to it, except those under ``crops``."""
    if not os.path.isdir(root):  # Path.is_dir raises for invalid names
        raise ImagesError(f"{root} is not a folder: pass a folder of photos")
    files = list(_files(root, crops))
    names = sorted(path.relative_to(root).as_posix() for path in files if path.suffix.lower() in EXTENSIONS)
    if not names:
        raise ImagesError(f"{root} has no photos: expected files ending in {', '.join(sorted(EXTENSIONS))}")
    warn_of_others(root, [path for path in files if path.suffix.lower() not in EXTENSIONS])
    return names


def _files(root: Path, left_out: Path) -> Iterator[Path]:
    """Yield the files under ``root``, following links; each folder once, so that link loops end."""
    seen = {_identity(left_out)} if os.path.isdir(left_out) else set()
    starts = [root]
    for start in starts:  # links are followed last, so that a folder keeps its own name
        for text, folders, files in os.walk(start, onerror=_refuse):
            folder = Path(text)
            if _identity(folder) in seen:
                folders.clear()
                continue
            seen.add(_identity(folder))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            starts += [folder / name for name in folders if os.path.islink(folder / name)]
            yield from (folder / name for name in files if not name.startswith("."))


def _identity(folder: Path) -> tuple[int, int]:
    """Return the device and inode of ``folder``, which are equal under all its names."""
    try:
        status = folder.stat()
    except OSError as error:
        _refuse(error)
    return status.st_dev, status.st_ino


def _same(one: Path, other: Path) -> bool:
    return os.path.exists(one) and os.path.exists(other) and one.samefile(other)


def _refuse(error: OSError) -> NoReturn:
    raise ImagesError(f"{error.filename} cannot be read ({error.strerror}): fix its permissions, or move it away")


def _targets(names: list[str], crops: Path) -> dict[str, Path]:
    """Return the crop path of each photo."""
    targets = {name: (crops / name).with_suffix(".png") for name in names}
    photo_of: dict[Path, str] = {}
    for name, target in targets.items():
        if target in photo_of:
            raise ExportError(f"{photo_of[target]} and {name} would both be written to {target}: rename one of them")
        photo_of[target] = name
    return targets


def _locator(names: list[str], landmarks: str | Path | None, detector: Detector | str | Path | None) -> Locate:
    if landmarks is not None:
        known = _points_of(names, landmarks)
        return lambda name, photo: known.get(name)
    chosen = _detector(detector)
    return lambda name, photo: main_face(chosen, photo)


def _detector(given: Detector | str | Path | None) -> Detector:
    if given is None:
        return default_detector()
    return load_detector(given) if isinstance(given, (str, Path)) else given


def _points_of(names: list[str], landmarks: str | Path) -> dict[str, Landmarks]:
    """Return the landmarks of each photo that the file lists."""
    photos = {composed(name): name for name in names}
    faces = read_landmarks(landmarks)
    known = {name: face.points for face in faces if (name := _photo_of(face.file, photos)) is not None}
    if not known:
        raise ImagesError(
            f"{landmarks} lists none of the photos (first line: {faces[0].file}, first photo: {names[0]}): "
            "write paths relative to the folder of photos"
        )
    check_landmarks(landmarks, known)
    return known


def _photo_of(file: str, photos: Mapping[str, str]) -> str | None:
    """Return the photo that a landmark line names ``file``; ``photos`` maps NFC names to photos."""
    file = composed(file)  # the literal spelling is tried first, since file names may contain backslashes
    spellings = (file, posixpath.normpath(file), posixpath.normpath(file.replace("\\", "/")))
    return next((photos[name] for name in spellings if name in photos), None)


def write_crop(crop: Image.Image, target: Path) -> None:
    """Write ``crop`` as a PNG file, in a folder that is created if missing.

    Raises:
        ExportError: the file cannot be written.
    """
    make_folder(target.parent)
    with replacing(target) as temporary:
        crop.save(temporary, format="PNG")
