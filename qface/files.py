"""Atomic writing of files: a file is replaced completely or not at all."""

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
except ModuleNotFoundError:  # Windows, which does not delete open files
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone_in", "as_path", "check_file", "check_folder", "make_folder", "replacing", "sync", "temporary_folder"]

_PREFIX, _SUFFIX = ".qface-", ".part"
_LOCK = ".lock"

_LONGEST_NAME = 255  # bytes, on the file systems of Linux, macOS and Windows


def as_path(path: str | Path) -> Path:
    """Return ``path`` as a :class:`~pathlib.Path`.

    Raises:
        ConfigError: it is not a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"a path must be a str or Path, got {type(path).__name__}")
    return Path(path)


def check_file(path: str | Path) -> None:
    """Raise if ``path`` is not a file; called before a network is read from it.

    Raises:
        CheckpointError: the file does not exist, or is a folder.
        ConfigError: ``path`` is not a path.
    """
    path = as_path(path)
    if os.path.isdir(path):
        raise CheckpointError(f"{path} is a folder; pass the file of a network")
    if not os.path.isfile(path):  # Path.is_file raises for invalid names
        raise CheckpointError(f"there is no file {path}; check the path")


def check_folder(path: str | Path) -> None:
    """Raise if the file ``path`` cannot be written; called before long work.

    Raises:
        ExportError: the folder does not exist or is not writable, the name is too long, or ``path`` exists and is not
            a file.
    """
    _check_replaceable(Path(path))
    folder = Path(path).parent
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ExportError(f"cannot write {path}: {folder} is not a writable folder; create it or choose another one")
    if len(os.fsencode(Path(path).name)) > _LONGEST_NAME:
        raise ExportError(f"cannot write {path}: the name is longer than {_LONGEST_NAME} bytes; choose a shorter one")


def make_folder(path: str | Path) -> None:
    """Create the folder ``path`` and its parents if they do not exist.

    Raises:
        ExportError: the folder cannot be created, or ``path`` is not a folder.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"cannot create the folder {path}: {error.strerror or error}; choose another") from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` on success and is removed on failure.

    If ``path`` is a link, the linked file is replaced. Content and name are synced to disk on return. Temporary files
    of killed processes in the same folder are removed.

    Raises:
        ExportError: the folder does not exist or is not writable, the disk is full, or ``path`` exists and is not a
            file.
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
    """Yield an empty folder in the system's temporary folder; it is removed at the end.

    Temporary folders of killed processes are removed too.

    Raises:
        ExportError: the folder cannot be created.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(_temporary(Path(tempfile.gettempdir()), _make_private_folder))
        except OSError as error:
            raise ExportError(
                f"cannot create a temporary folder ({one_line(error)}): set TMPDIR to a writable folder"
            ) from error
        yield folder


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against other runs, if it is writable and its file system supports locks.

    Raises:
        ConfigError: another run holds the lock.
    """
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        with contextlib.suppress(FileNotFoundError):  # a run that ended just now deleted the folder
            lock.acquire()
        if not lock.is_locked:
            folder.mkdir(parents=True, exist_ok=True)
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
    """Flush the content of the file ``path`` to disk."""
    _fsync(path, os.O_RDWR)


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders
        return
    with contextlib.suppress(OSError):  # some file systems do not support it; the file is in place anyway
        _fsync(path, os.O_RDONLY)


def _fsync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _temporary(folder: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a new path in ``folder``, created by ``make``; whatever is there at the end is removed.

    Raises:
        OSError: it cannot be created.
    """
    # A random name, since the target's name may already have the maximum length. It is chosen before the file is
    # created, so that a signal right after the creation leaves nothing behind.
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
    """Create ``path`` with ``make`` and lock it, which shows other processes that this one is alive.

    Another process may remove it as abandoned before it is locked; then it is created again.
    """
    while True:
        make(path)
        handle = _lock(path, blocking=True)
        if os.path.exists(path):
            return handle
        _release(handle)


def _lock(path: Path, blocking: bool) -> int | None:
    """Return a file descriptor that locks ``path``; None if it is already locked or cannot be locked."""
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


@functools.cache  # once per folder, so that writing many crops does not list their folder each time
def _remove_abandoned(folder: Path) -> None:
    """Remove temporary files and folders that no process locks."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith(_PREFIX) and name.endswith(_SUFFIX)]
    except OSError:  # a missing folder, which the caller will report, or one that is writable but not readable
        return
    for path in map(folder.joinpath, names):
        handle = _lock(path, blocking=False)
        if handle is not None:
            _remove(path)
            _release(handle)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # it may belong to another user
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _check_replaceable(path: Path) -> None:
    # os.replace would replace a device without an error.
    if os.path.exists(path) and not os.path.isfile(path):
        raise ExportError(f"cannot write {path}: it is a folder or a device; choose a file name")


def _umask() -> int:
    # The umask can only be read by setting it. The file gets normal permissions instead of 0600, so it can be shared.
    mask = os.umask(0)
    os.umask(mask)
    return mask
