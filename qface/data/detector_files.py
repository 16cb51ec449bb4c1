"""Face detectors from published ONNX files: SCRFD and YuNet (extra ``qface[align]``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qface.data.detection import Detector
from qface.errors import CheckpointError, DependencyError, QFaceError, one_line

__all__ = ["DetectedFace", "load_detector"]

_SIDE = 640  # pixels; the image size of both detectors' training
_MIN_SCORE = 0.5
_MAX_OVERLAP = 0.4  # IoU threshold of non-maximum suppression
_STRIDES = (8, 16, 32)
_SCRFD_ANCHORS = 2  # per cell
_SCRFD_WIDTHS = (1, 1, 1, 4, 4, 4, 10, 10, 10)  # last dimension of scores, boxes and landmarks at the three strides
_YUNET_OUTPUTS = {f"{kind}_{stride}" for kind in ("cls", "obj", "bbox", "kps") for stride in _STRIDES}

Pixels = npt.NDArray[np.uint8]
"""uint8 [H, W, 3], BGR."""


@dataclass(frozen=True, eq=False)
class DetectedFace:
    """Detected face in a photo.

    Args:
        bbox: float64 [4]: x1, y1, x2, y2 in pixels of the photo.
        landmarks: float64 [5, 2]; see :data:`qface.data.alignment.Landmarks`.
    """

    bbox: npt.NDArray[np.float64]
    landmarks: npt.NDArray[np.float64]


def load_detector(path: str | Path) -> Detector:
    """Load a face detector from an ONNX file; the type is recognized by its outputs.

    Args:
        path: SCRFD with landmarks, as published by InsightFace (``scrfd_*_kps.onnx``, ``scrfd_*_bnkps.onnx``,
            ``det_*.onnx``), or YuNet, as published by OpenCV since 2023 (``face_detection_yunet_2023mar.onnx``).

    Returns:
        A detector to pass to :func:`qface.align`.

    Raises:
        CheckpointError: the file is missing, damaged, or neither SCRFD nor YuNet.
        LimitError: the file exceeds a limit of :mod:`qface.limits`.
        DependencyError: OpenCV is not installed.
    """
    path = Path(path)
    session = _session(path)
    if {output.name for output in session.get_outputs()} == _YUNET_OUTPUTS:
        return _YuNet(path)
    if _is_scrfd(session):
        return _Scrfd(path, session)
    outputs = ", ".join(f"{output.name} {output.shape}" for output in session.get_outputs())
    raise CheckpointError(
        f"{path} is not a supported detector (its outputs: {outputs}): pass SCRFD with landmarks (9 outputs) or YuNet "
        "of 2023 or later (12 outputs)"
    )


class _Scrfd:
    """SCRFD (Guo et al., Sample and computation redistribution for efficient face detection, ICLR 2022).

    uniface's SCRFD class cannot be used: it takes no file, passes BGR instead of RGB, and fails on outputs with a
    batch dimension.

    Args:
        path: the file, for messages.
        session: its ``onnxruntime.InferenceSession``.
    """

    def __init__(self, path: Path, session: Any) -> None:
        self._path, self._session = path, session
        self._opencv = _opencv()
        (image,) = session.get_inputs()
        self._name = image.name
        self._height, self._width = (side if isinstance(side, int) else _SIDE for side in image.shape[2:])

    def detect(self, image: Pixels, /) -> list[DetectedFace]:
        """Return the faces in ``image``."""
        factor = min(self._height / image.shape[0], self._width / image.shape[1])
        filled = _fitted(self._opencv, image, factor, self._height, self._width)
        blob = self._opencv.dnn.blobFromImage(filled, 1 / 128, mean=(127.5, 127.5, 127.5), swapRB=True)
        with _telling(self._path):
            rows = _decoded(self._session.run(None, {self._name: blob}), self._height, self._width)
        boxes = np.column_stack([rows[:, 1:3], rows[:, 3:5] - rows[:, 1:3]])  # x, y, width, height
        kept = self._opencv.dnn.NMSBoxes(boxes.tolist(), rows[:, 0].tolist(), _MIN_SCORE, _MAX_OVERLAP)
        return [DetectedFace(row[1:5], row[5:].reshape(5, 2)) for row in rows[np.array(kept, int)] / factor]


class _YuNet:
    """YuNet (Wu et al., YuNet: a tiny millisecond-level face detector, MIR 2023) in OpenCV."""

    def __init__(self, path: Path) -> None:
        self._path, self._opencv = path, _opencv()
        with _telling(path):
            self._network = self._opencv.FaceDetectorYN.create(str(path), "", (_SIDE, _SIDE), _MIN_SCORE, _MAX_OVERLAP)

    def detect(self, image: Pixels, /) -> list[DetectedFace]:
        """Return the faces in ``image``."""
        factor = min(1.0, _SIDE / max(image.shape[:2]))
        # OpenCV 4 detects faces in uninitialized memory if a side is shorter than about 40 pixels, so it is padded.
        filled = _fitted(self._opencv, image, factor, _SIDE, _SIDE)
        with _telling(self._path):
            _, rows = self._network.detect(filled)
        faces = np.empty((0, 15)) if rows is None else np.asarray(rows, np.float64) / factor
        return [DetectedFace(np.concatenate([row[:2], row[:2] + row[2:4]]), row[4:14].reshape(5, 2)) for row in faces]


def _session(path: Path) -> Any:
    # Imported late, since both packages import qface.data.
    from qface.deployment.runtime import cpu_session
    from qface.models.onnx_import.onnx_file import check_onnx

    check_onnx(path)  # onnxruntime would run any content of the file
    with _telling(path):
        return cpu_session(path.read_bytes())


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Turn exceptions of the runtime into a CheckpointError that names the file."""
    try:
        yield
    except QFaceError:
        raise
    except Exception as error:  # exceptions of onnxruntime and OpenCV have no common base class
        raise CheckpointError(f"{path} cannot run as a detector ({one_line(error, 200)}): download it again") from error


