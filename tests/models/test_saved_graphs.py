"""qface's own files: a network saved as data comes back the same, and a hostile file does nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qface.errors import CheckpointError, ExportError, LimitError, TraceError, UnsupportedLayerError
from qface.graph import capture, register_layer
from qface.models import (
    IResNet,
    MobileFaceNet,
    load,
    save,
    store,
)
from qface.preprocessing import Preprocessing, preprocessing_of, with_preprocessing
from qface.provenance import provenance_of, record_step
from qface.quantization import QuantizationConfig, calibrate, quantize
from tests.networks import RANGES_ONLY, foreign_net, random_faces, tiny_face_net, with_statistics

PREPROCESSING = Preprocessing(crop=(0, 8, 112, 104), size=(64, 48), color="BGR", std=(128.0,) * 3)
SMALL = (64, 48)


def mobile() -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(MobileFaceNet(8, SMALL)).eval()


def float_tiny() -> nn.Module:
    return with_preprocessing(tiny_face_net(size=SMALL), PREPROCESSING)


def float_foreign() -> nn.Module:
    return with_preprocessing(foreign_net(size=SMALL), PREPROCESSING)


def student(make: Callable[[], nn.Module], bits: int | QuantizationConfig = 6) -> nn.Module:
    model = quantize(with_preprocessing(make(), PREPROCESSING), bits)
    return calibrate(model, random_faces(8, seed=3), RANGES_ONLY).eval()


def quantized_tiny() -> nn.Module:
    return student(float_tiny)


def quantized_foreign() -> nn.Module:
    return student(float_foreign, QuantizationConfig(3, 5, weight_observer="minmax", activation_observer="percentile"))


def inputs() -> Tensor:
    return PREPROCESSING(random_faces(4, seed=5))


def check_same(loaded: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        assert torch.equal(loaded(inputs()), model(inputs()))
    expected = capture(model).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert preprocessing_of(loaded) == preprocessing_of(model)
    assert provenance_of(loaded) == provenance_of(model)


@pytest.mark.parametrize("make", [float_tiny, float_foreign, mobile, quantized_tiny, quantized_foreign])
def test_a_saved_network_is_the_same(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = record_step(with_preprocessing(make(), PREPROCESSING), "something", {"rate": 0.1, "path": Path("x")})
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    assert not loaded.training
    check_same(loaded, model)
    assert provenance_of(loaded)[-1]["step"] == "something"
    save(loaded, tmp_path / "again.safetensors")
    check_same(load(tmp_path / "again.safetensors"), model)


def test_weights_read_into_a_network_keep_their_provenance(tmp_path: Path) -> None:
    save(record_step(with_preprocessing(float_tiny(), PREPROCESSING), "something", {}), tmp_path / "m.safetensors")
    target = float_tiny()
    assert load(tmp_path / "m.safetensors", model=target) is target
    assert [step["step"] for step in provenance_of(target)] == ["something"]
    assert preprocessing_of(target) == PREPROCESSING


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    model = IResNet((1, 1, 1, 1), 4)
    save(model, tmp_path / "m.safetensors")
    frozen = [name for name, p in load(tmp_path / "m.safetensors").named_parameters() if not p.requires_grad]
    assert frozen == ["features.weight"]


def test_a_loaded_student_trains_and_calibrates_on(tmp_path: Path) -> None:
    save(quantized_tiny(), tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors").train()
    loaded(inputs()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loaded.parameters() if p.requires_grad)
    check_same(calibrate(loaded.eval(), random_faces(8, seed=3)), calibrate(quantized_tiny(), random_faces(8, seed=3)))


def test_a_network_that_was_never_calibrated_can_be_saved(tmp_path: Path) -> None:
    model = quantize(with_preprocessing(float_tiny(), PREPROCESSING), 4)
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    for each in (model, loaded):
        calibrate(each, random_faces(8)).eval()
    assert torch.equal(loaded(inputs()), model(inputs()))


def test_another_process_needs_no_source(tmp_path: Path) -> None:
    expected = {}
    for number, make in enumerate((float_foreign, quantized_tiny)):
        model = make()
        save(model, tmp_path / f"{number}.safetensors")
        expected[str(number)] = model(inputs()).detach()
    save_file({"inputs": inputs(), **expected}, tmp_path / "expected.st")
    code = f"""
