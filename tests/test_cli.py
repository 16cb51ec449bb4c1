import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result

import qface
from qface.cli import export_alias, main
from qface.deployment.metadata import add_metadata, read_metadata
from qface.models.resolve import resolve_model
from qface.preprocessing import preprocessing_of
from qface.provenance import provenance_of
from tests.data.ijb import SmallIjb

Crops = Callable[..., Path]

FACTORY = """
import torch
from torch import nn

from qface import Preprocessing


def make():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.PReLU(8), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 16),
    )
    model.preprocessing = Preprocessing(size=(32, 32))
    return model


class Unknown(nn.Module):
    def forward(self, x):
        return x + torch.linalg.qr(x)[0].sum()


def make_unsavable():
    return nn.Sequential(make()[0], Unknown(), *make()[3:])


def make_smooth():
    return nn.Sequential(make()[0], nn.GELU(), *make()[3:])


def make_number():
    return 3


def make_nothing():
    return {}["no such\\nnetwork"]
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refusal(result: Result) -> str:
    """The one line of a command that was refused."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crops: Crops) -> Path:
    """A folder with a module of networks and eight people's crops, as the current one."""
    (tmp_path / "my_networks.py").write_text(FACTORY)
    crops(dict.fromkeys(("Ann", "Bob", "Cid", "Dee", "Eve", "Fay", "Gus", "Hal"), 4))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    return tmp_path


@pytest.fixture
def student(workplace: Path) -> Path:
    return calibrated("my_networks:make")


def calibrated(model: str, *options: str) -> Path:
    """Quantize a network and calibrate it on the first half of the people."""
    faces = ("--images", "crops", "--people", "first-half")
    for step in (("quantize", model, *options), ("calibrate", "student.safetensors", *faces)):
        result = run(*step, "-o", "student.safetensors")
        assert result.exit_code == 0, result.output
    return Path("student.safetensors").resolve()


def test_the_whole_job(workplace: Path) -> None:
    common = ("--images", "crops", "--people", "first-half", "--batch-size", "8")
    training = ("--teacher", "my_networks:make", "--epochs", "1")
    steps = (
        ("quantize", "my_networks:make", "--bits", "6", "-o", "new.safetensors"),
        ("calibrate", "new.safetensors", *common, "-o", "student.safetensors"),
        ("distill", "student.safetensors", *training, *common, "-o", "again.safetensors"),
        ("export", "again.safetensors", "-o", "student.onnx"),
    )
    for step in steps:
        result = run(*step)
        assert result.exit_code == 0, result.output
    records = []
    for model in ("again.safetensors", "student.onnx"):
        result = run("evaluate", model, "--images", "crops", "--people", "second-half", "--json")
        assert result.exit_code == 0, result.output
        records.append(json.loads(result.stdout))
    for record in records:
        assert {"accuracy", "accuracy_std", "tpr_at_fpr", "images", "identities"} <= record.keys()
        assert (record["images"], record["identities"]) == (16, 4)
        assert record["accuracy"] is None
    assert records[0]["tpr_at_fpr"] == records[1]["tpr_at_fpr"]


def test_what_cannot_end_well_is_refused_at_once(workplace: Path) -> None:
    output = ("-o", "student.safetensors")
    assert "my_networks:make_nothing: KeyError" in refusal(run("quantize", "my_networks:make_nothing", *output))
    assert "must end in .safetensors" in refusal(run("quantize", "my_networks:make", "-o", "student.pt"))
    assert "cannot create the folder" in refusal(run("demo", "-o", "my_networks.py"))
    assert not list(workplace.glob("student*"))


def test_what_cannot_be_saved_is_refused_before_it_is_trained(workplace: Path) -> None:
    for command in (("quantize",), ("prune", "--images", "crops")):
        result = run(*command, "my_networks:make_unsavable", "-o", "student.safetensors")
        assert "linalg_qr" in refusal(result)


