import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from qface.errors import ConfigError, ExportError
from qface.files import alone_in, check_folder, replacing, temporary_folder


def test_a_new_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new.txt"
    with replacing(path) as temporary:
        temporary.write_text("first half, ")
        assert not path.exists()
        with temporary.open("a") as file:
            file.write("second half")
    assert path.read_text() == "first half, second half"
    assert list(tmp_path.iterdir()) == [path]


def test_an_old_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(str(path)) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    with replacing(path) as temporary:
        assert temporary.name.startswith(".")
        assert temporary.suffix == ".part"
        temporary.write_text("new")
    assert path.read_text() == "new"
    with pytest.raises(ExportError, match="File name too long"), replacing(tmp_path / ("x" * 256)):
        pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail_halfway() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_others_may_read_the_file_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "file"
    with pytest.raises(ExportError, match="missing"), replacing(path):
        pytest.fail("there is nothing to write to")
    with pytest.raises(ExportError, match="missing"):
        check_folder(path)
    check_folder(tmp_path / "file")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    def fill() -> None:
        with replacing(tmp_path / "file"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ExportError, match="file: No space left on device"):
        fill()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="links and pipes of POSIX")
def test_links_stay_and_pipes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ExportError, match="a folder or a device"), replacing(tmp_path / "pipe"):
        pytest.fail("a pipe would be gone")


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match="folder"), replacing(tmp_path / "folder") as temporary:
        temporary.write_text("x")
    with pytest.raises(ExportError, match="folder"):
        check_folder(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_name_that_is_too_long_is_refused_before_the_work(tmp_path: Path) -> None:
    check_folder(tmp_path / ("a" * 255))
    for name in ("a" * 256, "ü" * 128):
        with pytest.raises(ExportError, match="longer than 255 bytes; choose a shorter one"):
            check_folder(tmp_path / name)


@pytest.mark.skipif(os.name == "nt", reason="locks of POSIX")
def test_what_a_dead_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    code = (
        "import sys, time, qface.files as f\nwith f.replacing(sys.argv[1]): print('in', flush=True); sys.stdin.read()"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name in ("dead", "living")
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == b"in\n"
    assert len(list(tmp_path.glob(".qface-*.part"))) == 2
    dead, living = writers
    dead.kill()
    dead.communicate()
    with replacing(tmp_path / "third") as temporary:
        temporary.write_text("whole")
        assert len(list(tmp_path.glob(".qface-*.part"))) == 2
    living.communicate()
    assert living.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["living", "third"]


def test_files_of_other_programs_stay(tmp_path: Path) -> None:
    for name in (".qface-x", "x.part", ".other.part"):
        (tmp_path / name).touch()
    with replacing(tmp_path / "file") as temporary:
        temporary.touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.part", ".qface-x", "file", "x.part"]


@pytest.mark.skipif(os.name == "nt", reason="locks of POSIX")
def test_without_locks_what_others_left_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".qface-left.part").touch()
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".qface-left.part", "file"]
    with alone_in(tmp_path):
        pass


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be synced there")
def test_content_is_on_the_disk_before_the_name_and_then_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, object]] = []
    fsync, rename = os.fsync, os.replace

    def synced(handle: int) -> None:
        calls.append(("fsync", os.fstat(handle).st_ino))
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        calls.append(("replace", target))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    path = tmp_path / "file"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not calls
    assert calls == [("fsync", path.stat().st_ino), ("replace", path), ("fsync", tmp_path.stat().st_ino)]


@pytest.mark.skipif(os.name == "nt", reason="locks of POSIX")
def test_a_temporary_folder_goes_and_so_does_that_of_a_dead_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os, qface.files as f\nwith f.temporary_folder() as t: (t / 'x').touch(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, check=False)
    (left,) = tmp_path.iterdir()
    with temporary_folder() as folder:
        assert list(tmp_path.iterdir()) == [folder] != [left]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_another_run_deleted_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "deleted"
    with alone_in(folder), pytest.raises(ConfigError, match="another run"), alone_in(folder):
        pass


def test_one_run_is_alone_in_its_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(ConfigError, match="another run"), alone_in(tmp_path):
        pytest.fail("two are in one folder")
    with alone_in(tmp_path):
        pass


@pytest.mark.skipif(os.name == "nt", reason="locks of POSIX")
@pytest.mark.parametrize("make", [lambda folder: replacing(folder / "file"), lambda _: temporary_folder()])
def test_a_signal_right_after_it_was_made_leaves_nothing(
    make: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def interrupt(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", interrupt)
    with pytest.raises(KeyboardInterrupt), make(tmp_path):
        pytest.fail("nobody comes here")
    assert not list(tmp_path.iterdir())