import sys, torch, qface
from safetensors.torch import load_file
wanted = load_file({str(tmp_path / "expected.st")!r})
for number in "01":
    model = qface.load(r"{tmp_path}/" + number + ".safetensors")
    assert torch.equal(model(wanted["inputs"]), wanted[number]), number
assert not any(name.startswith("tests") for name in sys.modules)
print("same")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


class Parts(nn.Module):
    """Constants, slices, shapes, a shared layer, functions with keywords, and one in float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding="same", padding_mode="reflect")
        self.norm = nn.LayerNorm(4, bias=False)
        self.fc = nn.Linear(3, 4)
        self.gain = nn.Parameter(torch.full((1, 3, 1, 1), 2.0))
        self.register_buffer("shift", torch.ones(1, 3, 1, 1))
        self.register_buffer("fleeting", torch.full((1,), 3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.conv(x)) * self.gain + self.shift - self.fleeting
        x = F.avg_pool2d(x[:, :, 1:-1, ::2], kernel_size=x.shape[2] // 8, ceil_mode=True)
        x = torch.clamp(x.float().to(torch.float32), min=-1.0, max=float("inf"))
        return torch.cumsum(self.norm(self.fc(x.flatten(2).mean(dim=-1))), 1)


def test_constants_slices_and_keywords_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = with_preprocessing(Parts().eval(), PREPROCESSING)
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    torch.testing.assert_close(loaded(inputs()), model(inputs()))
    torch.testing.assert_close(loaded(inputs()[:1]), model(inputs()[:1]))


def test_layers_that_no_node_calls_are_left_out(tmp_path: Path) -> None:
    graph = capture(float_tiny())
    graph.add_submodule("unused", nn.Linear(3, 3))
    save(graph, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    assert not hasattr(loaded, "unused")
    assert torch.equal(loaded(inputs()), graph(inputs()))


class Overwriting(nn.Module):
    """Its sum is twice the positive part, as the activation function overwrites what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (self.act(x) + x).flatten(1)


def small(model: nn.Module) -> nn.Module:
    return with_preprocessing(model.eval(), PREPROCESSING)


def test_operations_in_place_are_read_as_they_ran(tmp_path: Path) -> None:
    model = small(Overwriting())
    save(model, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(inputs()), model(inputs()))


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Wrapped(nn.Module):
    """Its only part has the name that DataParallel gives to a network."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).flatten(1)


def named_with_dashes() -> nn.Module:
    model = nn.Sequential()
    model.add_module("conv-1", nn.Conv2d(3, 4, 1))
    model.add_module("flat", nn.Flatten())
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Dropping(), nn.Flatten()),
        Wrapped,
        named_with_dashes,
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(3, 2, 1, divisor_override=5), nn.Flatten()),
    ],
    ids=["dropout", "module", "dashes", "divisor"],
)
def test_what_is_easily_lost_is_kept(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = small(make())
    save(model, tmp_path / "m.safetensors")
    torch.testing.assert_close(load(tmp_path / "m.safetensors")(inputs()), model(inputs()))


# ---- what cannot be saved


class Strange(nn.Module):
    """A layer of the user's own, which torch.ao and torch.export would see through."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * self.scale


