"""The verb ``align``: a folder of photos becomes a folder of aligned 112x112 crops."""

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

__all__ = ["AlignmentReport", "align"]

_LOGGER = logging.getLogger("qface")

Locate = Callable[[str, Image.Image], Landmarks | None]
"""From a photo's name and pixels to the landmarks of its face."""


@dataclass(frozen=True, repr=False)
class AlignmentReport(Result):
    """The result of :func:`align`, in numbers of photos and their names.

    Args:
        photos: photos found.
        aligned: crops written now.
        present: crops that were there already.
        faceless: photos without a face, or, where landmarks were given, without a line, or with a line that names one
            place five times.
        misplaced: photos whose landmarks are of no face in them, each with the reason
            (:func:`qface.data.alignment.landmark_fault`).
        unreadable: files that are damaged, hold 16-bit gray, or are no JPEG, PNG, BMP, WebP or GIF inside.

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
        """Plain Python values, ready for JSON."""
        return asdict(self)


@shows_progress
def align(
    photos: str | Path,
    crops: str | Path,
    landmarks: str | Path | None = None,
    detector: Detector | str | Path | None = None,
    progress: bool = False,
) -> AlignmentReport:
    """Write an aligned crop of the main face of every photo, as PNG, under the photo's name in the same subfolders.

    A crop that is there already is left as it is, so that a run that was stopped goes on. Photos are turned as their
    camera says.

    Args:
        photos: a folder of photos, with subfolders or not, or links to folders; each folder is read once.
        crops: the folder to write; it is made.
        landmarks: a file of landmarks (:mod:`qface.data.landmarks` says which), by names relative to ``photos``; None
            looks for faces.
        detector: what to look for them with: an object that detects, or an ONNX file of SCRFD or YuNet
            (:func:`qface.data.load_detector`); None takes :func:`qface.data.detection.default_detector`.
        progress: show the stages on stderr.

    Raises:
        ImagesError: there are no photos, a folder of theirs or the landmarks cannot be read, or the landmarks are of
            other photos, or most lines are of no face in their photo.
        ExportError: two photos would give one crop, or crops cannot be written, or would lie among the photos.
        DependencyError: there is nothing to look for faces with.
        CheckpointError: the file of the detector is missing or damaged, or is neither of the two.
        ConfigError: both landmarks and a detector are given.

    Example:
        >>> qface.align("photos", "crops", landmarks="landmarks.txt").aligned
        1
    """
    if landmarks is not None and detector is not None:
        raise ConfigError("landmarks and a detector contradict each other: give one of them")
    photos, crops = Path(photos), Path(crops)
    if _same(photos, crops):
        raise ExportError(f"crops would lie among the photos in {photos}: choose another folder")
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
            _LOGGER.warning("%s is not aligned: its landmarks are of no face in it, since %s", name, reason)
            misplaced.append(f"{name}: {reason}")
        else:
            _write(crop, target)
    aligned = len(missing) - len(faceless) - len(misplaced) - len(unreadable)
    present = len(names) - len(missing)
    return AlignmentReport(len(names), aligned, present, tuple(faceless), tuple(misplaced), tuple(unreadable))


def _crop(photo: Image.Image, points: Landmarks | None) -> Image.Image | None:
    """None where there is no face, which some detectors tell by landmarks in one place."""
    try:
        return None if points is None else align_face(photo, points)
    except ImagesError:
        return None


def _photos(root: Path, crops: Path) -> list[str]:
    """Names of all images below ``root``, relative to it, sorted; without those below ``crops``."""
    if not os.path.isdir(root):  # unlike Path.is_dir, False for names that no folder can have
        raise ImagesError(f"{root} is no folder: pass a folder of photos")
    files = list(_files(root, crops))
    names = sorted(path.relative_to(root).as_posix() for path in files if path.suffix.lower() in EXTENSIONS)
    if not names:
        raise ImagesError(f"{root} holds no photos: expected files that end in {', '.join(sorted(EXTENSIONS))}")
    warn_of_others(root, [path for path in files if path.suffix.lower() not in EXTENSIONS])
    return names


def _files(root: Path, left_out: Path) -> Iterator[Path]:
    """The files below ``root`` and behind its links, each folder once: loops end, and own names go before links."""
    seen = {_identity(left_out)} if os.path.isdir(left_out) else set()
    starts = [root]
    for start in starts:  # links that are met come after all else
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
    """Device and inode of a folder, the same under all its names."""
    try:
        status = folder.stat()
    except OSError as error:
        _refuse(error)
    return status.st_dev, status.st_ino


def _same(one: Path, other: Path) -> bool:
    return os.path.exists(one) and os.path.exists(other) and one.samefile(other)


def _refuse(error: OSError) -> NoReturn:
    raise ImagesError(
        f"{error.filename} cannot be read ({error.strerror}): give yourself the right to, or move it away"
    )


def _targets(names: list[str], crops: Path) -> dict[str, Path]:
    """The crop of each photo."""
    targets = {name: (crops / name).with_suffix(".png") for name in names}
    photo_of: dict[Path, str] = {}
    for name, target in targets.items():
        if target in photo_of:
            raise ExportError(f"{photo_of[target]} and {name} would both become {target}: rename one of them")
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
    """The landmarks of each photo that has a line."""
    photos = {composed(name): name for name in names}
    faces = read_landmarks(landmarks)
    known = {name: face.points for face in faces if (name := _photo_of(face.file, photos)) is not None}
    if not known:
        raise ImagesError(
            f"no line of {landmarks} is of a photo (first line: {faces[0].file}, first photo: {names[0]}): "
            "name photos as they lie below their folder"
        )
    check_landmarks(landmarks, known)
    return known


def _photo_of(file: str, photos: Mapping[str, str]) -> str | None:
    """The one of ``photos``, by their composed names, that a line calls ``file``.

    As it stands goes first, since names may hold backslashes.
    """
    file = composed(file)
    spellings = (file, posixpath.normpath(file), posixpath.normpath(file.replace("\\", "/")))
    return next((photos[name] for name in spellings if name in photos), None)


def _write(crop: Image.Image, target: Path) -> None:
    make_folder(target.parent)
    with replacing(target) as temporary:
        crop.save(temporary, format="PNG")
