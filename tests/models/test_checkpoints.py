"""Checkpoints of others: what is recognized, and what is refused with one line."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from qface.errors import CheckpointError, LimitError
from qface.models import IResNet, MobileFaceNet, iresnet, load
from qface.models.insightface_mbf import InsightFaceMobileFaceNet
from qface.preprocessing import Preprocessing, preprocessing_of, with_preprocessing
from tests.networks import ForeignNet, TinyFaceNet, foreign_net, random_faces, tiny_face_net, with_statistics

Tensors = dict[str, Tensor]
REUSED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused(path: Path | str, **options: Any) -> str:
    """The one-line message of the error that loading ``path`` raises."""
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) > 20
    return message


@pytest.fixture(scope="module")
def mobile() -> MobileFaceNet:
    torch.manual_seed(0)
    return with_statistics(MobileFaceNet(8, (112, 96))).eval()


@pytest.fixture(scope="module")
def mobile_output(mobile: MobileFaceNet) -> Tensor:
    with torch.no_grad():
        return mobile(torch.linspace(-1, 1, 3 * 112 * 96).view(1, 3, 112, 96))


def tensors_of(model: nn.Module) -> Tensors:
    return {name: value.clone() for name, value in model.state_dict().items()}


def tensors_equal(model: nn.Module, other: nn.Module) -> bool:
    found, wanted = model.state_dict(), other.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(value, found[name]) for name, value in wanted.items())


def write_safetensors(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def write_torch(path: Path, tensors: Tensors) -> Path:
    torch.save(tensors, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def write_wrapped(path: Path, tensors: Tensors) -> Path:
    torch.save({"epoch": 3, "state_dict": tensors, "args": ["a"]}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def write_old_torch(path: Path, tensors: Tensors) -> Path:
    torch.save(tensors, path.with_suffix(".pth.tar"), _use_new_zipfile_serialization=False)
    return path.with_suffix(".pth.tar")


WRITERS = [write_safetensors, write_torch, write_wrapped, write_old_torch]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_mobilefacenet_in_any_wrapping(
    tmp_path: Path, mobile: MobileFaceNet, mobile_output: Tensor, write: Callable[..., Path], prefix: str
) -> None:
    path = write(tmp_path / "m", {prefix + name: value for name, value in tensors_of(mobile).items()})
    loaded = load(path)
    assert isinstance(loaded, MobileFaceNet) and not loaded.training
    assert preprocessing_of(loaded) == Preprocessing(crop=(0, 8, 112, 104), size=(112, 96))
    with torch.no_grad():
        assert torch.equal(loaded(torch.linspace(-1, 1, 3 * 112 * 96).view(1, 3, 112, 96)), mobile_output)


class Recipe:
    """Settings with a class of their own."""

    def __init__(self) -> None:
        self.lr = 0.1


PREFIXES = ["model.", "net.", "backbone.", "_orig_mod.", "module.module.", "encoder.", "module._orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_of_all_names_is_left_out_and_said(
    tmp_path: Path, mobile: MobileFaceNet, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qface")
    path = write_torch(tmp_path / "m", {prefix + name: value for name, value in tensors_of(mobile).items()})
    assert tensors_equal(load(path), mobile)
    messages = [record.getMessage() for record in caplog.records if "their prefix" in record.getMessage()]
    assert messages and all("without their prefix" in message and "\n" not in message for message in messages)
    assert tensors_equal(load(path, model=MobileFaceNet(8, (112, 96))), mobile)


def test_a_name_that_compiling_added_within_others(tmp_path: Path, mobile: MobileFaceNet) -> None:
    tensors = {name.replace("blocks.", "blocks._orig_mod."): value for name, value in tensors_of(mobile).items()}
    assert tensors_equal(load(write_torch(tmp_path / "m", tensors)), mobile)


def test_weights_without_a_prefix_for_a_network_that_has_one(tmp_path: Path, mobile: MobileFaceNet) -> None:
    wrapped = nn.DataParallel(MobileFaceNet(8, (112, 96)))
    assert tensors_equal(load(write_torch(tmp_path / "m", tensors_of(mobile)), model=wrapped).module, mobile)


def as_lightning(tensors: Tensors) -> dict[str, Any]:
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.0.0",
        "state_dict": {f"model.{name}": value for name, value in tensors.items()} | {"loss.weight": torch.zeros(9, 8)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "hyper_parameters": argparse.Namespace(lr=0.1, recipe=Recipe()),
    }


CHECKPOINTS: dict[str, Callable[[Tensors], Any]] = {
    "state_dict": lambda tensors: {"state_dict": tensors, "best": torch.tensor(0.9), "args": argparse.Namespace(lr=1)},
    "arcface_torch": lambda tensors: {
        "epoch": 3,
        "state_dict_backbone": tensors,
        "state_dict_softmax_fc": {"weight": torch.zeros(9, 8)},
        "state_optimizer": {"state": {0: {"momentum": torch.zeros(3)}}},
    },
    "net_state_dict": lambda tensors: {"iters": 3, "net_state_dict": tensors},
    "a name of its own": lambda tensors: {"student": tensors, "optimizer": {"a": torch.zeros(1)}, "args": Recipe()},
    "two wrappers": lambda tensors: {"model": {"state_dict": tensors}},
    "numpy": lambda tensors: {name: value.numpy() for name, value in tensors.items()},
    "plain values beside": lambda tensors: tensors | {"epoch": 3, "best": np.float64(0.5), "recipe": Recipe()},
    "Lightning": as_lightning,
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", list(CHECKPOINTS))
def test_checkpoints_as_training_scripts_save_them(
    tmp_path: Path, mobile: MobileFaceNet, kind: str, legacy: bool
) -> None:
    content = CHECKPOINTS[kind](tensors_of(mobile))
    torch.save(content, tmp_path / "c.ckpt", _use_new_zipfile_serialization=not legacy)
    assert tensors_equal(load(tmp_path / "c.ckpt"), mobile)


def test_a_module_in_a_checkpoint(tmp_path: Path, mobile: MobileFaceNet) -> None:
    torch.save({"epoch": 3, "model": mobile}, tmp_path / "c.pt")
    assert tensors_equal(load(tmp_path / "c.pt"), mobile)


def test_what_lies_beside_the_network_is_left_out_and_said(
    tmp_path: Path, mobile: MobileFaceNet, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(as_lightning(tensors_of(mobile)), tmp_path / "c.ckpt")
    load(tmp_path / "c.ckpt")
    (warning,) = (record.getMessage() for record in caplog.records if "other tensors" in record.getMessage())
    assert "1 other tensors are skipped (first: loss.weight)" in warning


def test_two_networks_in_one_file_are_refused(tmp_path: Path, mobile: MobileFaceNet) -> None:
    both = {prefix + name: value for prefix in ("student.", "teacher.") for name, value in tensors_of(mobile).items()}
    assert "'student.', 'teacher.'" in refused(write_torch(tmp_path / "m", both))
    torch.save({"a": tensors_of(mobile), "b": tensors_of(mobile)}, tmp_path / "two.pth")
    assert "2 sets of tensors ('a', 'b')" in refused(tmp_path / "two.pth")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_called_what_it_is(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(tiny_face_net(), torch.zeros(1, 3, 112, 112)), tmp_path / "script.pt")
    message = refused(tmp_path / "script.pt")
    assert "TorchScript" in message and ".onnx" in message


@pytest.mark.parametrize(("blocks", "scale"), [((1, 4, 6, 2), 2), ((2, 8, 12, 4), 4), ((1, 1, 1, 1), 1)])
def test_mobilefacenet_of_insightface(tmp_path: Path, blocks: tuple[int, int, int, int], scale: int) -> None:
    torch.manual_seed(0)
    model = with_statistics(InsightFaceMobileFaceNet(16, blocks, scale)).eval()
    loaded = load(write_torch(tmp_path / "mbf", tensors_of(model)))
    assert isinstance(loaded, InsightFaceMobileFaceNet) and preprocessing_of(loaded) == Preprocessing()
    x = Preprocessing()(random_faces(2))
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_keys_of_insightfaces_mbf() -> None:
    """Names and sizes as in ``backbones/mobilefacenet.py`` of InsightFace's arcface_torch."""
    shapes = {name: list(value.shape) for name, value in load("mbf").state_dict().items()}
    assert shapes["layers.0.layers.0.weight"] == [128, 3, 3, 3]
    assert shapes["layers.1.layers.0.weight"] == [128, 2, 3, 3]
    assert shapes["layers.2.layers.1.layers.0.weight"] == [128, 1, 3, 3]
    assert shapes["layers.5.layers.5.layers.2.layers.0.weight"] == [256, 256, 1, 1]
    assert shapes["layers.6.layers.1.layers.2.weight"] == [512]
    assert shapes["conv_sep.layers.0.weight"] == [512, 256, 1, 1]
    assert shapes["features.layers.0.layers.0.weight"] == [512, 1, 7, 7]
    assert shapes["features.layers.2.weight"] == [512, 512] and shapes["features.layers.3.weight"] == [512]


