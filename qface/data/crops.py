"""The verb ``align``: a folder of photos becomes a folder of aligned 112x112 crops."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from qface.data.alignment import Landmarks
from qface.data.alignment import align as align_face
from qface.data.decoding import UNREADABLE, opened
from qface.data.detection import Detector, default_detector, main_face
from qface.data.folders import EXTENSIONS
from qface.data.landmarks import read_landmarks
from qface.errors import ExportError, ImagesError
from qface.files import make_folder, replacing
from qface.progress import track

__all__ = ["AlignmentReport", "align"]

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a photo upright, by EXIF's orientation."""

Locate = Callable[[str, Image.Image], Landmarks | None]
"""From a photo's name and pixels to the landmarks of its face."""


@dataclass(frozen=True)
class AlignmentReport:
    """What :func:`align` did, in numbers of photos and their names.

    Args:
        photos: photos found.
        aligned: crops written now.
        present: crops that were there already.
        faceless: photos without a face, or, where landmarks were given, without a line, or with a line that names one
            place five times.
        unreadable: files that are no images of 8 bits a channel.
    """

    photos: int
    aligned: int
    present: int
    faceless: tuple[str, ...]
    unreadable: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return asdict(self)


def align(
    photos: str | Path,
    crops: str | Path,
    landmarks: str | Path | None = None,
    detector: Detector | None = None,
    progress: bool = False,
) -> AlignmentReport:
    """Write an aligned crop of the main face of every photo, as PNG, under the photo's name in the same subfolders.

    A crop that is there already is left as it is, so that a run that was stopped goes on. Photos are turned as their
    camera says.

    Args:
        photos: a folder of photos, with subfolders or not.
        crops: the folder to write; it is made.
        landmarks: a file of landmarks (:func:`qface.data.read_landmarks`), by names relative to ``photos``; None
            looks for faces.
        detector: what to look for them with; None takes :func:`qface.data.detection.default_detector`.
        progress: show a bar on stderr.

    Raises:
        ImagesError: there are no photos, or a folder of theirs or the landmarks cannot be read.
        ExportError: two photos would give one crop, or crops cannot be written, or would lie among the photos.
        DependencyError: there is nothing to look for faces with.
    """
    photos, crops = Path(photos), Path(crops)
    if _same(photos, crops):
        raise ExportError(f"crops would lie among the photos in {photos}: choose another folder")
    names = _photos(photos, crops)
    targets = _targets(names, crops)
    missing = {name: target for name, target in targets.items() if not target.exists()}
    locate = _locator(landmarks, detector) if missing else None
    faceless, unreadable = [], []
    for name, target in track(missing.items(), "align", progress, len(missing)):
        assert locate is not None
        try:
            photo = _upright(photos / name)
        except UNREADABLE:
            unreadable.append(name)
            continue
        crop = _crop(photo, locate(name, photo))
        if crop is None:
            faceless.append(name)
        else:
            _write(crop, target)
    aligned = len(missing) - len(faceless) - len(unreadable)
    return AlignmentReport(len(names), aligned, len(names) - len(missing), tuple(faceless), tuple(unreadable))


def _upright(path: Path) -> Image.Image:
    """The photo at ``path`` in RGB, turned as its camera says.

    Raises:
        ValueError: it has more than 8 bits a channel. Damage raises what :data:`UNREADABLE` lists.
    """
    with opened(path) as photo:
        turn = _TURNS.get(_orientation(photo))
        return (photo if turn is None else photo.transpose(turn)).convert("RGB")


def _orientation(photo: Image.Image) -> Any:
    try:
        return photo.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever Pillow raises for tags that are damaged: the pixels may be well
        return None


def _crop(photo: Image.Image, points: Landmarks | None) -> Image.Image | None:
    """None where there is no face, which some detectors tell by landmarks in one place."""
    try:
        return None if points is None else align_face(photo, points)
    except ImagesError:
        return None


def _photos(root: Path, crops: Path) -> list[str]:
    """Names of all images below ``root``, relative to it, sorted; without those below ``crops``."""
    if not root.is_dir():
        raise ImagesError(f"{root} is no folder: pass a folder of photos")
    names = sorted(
        path.relative_to(root).as_posix() for path in _files(root, crops) if path.suffix.lower() in EXTENSIONS
    )
    if not names:
        raise ImagesError(f"{root} holds no photos: expected files that end in {', '.join(sorted(EXTENSIONS))}")
    return names


def _files(root: Path, left_out: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and not _same(Path(folder) / name, left_out)]
        yield from (Path(folder) / name for name in files if not name.startswith("."))


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _refuse(error: OSError) -> None:
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


def _locator(landmarks: str | Path | None, detector: Detector | None) -> Locate:
    if landmarks is not None:
        known: Mapping[str, Landmarks] = {face.file: face.points for face in read_landmarks(landmarks)}
        return lambda name, photo: known.get(name)
    found = default_detector() if detector is None else detector
    return lambda name, photo: main_face(found, photo)


def _write(crop: Image.Image, target: Path) -> None:
    make_folder(target.parent)
    with replacing(target) as temporary:
        crop.save(temporary, format="PNG")