def test_what_stays_in_float_is_told(workplace: Path) -> None:
    result = run("quantize", "my_networks:make_smooth", "-o", "student.safetensors")
    assert result.exit_code == 0, result.output
    assert "in float: 1 GELU" in result.stderr
    result = run("quantize", "my_networks:make", "--ignored-layers", "0", "-o", "student.safetensors")
    assert result.exit_code == 0, result.output
    plan = json.loads(run("inspect", "student.safetensors", "--json").stdout)
    assert [layer["name"] for layer in plan["layers"] if not layer["integer"]] == ["0"]
    assert "nothing" in run("inspect", "my_networks:make").output


def test_evaluate_prints_a_table_and_accepts_a_gallery(student: Path) -> None:
    result = run("evaluate", student, "--images", "crops", "--gallery", "my_networks:make", "--bootstrap", "3")
    assert result.exit_code == 0, result.output
    assert "TPR at FPR 1e-1" in result.stdout
    assert "FPR 1e-2 needs 1,000 impostor pairs, there are 896: use 1e-1" in " ".join(result.stdout.split())
    assert "3 replicates over people" in " ".join(result.stdout.split())


def test_both_models_of_evaluate_and_a_student_to_calibrate_are_told_their_input(student: Path) -> None:
    Path("groups.csv").write_text("".join(f"{name},{name[0] < 'E'}\n" for name in ("Ann", "Bob", "Fay", "Gus")))
    command = ("evaluate", student, "--images", "crops", "--color", "BGR", "--json")
    gallery = json.loads(run(*command, "--gallery", "my_networks:make").stdout)
    assert all(gallery[name].startswith("BGR") for name in ("preprocessing", "gallery_preprocessing"))
    groups = ("--groups", "groups.csv", "--reference", "my_networks:make", "--at-fpr", "1e-1")
    assert all(each.startswith("BGR") for each in json.loads(run(*command, *groups).stdout)["preprocessing"])
    assert run("calibrate", student, "--images", "crops", "--mean", "100", "-o", "new.safetensors").exit_code == 0
    assert preprocessing_of(qface.load("new.safetensors")).mean == (100, 100, 100)


def test_thresholds_of_float_quantized_and_mixed(student: Path) -> None:
    arguments = ("thresholds", student, "--teacher", "my_networks:make", "--images", "crops", "--fpr", "0.2")
    result = run(*arguments, "--people", "first-half", "--eval-people", "second-half", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["identities"], record["eval_identities"]) == ("first-half", "second-half")
    assert [row["pairing"] for row in record["pairings"]] == ["float", "quantized", "mixed"]
    table = run(*arguments)
    assert table.exit_code == 0, table.output
    assert "mixed" in table.stdout
    assert "fpr" in refusal(run(*arguments[:-1], "often")).lower() or "rate" in refusal(run(*arguments[:-1], "often"))


def test_a_file_proves_itself_and_knows_its_thresholds(student: Path) -> None:
    assert run("export", student, "-o", "student.onnx").exit_code == 0
    result = run("selftest", "student.onnx")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("computes what was trained: 0 of 16 embeddings differ")
    assert json.loads(run("selftest", "student.onnx", "--json").stdout)["thresholds"] is None

    faces = ("student.onnx", "--teacher", "my_networks:make", "--images", "crops", "--fpr", "0.2")
    result = run("thresholds", *faces, "--people", "first-half", "--write", "student.onnx")
    assert result.exit_code == 0, result.output
    assert "wrote into student.onnx: two faces match above" in result.stderr
    record = json.loads(run("selftest", "student.onnx", "--json").stdout)
    assert (record["agrees"], record["different"], record["tolerance"]) == (True, 0, "equal")
    assert record["thresholds"]["by_fpr"].keys() == {"0.2"}
    assert (record["thresholds"]["images"], record["thresholds"]["people"]) == (16, "first-half")
    assert "two faces match above a cosine of" in run("selftest", "student.onnx").stdout
    assert "no NoSuchProvider on this" in refusal(run("selftest", "student.onnx", "--provider", "NoSuchProvider"))