def test_half_precision_becomes_single(tmp_path: Path, mobile: MobileFaceNet) -> None:
    halves = {n: v.half() if v.is_floating_point() else v for n, v in tensors_of(mobile).items()}
    loaded = load(write_safetensors(tmp_path / "half", halves))
    for name, value in loaded.state_dict().items():
        assert value.dtype == mobile.state_dict()[name].dtype
        assert torch.equal(value, halves[name].to(value.dtype))


def test_counters_of_batches_may_be_missing(tmp_path: Path, mobile: MobileFaceNet) -> None:
    tensors = {n: v for n, v in tensors_of(mobile).items() if not n.endswith("num_batches_tracked")}
    assert isinstance(load(write_safetensors(tmp_path / "m", tensors)), MobileFaceNet)


def test_square_mobilefacenet_reads_the_whole_crop(tmp_path: Path) -> None:
    loaded = load(write_safetensors(tmp_path / "m", tensors_of(MobileFaceNet(8, (112, 112)))))
    assert preprocessing_of(loaded) == Preprocessing()


def test_large_mobilefacenet_reads_the_crop_enlarged(tmp_path: Path) -> None:
    loaded = load(write_safetensors(tmp_path / "m", tensors_of(MobileFaceNet(8, (224, 224)))))
    assert preprocessing_of(loaded) == Preprocessing(size=(224, 224))