def _opencv() -> Any:
    try:
        return import_module("cv2")
    except ImportError as error:
        raise DependencyError(
            "a detector file needs OpenCV: pip install 'qface[align]', or pass a landmark file"
        ) from error


def _is_scrfd(session: Any) -> bool:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if [(each.type, len(each.shape)) for each in inputs] != [("tensor(float)", 4)] or len(outputs) != 9:
        return False
    return all(_may_have(output.shape, width) for output, width in zip(outputs, _SCRFD_WIDTHS, strict=True))


def _may_have(shape: Sequence[int | str | None], width: int) -> bool:
    """True if ``shape`` can be [rows, width] or [batch, rows, width]; symbolic sizes match any number."""
    return len(shape) in (2, 3) and (shape[-1] == width or not isinstance(shape[-1], int))


def _decoded(outputs: Sequence[npt.NDArray[np.float32]], height: int, width: int) -> npt.NDArray[np.float64]:
    """Decode SCRFD's outputs to faces above the minimum score, before non-maximum suppression.

    Returns:
        float64 [faces, 15]: score, x1, y1, x2, y2 and five landmarks, in pixels of the network's input.
    """
    rows = []
    for stride, score, box, points in zip(_STRIDES, outputs[:3], outputs[3:6], outputs[6:], strict=True):
        cells = np.indices((height // stride, width // stride))[::-1].reshape(2, -1).T
        centers = stride * np.repeat(cells, _SCRFD_ANCHORS, axis=0)
        left, right = np.split(stride * box.reshape(-1, 4), 2, axis=1)
        landmarks = np.tile(centers, 5) + stride * points.reshape(-1, 10)
        level = np.column_stack([score.ravel(), centers - left, centers + right, landmarks])
        rows.append(level[level[:, 0] > _MIN_SCORE])
    return np.concatenate(rows).astype(np.float64)


def _fitted(opencv: Any, image: Pixels, factor: float, height: int, width: int) -> Pixels:
    """Scale ``image`` by ``factor`` and pad it with black at the right and bottom to [height, width, 3]."""
    size = [max(1, int(side * factor)) for side in image.shape[1::-1]]
    below, beside = height - size[1], width - size[0]
    scaled = opencv.resize(image, size)
    return np.asarray(opencv.copyMakeBorder(scaled, 0, below, 0, beside, opencv.BORDER_CONSTANT), np.uint8)