def test_a_file_that_differs_or_cannot_tell_is_named(student: Path) -> None:
    qface.export(qface.load(student), "student.onnx")
    golden = json.loads(read_metadata("student.onnx")["golden"])
    golden["digests"][:4] = golden["digests"][3::-1]
    golden["embeddings"].reverse()
    add_metadata("student.onnx", {"golden": json.dumps(golden)})
    result = run("selftest", "student.onnx")
    assert result.exit_code == 1
    assert result.stdout.startswith("DIFFERS from what was trained: 4 of 16 embeddings differ, minimum cosine")
    assert json.loads(run("selftest", "student.onnx", "--json").stdout)["agrees"] is False
    kept = {key: value for key, value in read_metadata("student.onnx").items() if key != "golden"}
    model = onnx.load("student.onnx")
    onnx.helper.set_model_props(model, kept)
    onnx.save(model, "student.onnx")
    assert "no golden values" in refusal(run("selftest", "student.onnx"))


def test_thresholds_are_not_measured_for_a_file_that_is_missing(student: Path) -> None:
    faces = ("thresholds", student, "--teacher", "my_networks:make", "--images", "crops", "--fpr", "0.2")
    assert "missing.onnx" in refusal(run(*faces, "--write", "missing.onnx"))


def test_evaluate_prints_figures_with_pairs(student: Path) -> None:
    lines = ["2\t2"]
    for first, second in (("Ann", "Bob"), ("Cid", "Dee")):
        lines += [f"{first}\t1\t2", f"{second}\t1\t2", f"{first}\t1\t{second}\t1", f"{first}\t2\t{second}\t2"]
    Path("pairs.txt").write_text("\n".join(lines) + "\n")
    result = run("evaluate", student, "--images", "crops", "--pairs", "pairs.txt", "--json")
    assert result.exit_code == 0, result.output
    assert 0 <= json.loads(result.stdout)["accuracy"] <= 1


def test_the_alias_exports(student: Path) -> None:
    result = CliRunner().invoke(export_alias, [str(student), "-o", "alias.onnx"])
    assert result.exit_code == 0, result.output
    assert Path("alias.onnx").stat().st_size > 0
    refused = CliRunner().invoke(export_alias, ["missing.safetensors", "-o", "other.onnx"])
    assert "missing.safetensors" in refusal(refused)


def distilling(student: str | Path) -> tuple[str | Path, ...]:
    return ("distill", student, "--teacher", "my_networks:make", "--images", "crops")


@pytest.mark.parametrize(("recipe", "precision"), [("qface", "float32"), ("paper", "bf16")])
def test_recipes(student: Path, recipe: str, precision: str) -> None:
    options = ("--batch-size", "8", "--recipe", recipe, "--lr", "0.0001", "--precision", precision, "--epochs", "1")
    result = run(*distilling(student), *options, "-o", "trained.safetensors")
    assert result.exit_code == 0, result.output
    settings = provenance_of(qface.load("trained.safetensors"))[-1]
    assert (settings["losses"]["embedding_loss"] is None) == (recipe == "paper")
    assert (settings["optimizer"]["learning_rate"], settings["precision"]) == (0.0001, precision)


