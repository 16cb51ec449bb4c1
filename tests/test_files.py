import errno
import os
from pathlib import Path

import pytest

from qface.errors import ExportError
from qface.files import check_folder, replacing


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
        with pytest.raises(ExportError, match="more than 255 bytes; choose a shorter one"):
            check_folder(tmp_path / name)