@pytest.mark.parametrize(("depth", "features"), [(18, 16), (34, 8)])
def test_iresnet_of_any_depth_and_embedding(tmp_path: Path, depth: int, features: int) -> None:
    model = iresnet(depth, features)
    loaded = load(write_safetensors(tmp_path / "r", {n: v.half() for n, v in tensors_of(model).items()}))
    assert isinstance(loaded, IResNet) and loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded.fc.weight.dtype == torch.float32 and loaded.fc.out_features == features
    assert preprocessing_of(loaded) == Preprocessing()


def test_an_iresnet_of_no_known_depth_is_refused(tmp_path: Path) -> None:
    assert "(1, 1, 1, 1)" in refused(write_safetensors(tmp_path / "r", tensors_of(IResNet((1, 1, 1, 1), 8))))


@pytest.mark.parametrize(("name", "kind"), [("iresnet18", IResNet), ("mobilefacenet", MobileFaceNet)])
def test_names_give_fresh_networks(name: str, kind: type[nn.Module]) -> None:
    model = load(name, preprocessing=Preprocessing(color="BGR"))
    assert isinstance(model, kind) and not model.training
    assert preprocessing_of(model).color == "BGR"


def test_preprocessing_of_the_file_counts_unless_the_caller_says_otherwise(tmp_path: Path, mobile: nn.Module) -> None:
    in_file = Preprocessing(crop=(0, 8, 112, 104), size=(112, 96), std=(128.0,) * 3)
    save_file(tensors_of(mobile), tmp_path / "m.safetensors", {"preprocessing": in_file.to_json()})
    assert preprocessing_of(load(tmp_path / "m.safetensors")) == in_file
    other = Preprocessing(color="BGR")
    assert preprocessing_of(load(tmp_path / "m.safetensors", preprocessing=other)) == other


