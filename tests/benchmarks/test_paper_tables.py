"""All five tables to the end, on tiny networks under the paper's names and files in the field's formats."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import qface
from qface.data import ImageFolder
from qface.models import IResNet, MobileFaceNet
from tests.benchmarks.scripts import run, script
from tests.data.ijb import SmallIjb
from tests.networks import tiny_face_net, with_statistics

NETWORKS = ("R18", "R34", "R50", "R100")
STAND_INS = ("mobilefacenet", "iresnet18")


def write_bin(path: Path, pairs: int = 20) -> None:
    """A verification set as InsightFace's lfw2pack.py writes it."""
    images = []
    for seed in range(2 * pairs):
        noise = torch.randint(0, 256, (112, 112, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise.numpy()).save(buffer, "png")
        images.append(buffer.getvalue())
    path.write_bytes(pickle.dumps((images, [number % 2 == 0 for number in range(pairs)])))


@pytest.fixture(scope="module")
def paper_once(data_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the tables look for, small. Tests only copy it."""
    root = Path(shutil.copytree(data_once, tmp_path_factory.mktemp("paper") / "shared"))
    weights, faces = root / "weights", root / "data"
    for seed, name in enumerate(NETWORKS):
        qface.save(tiny_face_net(seed, size=(112, 112)), weights / f"{name}.safetensors")
    for name in ("lfw", "calfw", "cplfw"):
        write_bin(faces / f"{name}.bin")
    SmallIjb(faces / "IJBC", people=6, templates=2)
    names = ImageFolder(faces / "lfw").names
    lines = []
    for number in range(20):
        one, other = names[number], names[number if number % 2 == 0 else number + 1]
        lines += [f"{one}/{one}_0001.png", f"{other}/{other}_0002.png"]
    (faces / "sllfw_pairs.txt").write_text("\n".join(lines) + "\n")
    (weights / "quantface").mkdir()
    for name in NETWORKS:
        for bits in (6, 8):
            publish(weights / "quantface" / f"{name}_w{bits}a{bits}.pth", weights / f"{name}.safetensors", bits)
    return root


@pytest.fixture
def paper(paper_once: Path, tmp_path: Path) -> Path:
    """A copy of :func:`paper_once` that a test may change."""
    return Path(shutil.copytree(paper_once, tmp_path / "shared"))


def publish(path: Path, network: Path, bits: int) -> None:
    """A file as QuantFace's, with some ranges."""
    tensors = script("paper.quantface").student_of(qface.load(network), bits, bits).state_dict()
    ranges = {"x_min": torch.tensor([-1.0]), "x_max": torch.tensor([3.0])}
    torch.save(module_of({name: ranges.get(name.rpartition(".")[2], value) for name, value in tensors.items()}), path)


def module_of(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module that holds ``tensors`` under their names: a graph could not be pickled whole."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(last, tensor)
    return root


def measure(root: Path, number: int, *arguments: str) -> tuple[Any, dict[str, Any]]:
    folders = ("--weights", root / "weights", "--data", root / "data", "-o", root.parent / f"table{number}")
    options = ("--max-steps", "1", "--json", root.parent / "table.json")
    result = run("paper_table", number, *folders, *options, *arguments)
    return result, json.loads((root.parent / "table.json").read_text())


@pytest.mark.parametrize(("number", "network"), [(1, "R18"), (3, "R18"), (5, None)])
# Each row costs a training: table 5 has several networks, and tests below fill tables 2 and 4.
def test_every_row_is_filled(number: int, network: str | None, paper: Path) -> None:
    if number == 5:  # the larger of the stand-ins teaches the smaller one
        qface.save(tiny_face_net(7, size=(112, 112)), paper / "weights" / "iresnet18.safetensors")
    _, table = measured(paper, number, network)
    check_filled(table, number, network, paper)


def measured(paper: Path, number: int, network: str | None) -> tuple[Any, dict[str, Any]]:
    """The result and the figures of a table that is made without an error."""
    result, table = measure(paper, number, *(() if network is None else ("--networks", network)))
    assert result.exit_code == 0, result.output
    return result, table


def check_filled(table: dict[str, Any], number: int, network: str | None, paper: Path) -> None:
    printed = [row for row in script("paper.rows").TABLES[number].rows if network in (None, row.network)]
    assert [row["label"] for row in table["rows"][: len(printed)]] == [row.label for row in printed]
    for row in table["rows"]:
        assert row["missing"] is None, row
        wanted = row["printed"].keys() - {"mb", "images"}
        assert wanted <= row["measured"].keys()
        stand_in = row["network"] in STAND_INS
        columns = ("LFW, second half",) if stand_in else ("lfw", "calfw", "sllfw", "cplfw")
        assert all(row["measured"][key] is not None for key in columns)
        assert row["measured"]["mb"] > 0
    assert table["missing"] == []
    page = (paper.parent / f"table{number}" / f"table{number}.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(table["rows"])
    assert len({line.count("|") for line in rows}) == 1
    marks = [(row["network"], row["label"]) for row in table["rows"] if row["network"] not in STAND_INS]
    assert len(set(marks)) == len(marks)
    assert any(line.startswith("- ") for line in page.splitlines())


def test_what_is_missing_is_named_and_stops_nothing(data: Path) -> None:
    result, table = measure(data, 3)
    assert result.exit_code == 0, result.output
    assert {row["network"] for row in table["rows"] if row["missing"] is None} == {"mobilefacenet"}
    assert all("no weights of R" in row["missing"] for row in table["rows"] if row["missing"])
    wanted = " ".join(table["missing"])
    for file in ("R18.pth", "R34.pth", "R50.pth", "lfw.bin", "sllfw_pairs.txt", "IJBC"):
        assert file in wanted
    assert "model zoo" in wanted


def test_figures_are_measured_once_and_a_set_that_comes_later_asks_for_no_training(
    paper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = (paper / "data" / "calfw.bin").rename(paper / "calfw.bin")
    _, first = measure(paper, 4, "--networks", "R34")
    assert len({row["measured"]["images"] for row in first["rows"]}) == 4
    for verb in ("calibrate", "distill"):
        monkeypatch.setattr(qface, verb, lambda *_, **__: pytest.fail("made again"))
    _, again = measured(paper, 4, "R34")
    assert again == first
    later.rename(paper / "data" / "calfw.bin")
    _, full = measured(paper, 4, "R34")
    check_filled(full, 4, "R34", paper)
    for before, after in zip(first["rows"], full["rows"], strict=True):
        assert set(after["measured"]) - set(before["measured"]) == {"calfw"}
        assert before["measured"].items() <= after["measured"].items()


def test_a_file_that_was_replaced_is_measured_again(paper: Path) -> None:
    def changed() -> set[str]:
        _, table = measured(paper, 2, "R18")
        now = next(row["measured"] for row in table["rows"] if row["method"] == "published w6a6")
        different = {key for key in now if figures.get(key) != now[key]}
        figures.update(now)
        return different

    figures: dict[str, Any] = {}
    _, table = measured(paper, 2, "R18")
    check_filled(table, 2, "R18", paper)
    assert "mb" in changed()  # nothing was known
    assert changed() == set()
    publish(paper / "weights" / "quantface" / "R18_w6a6.pth", paper / "weights" / "R34.safetensors", 6)
    assert {"lfw", "sllfw"} <= changed()
    write_bin(paper / "data" / "lfw.bin", pairs=12)
    different = changed()
    assert "lfw" in different and "sllfw" not in different


def test_quantfaces_arms_are_one_where_they_see_the_same_images(paper: Path) -> None:
    def arms() -> list[dict[str, Any]]:
        _, table = measure(paper, 1, "--networks", "mobilefacenet")
        return [row["measured"] for row in table["rows"] if row["method"].startswith("quantface")]

    labeled, unlabeled = arms()
    assert labeled == unlabeled
    crops = paper / "data" / "unlabeled" / "0"
    crops.mkdir(parents=True)
    for number, path in enumerate(ImageFolder(paper / "data" / "lfw").paths[:8]):
        (crops / f"{number}.png").write_bytes(path.read_bytes())
    labeled_again, unlabeled = arms()
    assert labeled_again == labeled
    assert unlabeled["images"] == 8 != labeled["images"]


def test_networks_that_no_table_has_and_rows_that_fail(paper: Path) -> None:
    result = run("paper_table", 1, "--weights", paper / "weights", "--data", paper / "data", "--networks", "r18")
    assert result.exit_code == 2
    assert "table 1 has R18, R34, R50, mobilefacenet, iresnet18, not r18" in result.output
    (paper / "weights" / "R34.safetensors").write_bytes(b"damaged")
    result, table = measure(paper, 4, "--networks", "R34")
    assert result.exit_code == 1
    assert all("R34.safetensors is not a complete" in row["missing"] for row in table["rows"])


def test_an_interrupted_table_shows_what_is_there(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(qface, "distill", interrupt)
    result, table = measure(data, 1, "--networks", "mobilefacenet")
    assert result.exit_code == 130
    assert [row["method"] for row in table["rows"]] == ["float"]


def test_differences_are_printed() -> None:
    cell = script("paper.comparison").format_cell
    assert cell(93.5, 93.79) == "93.50 (93.79, -0.29)"
    assert cell(None, 93.79) == "(93.79)"
    assert cell(93.5, None) == "93.50"


class Fixed:
    """Figures that nobody measured."""

    def figures(self, network: str, method: Any) -> dict[str, float]:
        return {"ijbc-1e-4": 97.0 if method.kind == "float" else 95.5}


def test_losses_are_against_the_float_network_of_the_same_name() -> None:
    rows, compare = script("paper.rows").TABLES[1].rows, script("paper.comparison").compare
    lines = {line["label"]: line for row in rows if (line := compare(row, Fixed()))["network"] == "R34"}
    assert lines["Ours (w6a6)"]["measured"]["lost"] == pytest.approx(1.5)
    assert lines["Ours (w6a6)"]["printed"]["lost"] == pytest.approx(96.56 - 95.56)
    assert lines["Ours, pruned"]["printed"]["lost"] == pytest.approx(96.56 - 89.11)
    assert lines["teacher"]["measured"]["lost"] is None and lines["teacher"]["printed"]["lost"] is None
    others = [compare(row, Fixed()) for row in rows if row.method.kind == "quantface"]
    assert {line["printed"]["lost"] for line in others} == {None}


def test_printed_figures_are_the_papers() -> None:
    """Each number of the tables is in the paper's text, where that is at hand."""
    text = Path(__file__).parents[3] / "shared" / "paper.txt"
    if not text.exists():
        pytest.skip("the paper's text is not here")
    words = set(re.findall(r"\d+\.\d+", text.read_text()))
    tables = script("paper.rows").TABLES
    printed = [value for table in tables.values() for row in table.rows for value in row.printed.values()]
    assert len(printed) > 100
    assert [value for value in printed if f"{value:.2f}" not in words] == []


# ---- QuantFace's method


def test_quantface_rounds_to_its_grids() -> None:
    quantface = script("paper.quantface")
    low, high = torch.tensor(-1.0), torch.tensor(2.0)
    x = torch.linspace(-1.5, 2.5, 401)
    rounded = quantface.fake_quantize(x, 4, low, high)
    assert len(rounded.unique()) == 16
    assert rounded.min() == pytest.approx(-1, abs=0.1)
    inside = (x > -1) & (x < 2)
    assert (rounded - x)[inside].abs().max() <= 0.5 * 3 / 15 + 1e-6


def test_quantface_follows_ranges_for_299_steps_of_training() -> None:
    quantizer = script("paper.quantface").RangeQuantizer(6).train()
    for step in range(350):
        quantizer(torch.tensor([[-0.01 * step, 0.02 * step]]))
    assert quantizer.x_max.item() == pytest.approx(0.02 * 298)
    assert quantizer.x_min.item() == pytest.approx(-0.01 * 298)
    quantizer.eval()(torch.tensor([[100.0]]))
    assert quantizer.x_max.item() < 6


def test_quantface_starts_near_its_teacher() -> None:
    quantface = script("paper.quantface")
    teacher = tiny_face_net(size=(112, 112))
    student = quantface.student_of(teacher, 8, 8)
    images = torch.randn(8, 3, 112, 112)
    with torch.no_grad():
        expected = teacher(images)
        for module in student.modules():
            module.training = isinstance(module, quantface.RangeQuantizer)
        student(images)  # sees the ranges
        found = student.eval()(images)
    assert torch.cosine_similarity(found, expected).mean() > 0.9
    convolutions = sum(isinstance(layer, torch.nn.Conv2d) for layer in teacher.modules())
    assert sum(isinstance(layer, quantface.RangeConv2d) for layer in student.modules()) == convolutions
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("model", [IResNet((1, 1, 1, 1)), MobileFaceNet(16)], ids=lambda model: type(model).__name__)
def test_quantface_rounds_the_same_places_in_modules_and_in_graphs(model: torch.nn.Module, tmp_path: Path) -> None:
    quantface = script("paper.quantface")
    with_statistics(model).eval()
    qface.save(model, tmp_path / "network.safetensors")
    qface.export(model, tmp_path / "network.onnx")
    networks = (model, *(qface.load(tmp_path / f"network.{ending}") for ending in ("safetensors", "onnx")))
    students = [quantface.student_of(network, 6, 6) for network in networks]
    counts = [sum(isinstance(layer, quantface.RangeQuantizer) for layer in each.modules()) for each in students]
    sums = 4 if isinstance(model, IResNet) else 12
    assert counts == [sums + sum(isinstance(layer, torch.nn.PReLU) for layer in model.modules())] * 3
    images = torch.randn(2, 3, *qface.preprocessing.preprocessing_of(model).size)
    assert torch.equal(followed(students[0], images), followed(students[1], images))


def followed(student: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Embeddings after the ranges of ``images`` were seen."""
    for module in student.modules():
        module.training = hasattr(module, "x_max")
    with torch.no_grad():
        student(images)
        return student.eval()(images)


@pytest.mark.parametrize("change", ["other names", "more layers", "other shapes"])
def test_a_published_file_of_another_network_is_refused(change: str, tmp_path: Path) -> None:
    quantface = script("paper.quantface")
    model = tiny_face_net(size=(112, 112))
    file = tmp_path / "R18_w6a6.pth"
    tensors = quantface.student_of(model, 6, 6).state_dict()
    torch.save(module_of(tensors | {"stem.beta": torch.ones(1)}), file)
    quantface.load_published(file, model, 6, 6)
    first = next(iter(tensors))
    other = {
        "other names": {f"other.{name}": value for name, value in tensors.items()},
        "more layers": tensors | {"layer9.weight": torch.ones(3)},
        "other shapes": tensors | {first: torch.ones(1, 2)},
    }
    torch.save(module_of(other[change]), file)
    with pytest.raises(qface.QFaceError, match="pass the network that it belongs to"):
        quantface.load_published(file, model, 6, 6)