def test_what_is_not_given_is_the_recipes(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qface.distillation.batches.MIN_STEPS", 8)
    result = run(*distilling(student), "-o", "trained.safetensors")
    assert result.exit_code == 0, result.output
    settings = provenance_of(qface.load("trained.safetensors"))[-1]
    assert settings["max_steps"] == 8 <= settings["epochs"] * (settings["images"] // 16)
    assert asdict(qface.DistillConfig(epochs=settings["epochs"], max_steps=8)).items() <= settings.items()


def test_a_killed_run_resumes(student: Path) -> None:
    arguments = (*distilling(student), "--max-steps", "2", "--run-dir", "run", "-o", "trained.safetensors")
    assert run(*arguments).exit_code == 0
    assert provenance_of(qface.load("trained.safetensors"))[-1]["max_steps"] == 2
    assert "resume" in refusal(run(*arguments))
    assert run(*arguments, "--resume").exit_code == 0


def test_a_student_that_is_not_calibrated_is_told_the_next_command(workplace: Path) -> None:
    quantized = run("quantize", "my_networks:make", "-o", "new.safetensors")
    assert "qface calibrate new.safetensors --images FACES" in quantized.stdout
    for command in (
        (*distilling("new.safetensors"), "-o", "trained.safetensors"),
        ("export", "new.safetensors", "-o", "new.onnx"),
        ("evaluate", "new.safetensors", "--images", "crops"),
    ):
        assert "not calibrated: run qface calibrate" in refusal(run(*command))
    assert {path.suffix for path in workplace.glob("*.*")} == {".py", ".safetensors"}
    assert "run qface quantize" in refusal(
        run("calibrate", "my_networks:make", "--images", "crops", "-o", "x.safetensors")
    )


def test_calibrate_takes_its_settings(workplace: Path) -> None:
    assert run("quantize", "my_networks:make", "-o", "new.safetensors").exit_code == 0
    arguments = ("calibrate", "new.safetensors", "--images", "crops", "-o", "student.safetensors")
    options = ("--num-images", "8", "--no-equalize", "--no-gptq", "--json")
    result = run(*arguments, *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["output"] == "student.safetensors"
    settings = provenance_of(qface.load("student.safetensors"))[-1]
    assert {"images": 8, "equalize": False, "gptq": False, "correct_biases": True}.items() <= settings.items()
    assert "num_images" in refusal(run(*arguments, "--num-images", "0"))


BAD_TRAINING = (
    (("--lr", "-1"), "learning_rate"),
    (("--lr", "nan"), "learning_rate"),
    (("--epochs", "0"), "epochs"),
    (("--batch-size", "1"), "batch_size"),
    (("--seed", "-3"), "seed"),
    (("--device", "cuda:99"), "cuda:99"),
    (("--run-dir", "taken"), "already holds a run"),
    (("--run-dir", "my_networks.py"), "my_networks.py is not a writable folder"),
)


@pytest.mark.parametrize(
    "command",
    [
        ("prune", "my_networks:make", "--distill"),
        ("distill", "network.safetensors", "--teacher", "my_networks:make"),
    ],
    ids=["prune", "distill"],
)
@pytest.mark.parametrize(("options", "hint"), BAD_TRAINING, ids=str)
def test_bad_settings_of_training_are_told_before_images_are_looked_at(
    workplace: Path, command: tuple[str, ...], options: tuple[str, ...], hint: str
) -> None:
    qface.save(resolve_model("my_networks:make"), "network.safetensors")
    for folder in ("taken", "taken/step-1"):
        Path(folder).mkdir()
        Path(folder, "checkpoint.pt").touch()
    assert hint in refusal(run(*command, "--images", "nowhere", "-o", "student.safetensors", *options))


@pytest.mark.parametrize(
    "command",
    [("prune", "--distill"), ("distill", "none", "--teacher"), ("compress", "--bits", "6")],
    ids=lambda command: command[0],
)
def test_settings_no_network_could_be_trained_with_are_told_before_one_is_loaded(
    workplace: Path, command: tuple[str, ...]
) -> None:
    options = ("--images", "crops", "-o", "student.safetensors", "--epochs", "0")
    assert "epochs" in refusal(run(*command, "my_networks:make_nothing", *options))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("quantize", "nothing"), "nothing"),
        (("quantize", "my_networks:absent"), "absent"),
        (("quantize", "my_networks:make_number"), "int"),
        (("quantize", "no_such_module:make"), "no_such_module"),
        (("quantize", "my_networks:make", "--bits", "9"), "9"),
        (("calibrate", "student.safetensors", "--images", "absent"), "absent"),
        (("calibrate", "student.safetensors", "--images", "empty"), "empty"),
        (("calibrate", "student.safetensors", "--images", "small"), "2 of 3"),
        (("calibrate", "student.safetensors", "--images", "broken"), "2 of 3"),
        (("calibrate", "student.safetensors", "--images", "crops", "--people", "third-half"), "third-half"),
    ],
)
def test_bad_input_gets_one_line_and_no_file(
    workplace: Path, crops: Crops, arguments: tuple[str, ...], hint: str
) -> None:
    qface.save(qface.quantize(resolve_model("my_networks:make")), "student.safetensors")
    Path("empty").mkdir()
    for folder in ("small", "broken"):
        crops({"Ann": 3}, folder=folder)
    from PIL import Image

    for number in (1, 2):
        Image.new("RGB", (92, 112)).save(f"small/Ann/Ann_{number:04d}.png")
        Path(f"broken/Ann/Ann_{number:04d}.png").write_bytes(b"no image")
    before = set(Path().rglob("*"))
    assert hint in refusal(run(*arguments, "-o", "output.safetensors"))
    assert {path for path in Path().rglob("*") if "__pycache__" not in path.parts} == before