def test_a_broken_preprocessing_record_is_refused(tmp_path: Path, mobile: nn.Module) -> None:
    save_file(tensors_of(mobile), tmp_path / "m.safetensors", {"preprocessing": "{}"})
    assert "m.safetensors" in refused(tmp_path / "m.safetensors")


# ---- networks of the user


def test_weights_of_a_foreign_network(tmp_path: Path) -> None:
    source = foreign_net(seed=1)
    path = write_torch(tmp_path / "f", tensors_of(source))
    target = with_preprocessing(ForeignNet().train(), Preprocessing(color="BGR"))
    assert load(path, model=target) is target
    assert not target.training and preprocessing_of(target).color == "BGR"
    x = Preprocessing()(random_faces(1))
    assert torch.equal(target(x), source(x))


def test_weights_of_an_unknown_network_need_it(tmp_path: Path) -> None:
    message = refused(write_torch(tmp_path / "f", tensors_of(foreign_net())))
    for part in ("model=", "IResNet by fc.weight", "linear7.conv.weight", "conv_sep.layers.0.weight"):
        assert part in message


def test_weights_of_another_network_are_refused_and_change_nothing(tmp_path: Path) -> None:
    target = tiny_face_net()
    before = tensors_of(target)
    assert "TinyFaceNet" in refused(write_torch(tmp_path / "f", tensors_of(foreign_net())), model=target)
    one_missing = tensors_of(tiny_face_net(seed=1))
    del one_missing["fc.bias"]
    assert "fc.bias" in refused(write_torch(tmp_path / "t", one_missing), model=target)
    wider = tensors_of(tiny_face_net(seed=1, dim=17))
    assert "[17" in refused(write_torch(tmp_path / "w", wider), model=target)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


