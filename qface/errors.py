"""Exceptions of qface; each message is one line that says what is wrong and what to do."""

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


_LONGEST = 2000  # characters of a message


def one_line(error: BaseException, limit: int | None = None) -> str:
    """Return the text of an exception without line breaks and final period, to quote in a message.

    Args:
        error: the exception.
        limit: maximum number of characters; None for all.
    """
    return " ".join(str(error).split())[:limit].rstrip(".")


def _printable(text: str) -> str:
    """Return ``text`` with characters that a terminal does not print, such as line breaks, as escape sequences."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _shortened(text: str) -> str:
    """Return ``text``, or its beginning and its end, which says what to do."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


class QFaceError(Exception):
    """Base class of all qface errors; the command line prints the message and exits with 2.

    Args:
        message: the message. Names in files may contain anything: line breaks and other control characters are
            escaped, and a very long message loses its middle.

    Example:
        >>> try:
        ...     qface.load("nowhere.safetensors")
        ... except qface.QFaceError as error:
        ...     print(type(error).__name__)
        CheckpointError
    """

    def __init__(self, message: str) -> None:
        super().__init__(_shortened(_printable(message)))


class CheckpointError(QFaceError):
    """A model file is missing, damaged, or of the wrong kind."""


class ConfigError(QFaceError):
    """A setting is out of range, or settings contradict each other."""


class DependencyError(QFaceError):
    """A required optional package is not installed."""


class ExportError(QFaceError):
    """A model or another output file cannot be written."""


class ImagesError(QFaceError):
    """A folder, tensor or loader of images is empty, unreadable, or of the wrong size or dtype."""


class LimitError(QFaceError):
    """A file exceeds a limit of :mod:`qface.limits`; the message says how to raise it."""


class PairsError(QFaceError):
    """A list of verification pairs is malformed or names missing images."""


class TraceError(QFaceError):
    """torch.export cannot trace a network, or the traced graph computes different values."""


class TrainingError(QFaceError):
    """Training cannot start or continue: incompatible networks, or a loss that is not finite."""


class UnsupportedLayerError(QFaceError):
    """A network contains an operation that the requested step does not support; the message names it."""