def strange_graph(scale: float = 3.0) -> torch.fx.GraphModule:
    graph = capture(small(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten())))
    graph.add_submodule("1", Strange(scale))
    return graph


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: torch.linalg.qr(x).Q, "linalg_qr"),
        (lambda x: torch.fft.fft(x).real, "fft"),
        (torch.nonzero, "nonzero"),
    ],
)
def test_unknown_operators_are_named_with_their_place(
    tmp_path: Path, function: Callable[[Tensor], Tensor], name: str
) -> None:
    class Function(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x[:, :, :48, :48]).flatten(1)

    with pytest.raises((UnsupportedLayerError, TraceError), match=name) as caught:
        save(small(Function()), tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value) and "test_saved_graphs.py" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_registered_layer_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLayerError, match="Strange"):
        save(strange_graph(), tmp_path / "m.safetensors")
    register_layer(Strange, ("scale",))
    save(strange_graph(scale=0.25), tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").get_submodule("1").scale == 0.25


def test_what_would_not_come_back_is_refused(tmp_path: Path) -> None:
    graph = capture(small(nn.Sequential(nn.MaxPool2d(2), nn.Flatten())))
    graph.get_submodule("0").return_indices = True
    with pytest.raises(UnsupportedLayerError, match=r"'0'.*MaxPool2d.*return_indices=True"):
        save(graph, tmp_path / "m.safetensors")
    with pytest.raises(ExportError, match=r"m\.pt.*must end in \.safetensors"):
        save(float_tiny(), tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_control_flow_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(TraceError) as caught:
        save(small(nn.Sequential(nn.Conv2d(3, 4, 1), Branching(), nn.Flatten())), tmp_path / "m.safetensors")
    message = str(caught.value)
    line = Branching.forward.__code__.co_firstlineno + 1
    assert f"{__file__}:{line} in forward" in message
    assert "must not branch on values of the images" in message and "\n" not in message


def test_nothing_is_written_where_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    save(float_tiny(), path)
    before = path.read_bytes()

    broken = float_foreign()
    broken.embed.bias.data[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"embed\.bias"):
        save(broken, path)
    with pytest.raises(TraceError):
        save(Branching(), path)

    def fail_halfway(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(store, "save_file", fail_halfway)
    with pytest.raises(ExportError, match=r"m\.safetensors.*No space left"):
        save(float_foreign(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="missing"):
        save(float_tiny(), tmp_path / "missing" / "m.safetensors")


# ---- hostile files

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = tmp_path_factory.mktemp("saved") / "m.safetensors"
    model = small(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    save(model, path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def node(graph: dict[str, Any], op: str) -> dict[str, Any]:
    return next(entry for entry in graph["nodes"] if entry["op"] == op)


def insert(graph: dict[str, Any], op: str, target: str, *args: Any, name: str = "extra", **kwargs: Any) -> None:
    """Put a node behind the placeholder."""
    graph["nodes"].insert(
        1, {"op": op, "target": target, "args": {"tuple": list(args)}, "kwargs": {"dict": kwargs}, "name": name}
    )


def set_in(op: str, field: str, value: Any) -> Change:
    return lambda graph: node(graph, op).update({field: value})


MARK = "__import__('os').mkdir('marker')"
X = {"node": "images"}
CHANGES: dict[str, Change] = {
    "unknown layer": lambda g: g["layers"]["0"].update(type="Exec"),
    "builtin as layer": lambda g: g["layers"]["0"].update(type="eval"),
    "unknown function": lambda g: insert(g, "call_function", "builtins.eval", MARK),
    "os.mkdir": lambda g: insert(g, "call_function", "os.mkdir", "marker"),
    "torch.load": lambda g: insert(g, "call_function", "torch.load", "file"),
    "unknown method": lambda g: insert(g, "call_method", "__reduce__", X),
    "method that calls": lambda g: insert(g, "call_method", "apply_", X),
    "class attribute": lambda g: insert(g, "call_function", "builtins.getattr", X, "__class__"),
    "operator that reads files": lambda g: insert(g, "call_function", "aten.from_file.default", "marker"),
    "operator in place": lambda g: insert(g, "call_function", "aten.abs_.default", X),
    "attribute of an operator": lambda g: insert(g, "call_function", "aten.abs.__class__", X),
    "injected node name": lambda g: insert(g, "call_function", "symbolic.neg", X, name=f"x = {MARK} #"),
    "keyword as node name": lambda g: insert(g, "call_function", "symbolic.neg", X, name="a\nimport os"),
    "injected argument": lambda g: node(g, "placeholder").update(target=f"x={MARK}"),
    "dotted argument": lambda g: node(g, "placeholder").update(target="a.b"),
    "number as argument": lambda g: node(g, "placeholder").update(target="1a"),
    "star as argument": lambda g: node(g, "placeholder").update(target="*x"),
    "injected keyword": lambda g: insert(g, "call_function", "aten.abs.default", **{f"input={MARK}, y": X}),
    "keyword of Python": lambda g: insert(g, "call_function", "aten.abs.default", X, **{"class": 1}),
    "injected layer": lambda g: insert(g, "call_module", f"0({MARK})", X),
    "injected attribute": lambda g: insert(g, "get_attr", f"a + {MARK}"),
    "module method": lambda g: insert(g, "call_module", "load_state_dict", X),
    "method of a layer": lambda g: insert(g, "call_module", "0.register_forward_hook", X),
    "builtins": lambda g: insert(g, "call_module", "__init__.__builtins__.__getitem__", "eval"),
    "attribute that is no tensor": lambda g: insert(g, "get_attr", "__init__.__globals__"),
    "layer under a method's name": lambda g: g["layers"].update({"forward": g["layers"]["1"]}),
    "layer with an injected path": lambda g: g["layers"].update({f"a;{MARK}": g["layers"]["1"]}),
    "tensor the file lacks": lambda g: g["tensors"].update({"nothing": "buffer"}),
    "no such node": lambda g: insert(g, "call_function", "aten.abs.default", {"node": "nobody"}),
    "unknown operation": lambda g: insert(g, "call_anything", "x"),
    "unknown value": lambda g: insert(g, "call_function", "aten.abs.default", {"pickle": "abc"}),
    "arguments that are no tuple": set_in("call_module", "args", [X]),
    "keywords that are no dict": set_in("call_module", "kwargs", 3),
    "layer without nodes": lambda g: g["layers"]["0"].pop("type"),
    "layer with unknown argument": lambda g: g["layers"]["0"]["arguments"]["dict"].update(evil=1),
    "layer of no size": lambda g: g["layers"]["0"]["arguments"]["dict"].update(groups=0),
    "another shape": lambda g: g["layers"]["0"]["arguments"]["dict"].update(out_channels=5),
    "node without a name": lambda g: node(g, "call_module").pop("name"),
    "nodes missing": lambda g: g.pop("nodes"),
    "frozen missing": lambda g: g.pop("frozen"),
    "frozen not a list": lambda g: g.update(frozen=3),
    "nodes not a list": lambda g: g.update(nodes=7),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_hostile_graph_is_refused_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saved: tuple[dict[str, Tensor], dict[str, str]],
    change: Change,
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors, metadata = saved
    graph = json.loads(metadata["graph"])
    change(graph)
    save_file(tensors, "hostile.safetensors", {**metadata, "graph": json.dumps(graph)})
    with pytest.raises(CheckpointError) as caught:
        load("hostile.safetensors")
    assert "hostile.safetensors" in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("marker").exists()


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("bits", [1, 9, 2**31 - 1, -1, None, True]),
        ("weight_bits", [1, 9, 2**31 - 1]),
        ("zero_point", [-1, 256, 2**31 - 1, 1.5, None, True]),
        ("scale", [0, -1, float("nan"), float("inf"), "1"]),
        ("offset", [float("nan"), None]),
    ],
)
def test_quantizers_with_settings_out_of_range_are_refused(tmp_path: Path, setting: str, values: list[object]) -> None:
    path = tmp_path / "m.safetensors"
    save(quantized_tiny(), path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    for value in values:
        graph = json.loads(metadata["graph"])
        layers = [each["arguments"]["dict"] for each in graph["layers"].values()]
        next(each for each in layers if setting in each)[setting] = value
        save_file(tensors, path, {**metadata, "graph": json.dumps(graph)})
        with pytest.raises(CheckpointError, match=r"m\.safetensors.*(ConfigError|TypeError)"):
            load(path)


@pytest.mark.parametrize("value", [-1, 100, 256, 2**31 - 1])
def test_zero_points_out_of_range_are_refused(tmp_path: Path, value: int) -> None:
    path = tmp_path / "m.safetensors"
    save(quantized_tiny(), path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    changed = [name for name, tensor in tensors.items() if name.endswith("zero_point") and len(tensor) > 1]
    tensors[changed[-1]][-1] = value
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match="zero_point is outside"):
        load(path)


def test_strings_in_arguments_stay_strings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: tuple[dict[str, Tensor], dict[str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors, metadata = saved
    for text in (MARK, f"') or {MARK} or ('", f'"""{MARK}', "\\", "\n"):
        graph = json.loads(metadata["graph"])
        insert(graph, "call_function", "aten.abs.default", X, text)
        save_file(tensors, "m.safetensors", {**metadata, "graph": json.dumps(graph)})
        with pytest.raises(CheckpointError, match="the saved graph is damaged"):
            load("m.safetensors")
        assert not Path("marker").exists()


@pytest.mark.parametrize(
    "entries",
    [
        {"format_version": "6"},
        {"format_version": ""},
        {"graph": "no json"},
        {"graph": "[" * 100_000},
        {"graph": "[]"},
        {"graph": "null"},
        {"graph": "{}"},
        {"provenance": "{"},
        {"provenance": "null"},
        {"provenance": "3"},
        {"provenance": "[1]"},
        {"provenance": '[{"setting": 1}]'},
        {"preprocessing": "{}"},
        {"preprocessing": ""},
    ],
    ids=lambda entries: str(entries)[:40],
)
def test_broken_metadata_is_refused(
    tmp_path: Path, saved: tuple[dict[str, Tensor], dict[str, str]], entries: dict[str, str]
) -> None:
    tensors, metadata = saved
    save_file(tensors, tmp_path / "m.safetensors", {**metadata, **entries})
    with pytest.raises((CheckpointError, LimitError)) as caught:
        load(tmp_path / "m.safetensors")
    assert "m.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("3", "by an older qface (format 3, this version reads 5); create it again, a student with qface quantize"),
        ("6", "by a newer qface (format 6, this version reads 5); update qface"),
    ],
)
def test_files_of_another_format_are_refused_with_what_to_do(
    tmp_path: Path, saved: tuple[dict[str, Tensor], dict[str, str]], version: str, wanted: str
) -> None:
    tensors, metadata = saved
    save_file(tensors, tmp_path / "student.safetensors", {**metadata, "format_version": version})
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "student.safetensors")
    assert str(caught.value) == f"{tmp_path / 'student.safetensors'} was written {wanted}"


@pytest.mark.parametrize("missing", ["format_version", "graph", "provenance"])
def test_missing_metadata_is_refused(
    tmp_path: Path, saved: tuple[dict[str, Tensor], dict[str, str]], missing: str
) -> None:
    tensors, metadata = saved
    rest = {name: value for name, value in metadata.items() if name != missing}
    save_file(tensors, tmp_path / "m.safetensors", rest)
    with pytest.raises(CheckpointError):
        load(tmp_path / "m.safetensors")


def test_tensors_that_do_not_fit_the_graph_are_refused(
    tmp_path: Path, saved: tuple[dict[str, Tensor], dict[str, str]]
) -> None:
    tensors, metadata = saved
    for changed in (
        {name: value for name, value in tensors.items() if name != "0.bias"},
        {**tensors, "1.bias": torch.zeros(3)},
        {**tensors, "0.bias": torch.zeros(7)},
        {**tensors, "0.bias": torch.full((4,), float("nan"))},
    ):
        save_file(changed, tmp_path / "m.safetensors", metadata)
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "m.safetensors")
        assert "\n" not in str(caught.value)


def test_the_untouched_file_loads(tmp_path: Path, saved: tuple[dict[str, Tensor], dict[str, str]]) -> None:
    tensors, metadata = saved
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    model = load(tmp_path / "m.safetensors")
    assert model(torch.zeros(2, 3, 4, 4)).shape == (2, 4)
