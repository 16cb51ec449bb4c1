"""Writing files so that nothing is lost: a new file appears whole, under its name, or not at all."""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from qface.errors import CheckpointError, ConfigError, ExportError, one_line

try:
    import fcntl
except ModuleNotFoundError:  # Windows, which removes no file that is open
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone_in", "as_path", "check_file", "check_folder", "make_folder", "replacing", "sync", "temporary_folder"]

_PREFIX, _SUFFIX = ".qface-", ".part"
_LOCK = ".lock"

_LONGEST_NAME = 255  # bytes, on the file systems of Linux, macOS and Windows


def as_path(path: str | Path) -> Path:
    """Return ``path`` as a path.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"a file or folder is given by its path, not by {type(path).__name__}")
    return Path(path)


def check_file(path: str | Path) -> None:
    """Make sure that ``path`` is a file, before it is read as a network.

    Raises:
        CheckpointError: nothing is there, or a folder.
        ConfigError: ``path`` is no path.
    """
    path = as_path(path)
    if os.path.isdir(path):
        raise CheckpointError(f"{path} is a folder; give the file of a network")
    if not os.path.isfile(path):  # unlike Path.is_file, False for names that no file can have
        raise CheckpointError(f"there is no file {path}; check the path")


def check_folder(path: str | Path) -> None:
    """Make sure, before long work, that ``path`` can be written at its end.

    Raises:
        ExportError: its folder does not exist or cannot be written to, its name is too long, or it is something else
            than a file.
    """
    _check_replaceable(Path(path))
    folder = Path(path).parent
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ExportError(
            f"cannot write {path}: {folder} is no folder that can be written to; choose another or make it"
        )
    if len(os.fsencode(Path(path).name)) > _LONGEST_NAME:
        raise ExportError(f"cannot write {path}: its name has more than {_LONGEST_NAME} bytes; choose a shorter one")


def make_folder(path: str | Path) -> None:
    """Make the folder ``path``, with those that it lies in, where it does not exist.

    Raises:
        ExportError: it cannot be made, or is something else.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"cannot make the folder {path}: {error.strerror or error}; choose another") from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes the place of ``path``, on failure it is removed.

    A link stays, and the file that it points to is replaced. Content and name are on the disk when this returns. What
    a process that was killed left in the folder is removed.

    Raises:
        ExportError: the folder does not exist or cannot be written to, the disk is full, or ``path`` is something else
            than a file.
    """
    _check_replaceable(Path(path))
    path = Path(os.path.realpath(path))
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(_temporary(path.parent, _make_file))
        except OSError as error:
            raise ExportError(f"cannot write {path}: {error.strerror or error}; choose a folder that exists") from error
        try:
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())
            sync(temporary)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except OSError as error:
            raise ExportError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield an empty folder among the temporary ones of the system; it is removed at the end.

    What a process that was killed left there is removed too.

    Raises:
        ExportError: none can be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(_temporary(Path(tempfile.gettempdir()), _make_private_folder))
        except OSError as error:
            raise ExportError(
                f"cannot make a temporary folder ({one_line(error)}): set TMPDIR to another place"
            ) from error
        yield folder


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of ``folder``, where it can be written to and its file system has locks.

    Raises:
        ConfigError: another run is in it.
    """
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"another run is writing to {folder}: wait for it, or choose another folder") from None
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        lock.release()


def sync(path: Path) -> None:
    """Return when the content of the file ``path`` is on the disk."""
    _fsync(path, os.O_RDWR)


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # which opens no folders
        return
    with contextlib.suppress(OSError):  # some file systems cannot; the file is in its place all the same
        _fsync(path, os.O_RDONLY)


def _fsync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _temporary(folder: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a new path in ``folder`` where ``make`` has made something; it is removed at the end, if it is still there.

    Raises:
        OSError: it cannot be made.
    """
    # Not named after the file that it may become, whose name may be as long as names can be. The name is known before
    # anything has it, so that a signal right after it was made leaves nothing.
    path = folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
    handle = None
    try:
        _remove_abandoned(folder)
        handle = _held(path, make)
        yield path
    finally:
        _remove(path)
        _release(handle)


def _make_file(path: Path) -> None:
    path.touch(0o600, exist_ok=False)


def _make_private_folder(path: Path) -> None:
    path.mkdir(0o700)


def _held(path: Path, make: Callable[[Path], None]) -> int | None:
    """The lock of what ``make`` makes at ``path``, which tells other processes that this one lives.

    Another process that looks between the two takes it for abandoned, and it is made once more.
    """
    while True:
        make(path)
        handle = _lock(path, blocking=True)
        if os.path.exists(path):
            return handle
        _release(handle)


def _lock(path: Path, blocking: bool) -> int | None:
    """A handle that holds the lock of the file or folder ``path``; None where it is held, or there are no locks."""
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(path, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
    except OSError:
        _release(handle)
        return None
    return handle


def _release(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


@functools.cache  # once for each folder: one of many crops is not searched for every crop
def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files and folders of processes that are dead, which are those that nobody locks."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith(_PREFIX) and name.endswith(_SUFFIX)]
    except OSError:  # it is missing, which the caller will see, or may be written to and not read
        return
    for path in map(folder.joinpath, names):
        handle = _lock(path, blocking=False)
        if handle is not None:
            _remove(path)
            _release(handle)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # somebody else's
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _check_replaceable(path: Path) -> None:
    # A folder would only be in the way, but a device would be gone.
    if os.path.exists(path) and not os.path.isfile(path):
        raise ExportError(f"cannot write {path}: it is a folder or a device; choose the name of a file")


def _umask() -> int:
    # The mask can only be read by setting it; the 0600 of a temporary file would surprise whoever shares the file.
    mask = os.umask(0)
    os.umask(mask)
    return mask