# ---- damage


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_missing_empty_and_other_files(tmp_path: Path, ending: str) -> None:
    assert "no file" in refused(tmp_path / f"missing{ending}")
    assert "no file" in refused(tmp_path / f"{'a' * 300}{ending}")
    folder = tmp_path / f"folder{ending}"
    folder.mkdir()
    refused(folder)
    path = tmp_path / f"file{ending}"
    for content in (
        b"",
        b"\x00" * 64,
        b"no model, but a text\n" * 20,
        b"PK\x03\x04" + b"\x00" * 40,
        b"\x80\x02}q\x00.",
    ):
        path.write_bytes(content)
        assert path.name in refused(path)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one network in three forms: ``a.safetensors``, ``a.pth`` and ``a.pth.tar``."""
    folder = tmp_path_factory.mktemp("whole")
    for write in (write_safetensors, write_torch, write_old_torch):
        write(folder / "a", tensors_of(TinyFaceNet(4, (32, 32))))
    return folder


FORMS = st.sampled_from(["a.safetensors", "a.pth", "a.pth.tar"])


@REUSED_FOLDER
@given(form=FORMS, share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_off_anywhere(tmp_path: Path, whole_files: Path, form: str, share: float) -> None:
    content = (whole_files / form).read_bytes()
    path = tmp_path / form
    path.write_bytes(content[: int(share * len(content))])
    refused(path, model=TinyFaceNet(4, (32, 32)))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@REUSED_FOLDER
@given(form=FORMS, place=st.integers(0, 2999), flip=st.integers(1, 255))
def test_a_damaged_byte_raises_nothing_else(
    tmp_path: Path, whole_files: Path, form: str, place: int, flip: int
) -> None:
    content = bytearray((whole_files / form).read_bytes())
    content[place] ^= flip
    path = tmp_path / form
    path.write_bytes(content)
    message = ""
    try:
        load(path, model=TinyFaceNet(4, (32, 32)))  # where it hit a weight, nothing can be noticed
    except CheckpointError as error:
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("write", [write_safetensors, write_torch])
def test_weights_that_are_no_numbers(tmp_path: Path, write: Callable[..., Path], value: float) -> None:
    tensors = tensors_of(tiny_face_net())
    tensors["fc.weight"][3, 5] = value
    message = refused(write(tmp_path / "bad", tensors), model=TinyFaceNet())
    assert "fc.weight" in message and f"1 of {len(tensors)}" in message


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), [torch.zeros(3)], {"a": "text"}, {}, {"state_dict": {}}, {"epoch": 3}, None, 7],
    ids=repr,
)
def test_a_torch_file_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pth")
    refused(tmp_path / "x.pth")


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"fc.weight": torch.zeros(2), "x": Harmful(marker)}, tmp_path / "new.pth")
    torch.save(Harmful(marker), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Harmful(marker)))
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    for name in ("new.pth", "old.pth", "plain.pkl", "module.pth"):
        assert name in refused(tmp_path / name)
        assert not marker.exists()
    pickle.loads((tmp_path / "plain.pkl").read_bytes())
    assert marker.exists()  # it would have been


@pytest.mark.parametrize(
    "shapes",
    [
        {"linear7.conv.weight": (512, 1), "linear1.conv.weight": (8, 512, 1, 1)},
        {"linear7.conv.weight": (512, 1, 7, 7), "linear1.conv.weight": ()},
        {"linear7.conv.weight": (512, 1, 0, 0), "linear1.conv.weight": (8, 512, 1, 1)},
        {"linear7.conv.weight": (512, 1, 7, 7), "linear1.conv.weight": (8, 512, 1, 1)},
        {"fc.weight": (), "layer4.0.conv1.weight": (1,), "features.weight": (1,)},
        {"fc.weight": (8, 2), "layer4.0.conv1.weight": (1,), "features.weight": (1,)},
    ],
)
def test_names_of_a_known_network_with_other_shapes(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    refused(write_safetensors(tmp_path / "x", {name: torch.zeros(shape) for name, shape in shapes.items()}))


@pytest.mark.faces
@pytest.mark.parametrize(
    ("name", "kind", "preprocessing"),
    [
        ("mobilefacenet_112x96", MobileFaceNet, Preprocessing((0, 8, 112, 104), (112, 96), std=(128.0,) * 3)),
        ("iresnet18", IResNet, Preprocessing(std=(128.0,) * 3)),
    ],
)
def test_real_weights(faces: Path, name: str, kind: type[nn.Module], preprocessing: Preprocessing) -> None:
    model = load(faces / "weights" / f"{name}.safetensors")
    assert isinstance(model, kind)
    assert preprocessing_of(model) == preprocessing


ODD_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "float8": lambda weight: weight.to(torch.float8_e4m3fn),
    "complex": lambda weight: weight.to(torch.complex64),
    "sparse": lambda weight: weight.to_sparse(),
    "meta": lambda weight: weight.to("meta"),
    "quantized": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
    "nested": lambda weight: torch.nested.nested_tensor([weight[0], weight[1]]),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_no_network_has_are_named(kind: str, tmp_path: Path) -> None:
    tensors: dict[str, Any] = dict(tiny_face_net().state_dict())
    tensors["conv.weight"] = ODD_TENSORS[kind](tensors["conv.weight"])
    torch.save(tensors, tmp_path / "odd.pth")
    message = refused(tmp_path / "odd.pth", model=tiny_face_net())
    assert "float32" in message and "download it again" not in message


def test_a_tensor_of_too_many_dimensions_is_refused(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros([1] * 65)}, tmp_path / "deep.safetensors")
    with pytest.raises(LimitError, match=r"deep\.safetensors: conv\.weight has 65 dimensions"):
        load(tmp_path / "deep.safetensors", model=MobileFaceNet())
