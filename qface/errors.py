"""Every error that qface raises on purpose. Each message is one line: what is wrong, and what to do about it."""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DependencyError",
    "ExportError",
    "ImagesError",
    "LimitError",
    "PairsError",
    "QFaceError",
    "TraceError",
    "TrainingError",
    "UnsupportedLayerError",
    "one_line",
]


def one_line(error: BaseException, limit: int | None = None) -> str:
    """The text of somebody else's error, to be quoted within a line of ours: no line breaks, no full stop at its end.

    Args:
        error: what was caught.
        limit: characters to keep; None keeps all.
    """
    return " ".join(str(error).split())[:limit].rstrip(".")


class QFaceError(Exception):
    """Base of all errors of this package; the command line prints it and exits with 2.

    Example:
        >>> try:
        ...     qface.load("nowhere.safetensors")
        ... except qface.QFaceError as error:
        ...     print(type(error).__name__)
        CheckpointError
    """


class CheckpointError(QFaceError):
    """A model file cannot be read, is damaged, or holds something else than was asked for."""


class ConfigError(QFaceError):
    """A setting is out of its range, or settings contradict each other."""


class DependencyError(QFaceError):
    """An optional package is needed for what was asked and is not installed."""


class ExportError(QFaceError):
    """A model cannot be written in the wanted form."""


class ImagesError(QFaceError):
    """A folder, tensor or loader of images is empty, unreadable or of the wrong size or type."""


class LimitError(QFaceError):
    """A file asks for more memory, depth or time than :mod:`qface.limits` allows; the message says how to raise it."""


class PairsError(QFaceError):
    """A list of verification pairs is malformed or names images that are not there."""


class TraceError(QFaceError):
    """torch.export cannot follow a network, or its captured form computes something else."""


class TrainingError(QFaceError):
    """Training cannot start or go on: incompatible networks, or a loss that is not finite."""


class UnsupportedLayerError(QFaceError):
    """A network contains an operation that the requested step cannot represent; the message names it."""
