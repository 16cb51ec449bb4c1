from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import qface
from qface.cli import main
from qface.errors import CheckpointError
from qface.models import MODEL_NAMES
from qface.models.resolve import as_network, resolve_architecture, resolve_model


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the current one, in which no file has the name of an architecture."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_name_alone_is_no_trained_network(name: str) -> None:
    for refused in (lambda: resolve_model(name), lambda: as_network(Path(name))):
        with pytest.raises(CheckpointError, match=f"^{name} is the name of an architecture and has no weights: give"):
            refused()


def test_a_name_with_weights_is_a_network() -> None:
    torch.manual_seed(1)
    trained = qface.load("mobilefacenet")
    torch.save(trained.state_dict(), "weights.pth")
    found = resolve_model("mobilefacenet", Path("weights.pth"))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)


def test_an_architecture_needs_no_weights() -> None:
    made = resolve_architecture("mobilefacenet")
    assert sum(each.numel() for each in made.parameters()) == sum(
        each.numel() for each in qface.load("mobilefacenet").parameters()
    )


def test_a_file_with_the_name_of_an_architecture_is_a_file() -> None:
    weights = qface.load("mobilefacenet").state_dict()
    torch.save(weights, "mobilefacenet")
    for found in (resolve_model("mobilefacenet"), as_network(Path("mobilefacenet"))):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize(
    "command",
    [
        "quantize mobilefacenet -o out.safetensors",
        "prune mobilefacenet -o out.safetensors",
        "distill mobilefacenet --teacher iresnet18 --images . -o out.safetensors",
        "compress mobilefacenet --images . --max-mb 1 -o out.onnx",
        "export mobilefacenet -o out.onnx",
        "verify mobilefacenet out.onnx --images .",
        "evaluate mobilefacenet --images .",
        "thresholds mobilefacenet --teacher mobilefacenet --images .",
        "sensitivity mobilefacenet --images .",
        "ijb mobilefacenet --data .",
    ],
    ids=lambda command: command.split()[0],
)
def test_commands_that_need_weights_refuse_a_name(command: str, empty_folder: Path) -> None:
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: mobilefacenet is the name of an architecture")
    assert len(result.stderr.splitlines()) == 1
    assert not list(empty_folder.iterdir())


@pytest.mark.parametrize("command", ["inspect", "size"])
def test_commands_that_look_at_layers_take_a_name(command: str) -> None:
    assert CliRunner().invoke(main, [command, "mobilefacenet", "--json"]).exit_code == 0
