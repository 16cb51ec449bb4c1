"""Whole modules as ``torch.save(model)`` writes them: their tensors come out, and their code stays where it is."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import qface
from qface.errors import CheckpointError, LimitError
from qface.models import MobileFaceNet
from qface.pickles import read_pickled_module
from tests.networks import TinyFaceNet, tiny_face_net, with_statistics


class Unusual(nn.Module):
    """Views, shared parameters, other types, and attributes of classes that nobody else has."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.arange(12.0).view(3, 4)
        self.inner = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Sequential(nn.PReLU(3), nn.BatchNorm2d(3))})
        self.view = nn.Parameter(table[:, 1:3])
        self.transposed = nn.Parameter(table.t())
        self.register_buffer("narrow", torch.ones(2, dtype=torch.float16))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("not_saved", torch.ones(1), persistent=False)
        self.marked = nn.Parameter(torch.ones(3))
        self.marked.no_decay = True
        self.buffer = nn.Buffer(torch.ones(4))
        self.absent = nn.Buffer(None)
        self.config = Config()


class Config(dict[str, int]):
    """A dictionary with a class of its own."""

    def __init__(self) -> None:
        super().__init__(width=3)


def test_tensors_of_any_module(tmp_path: Path) -> None:
    model = Unusual()
    torch.save(model, tmp_path / "whole.pth")
    found = read_pickled_module(tmp_path / "whole.pth")
    assert set(found) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_tensors_of_an_unknown_kind_are_not_passed_over(tmp_path: Path) -> None:
    model = tiny_face_net()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    torch.save(model, tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match="sparse of a pickled module"):
        read_pickled_module(tmp_path / "whole.pth")


def test_views_of_one_storage_share_it(tmp_path: Path) -> None:
    flat, model = torch.arange(1000.0), nn.Module()
    for number in range(10):
        model.register_parameter(f"p{number}", nn.Parameter(flat[100 * number : 100 * number + 100]))
    torch.save(model, tmp_path / "whole.pth")
    found = read_pickled_module(tmp_path / "whole.pth")
    assert torch.equal(torch.cat(list(found.values())), flat)
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1


def test_files_that_grow_when_they_are_read_are_refused(tmp_path: Path) -> None:
    module: nn.Module = nn.Identity()
    for _ in range(20):
        module = nn.ModuleList([module, module])
    torch.save(module, tmp_path / "many.pth")
    with pytest.raises(CheckpointError, match="more than 100000 modules"):
        read_pickled_module(tmp_path / "many.pth")
    torch.save(tiny_face_net(), tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as old, zipfile.ZipFile(tmp_path / "small.pth", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="compressed"):
        read_pickled_module(tmp_path / "small.pth")


def test_names_of_parallel_training(tmp_path: Path) -> None:
    torch.save(nn.DataParallel(tiny_face_net()), tmp_path / "whole.pth")
    loaded = qface.load(tmp_path / "whole.pth", model=tiny_face_net(seed=1))
    assert torch.equal(loaded.fc.weight, tiny_face_net().fc.weight)


def test_a_known_network_is_loaded(tmp_path: Path) -> None:
    model = with_statistics(MobileFaceNet(16)).eval()
    torch.save(model, tmp_path / "whole.pth")
    loaded = qface.load(tmp_path / "whole.pth")
    x = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def make_folder(path: str) -> None:
    os.mkdir(path)


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path, how: str) -> None:
        self.marker, self.how = str(marker), how

    def __reduce__(self) -> Any:
        return make_folder if self.how == "own function" else os.mkdir, (self.marker,)


@pytest.mark.parametrize("how", ["own function", "function of the system"])
def test_code_of_a_module_is_not_run(how: str, tmp_path: Path) -> None:
    model, marker = tiny_face_net(), tmp_path / "marker"
    model.trap = Harmful(marker, how)
    torch.save(model, tmp_path / "whole.pth")
    assert set(read_pickled_module(tmp_path / "whole.pth")) == set(tiny_face_net().state_dict())
    assert not marker.exists()
    torch.load(tmp_path / "whole.pth", weights_only=False)
    assert marker.exists()  # it would have been


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "whole.pth"
    torch.save(TinyFaceNet(4, (32, 32)), path)
    return path


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """The archive again, with what ``change`` makes of each of its files."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_damaged_pickle_raises_nothing_else(whole: Path, tmp_path: Path, place: float, flip: int) -> None:
    def damage(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        changed = bytearray(content)
        changed[int(place * len(content))] ^= flip
        return bytes(changed)

    with contextlib.suppress(CheckpointError):  # where it hit a name, nothing can be noticed
        read_pickled_module(rewritten(whole, tmp_path / "damaged.pth", damage))


def test_a_value_kept_far_behind_the_end_and_endless_tensors(whole: Path, tmp_path: Path) -> None:
    def keep_far_away(name: str, content: bytes) -> bytes:
        return content[:2] + b"]r\xff\xff\xff\x7f0" + content[2:] if name.endswith("data.pkl") else content

    with pytest.raises(CheckpointError, match="memo index at byte 3 is 2147483647"):
        read_pickled_module(rewritten(whole, tmp_path / "far.pth", keep_far_away))
    model = tiny_face_net()
    model.register_buffer("endless", torch.zeros(1).expand(2**40))
    torch.save(model, tmp_path / "endless.pth")
    with pytest.raises(LimitError, match=r"endless\.pth: the checkpoint needs .* bytes beyond the file size"):
        read_pickled_module(tmp_path / "endless.pth")


def test_storages_that_are_too_short_and_other_files(whole: Path, tmp_path: Path) -> None:
    def cut(name: str, content: bytes) -> bytes:
        return content[:-4] if name.endswith("data/0") else content

    with pytest.raises(CheckpointError, match="storage 0 holds"):
        read_pickled_module(rewritten(whole, tmp_path / "short.pth", cut))
    big = rewritten(whole, tmp_path / "big.pth", lambda name, content: b"big" if "byteorder" in name else content)
    with pytest.raises(CheckpointError, match="big-endian"):
        read_pickled_module(big)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="is no module either"):
        read_pickled_module(tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no archive")
    with pytest.raises(CheckpointError, match="is no complete torch file"):
        read_pickled_module(tmp_path / "text.pth")