def test_an_output_folder_that_is_missing_is_refused_before_any_work(workplace: Path) -> None:
    assert "absent" in refusal(run("quantize", "my_networks:make_nothing", "-o", "absent/student.safetensors"))


def test_evaluate_refuses_a_single_identity_and_missing_pairs(student: Path, crops: Crops) -> None:
    crops({"Ann": 3}, folder="alone")
    refusal(run("evaluate", student, "--images", "alone"))
    Path("pairs.txt").write_text("1\t1\nAnn\t1\t9\nAnn\t1\tZoe\t1\n")
    line = refusal(run("evaluate", student, "--images", "crops", "--pairs", "pairs.txt"))
    assert "2" in line
    assert "absent.txt" in refusal(run("evaluate", student, "--images", "crops", "--pairs", "absent.txt"))


def test_weights_beside_a_file_and_impossible_bits_are_refused(student: Path) -> None:
    output = ("-o", "out.safetensors")
    assert "already contains weights" in refusal(run("quantize", student, "--weights", "none.pth", *output))
    assert "0" in refusal(run("quantize", "my_networks:make", "--weight-bits", "0", *output))


def test_sensitivity_prints_every_layer_and_draws_a_figure(workplace: Path) -> None:
    arguments = ("sensitivity", "my_networks:make", "--images", "crops", "--people", "first-half")
    result = run(*arguments, "--figure", "figure.png", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["images"] == 16
    assert [layer["name"] for layer in record["layers"]] == ["0", "5"]
    assert Path("figure.png").read_bytes().startswith(b"\x89PNG")
    printed = run(*arguments)
    assert "one weight quantized" in printed.stdout
    assert "one activation quantized" in printed.stdout
    assert "figure.txt" in refusal(run(*arguments, "--figure", "figure.txt"))


def test_prune_says_what_is_left_and_its_file_goes_on(workplace: Path) -> None:
    faces = ("--images", "crops", "--people", "first-half")
    network = ("my_networks:make", "--ratio", "0.5")
    options = (*network, "--distill", "--iterative-steps", "2", "--batch-size", "8", "--epochs", "1")
    result = run("prune", *options, *faces, "-o", "pruned.safetensors", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["after"]["parameters"] == 4 * 28 + 4 * 2 + 4 + 4 * 16 + 16
    assert record["after"]["macs"] < record["before"]["macs"]
    last = provenance_of(qface.load("pruned.safetensors"))[-1]
    assert last.items() >= (asdict(qface.DistillConfig(epochs=1, batch_size=8)) | {"step": "distill"}).items()
    calibrated("pruned.safetensors")
    table = run("prune", "my_networks:make", "--mb", "0.001", "-o", "small.safetensors")
    assert table.exit_code == 0, table.output
    assert "MACs" in table.stdout


@pytest.mark.parametrize("options", [("--run-dir", "run"), ("--run-dir", "run", "--resume")], ids=str)
def test_a_run_without_training_is_refused(workplace: Path, options: tuple[str, ...]) -> None:
    network = ("my_networks:make", "--images", "crops", "-o", "out.safetensors")
    assert "--distill" in refusal(run("prune", *network, "--no-distill", *options))
    assert not Path("run").exists()


def test_prune_refuses_what_contradicts(workplace: Path, student: Path) -> None:
    network = ("prune", "my_networks:make", "-o", "pruned.safetensors")
    assert "--ratio" in refusal(run(*network, "--ratio", "0.2", "--macs", "1e6"))
    assert "--images" in refusal(run(*network, "--distill"))
    assert "float network" in refusal(run("prune", student, "-o", "pruned.safetensors"))
    assert not Path("pruned.safetensors").exists()


def test_bits_of_a_budget_are_quantized(workplace: Path) -> None:
    arguments = ("allocate-bits", "my_networks:make", "--images", "crops", "--num-images", "4")
    result = run(*arguments, "--budget-mb", "0.015", "-o", "bits.json")
    assert result.exit_code == 0, result.output
    assert "qface quantize my_networks:make --config bits.json" in result.stdout
    assert run("export", calibrated("my_networks:make", "--config", "bits.json"), "-o", "student.onnx").exit_code == 0
    assert Path("student.onnx").stat().st_size <= 15_000
    assert "budget_mb must be >= " in refusal(run(*arguments, "--budget-mb", "0.001", "-o", "other.json"))
    for option in (("--bits", "4"), ("--weight-bits", "4"), ("--activation-bits", "4"), ("--ignored-layers", "0")):
        both = ("my_networks:make", "--config", "bits.json", *option, "-o", "other.safetensors")
        assert f"leave out {option[0]}" in refusal(run("quantize", *both))
    assert not list(workplace.glob("other.*"))


def test_the_installed_commands_run() -> None:
    for command in (("-m", "qface", "--version"), ("-m", "qface", "--help")):
        finished = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
        assert "qface" in finished.stdout


def test_templates_are_verified_by_either_protocol(workplace: Path) -> None:
    SmallIjb(workplace / "IJBC")
    arguments = ("ijb", "my_networks:make", "--data", "IJBC", "--run-dir", "run")
    result = run(*arguments, "--protocol", "arcface", "--detector-score", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["protocol"], record["flip"], record["detector_score"]) == ("arcface", False, True)
    assert record["templates"] == 18
    table = run(*arguments)
    assert table.exit_code == 0, table.output
    assert "protocol paper, neither flip nor detector score" in " ".join(table.stdout.split())
    assert "rank 1, mean" in table.stdout
    assert "other images or settings" in refusal(run(*arguments, "--flip"))


def test_photos_are_aligned_by_their_landmarks(workplace: Path) -> None:
    written = SmallIjb(workplace / "IJBC")
    landmarks = workplace / "IJBC" / "meta" / "ijbc_name_5pts_score.txt"
    arguments = ("align", "IJBC/loose_crop", "-o", "faces", "--landmarks", landmarks)
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["aligned"] == len(written.rows)
    assert "aligned before" in run(*arguments).stdout
    assert "is not a folder" in refusal(run("align", "nowhere", "-o", "faces"))


def test_an_onnx_file_is_a_network_to_quantize(student: Path) -> None:
    assert run("export", student, "-o", "student.onnx").exit_code == 0
    assert "is quantized already" in refusal(run("quantize", "student.onnx", "-o", "again.safetensors"))
    qface.export(resolve_model("my_networks:make"), "float.onnx")
    result = run("quantize", "float.onnx", "-o", "again.safetensors")
    assert result.exit_code == 0, result.output
