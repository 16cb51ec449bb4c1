"""Fuzz the file readers: read randomly changed files in processes of their own.

    python benchmarks/fuzz.py [--cases 200] [--seed 0] [--per-process 1] [--readers onnx,checkpoint] [--keep FOLDER]
        [--json]

Each case is a valid file with changed bytes, fields, opcodes, zip members or values. The reader may read it or refuse
it with a one-line error. Anything else is a finding: a traceback, a crash, more than 10 seconds, or over 1 GiB more
memory than for the valid file. Files of findings are kept, and the exit code is then 1.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
import io
import itertools
import json
import pickle
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import numpy as np
import torch
from harness.benchmark_command import BenchmarkCommand
from harness.confinement import Outcome, confined, confined_calls
from harness.mutations import (
    Mutation,
    bytes_changed,
    json_changed,
    lines_changed,
    onnx_changed,
    pickle_changed,
    safetensors_changed,
    zip_changed,
)
from harness.report_files import terminal_table
from PIL import Image
from rich.console import Console
from torch import nn

import qface
from qface.checkpoint_file import read_checkpoint, write_checkpoint
from qface.compression.run_record import RunRecord
from qface.data import ImageFolder, read_landmarks
from qface.data.groups import read_groups
from qface.data.identities import select_identities
from qface.data.pairs import read_pairs
from qface.data.records import RecordImages
from qface.data.templates import people_of, read_templates
from qface.data.verification_bin import VerificationBin
from qface.deployment.runtime import OnnxEmbedder
from qface.preprocessing import Preprocessing, preprocessing_of, with_preprocessing
from qface.progress import track
from qface.reporting.run_files import read_training

SECONDS, MEMORY = 10.0, 2**30
SIZE = (16, 16)
HEADINGS = ("reader", "cases", "read", "refused", "findings", "slowest", "most memory")


@dataclass(frozen=True)
class Reader:
    """A file reader under test.

    Args:
        ending: file name extension with the dot.
        write: writes a valid file.
        read: reads a file.
        mutations: changes of the file content; each case draws one.
    """

    ending: str
    write: Callable[[Path], None]
    read: Callable[[Path], object]
    mutations: tuple[Mutation, ...]


@dataclass
class Row:
    """Results of one reader.

    Args:
        reader: reader name.
        cases: number of cases.
        kinds: number of cases per ``kind`` of :class:`Outcome`.
        seconds: duration of the slowest case.
        memory: maximum memory growth of a case in bytes.
        findings: path of each kept file and its finding.
    """

    reader: str
    cases: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    memory: int = 0
    findings: list[str] = field(default_factory=list)

    def cells(self) -> Sequence[str]:
        """Return the cells of the table row."""
        read, refused = (self.kinds.get(kind, 0) for kind in ("read", "refused"))
        numbers = (self.cases, read, refused, len(self.findings))
        return self.reader, *map(str, numbers), f"{self.seconds:.1f} s", f"{self.memory / 1e6:.0f} MB"


# ---- valid files


class Net(nn.Module):
    """Small network with two convolutions, so that its files are small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.slope = nn.PReLU(4)
        self.last = nn.Conv2d(4, 4, 3, 2, 1, groups=2)
        self.linear = nn.Linear(64, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return embeddings ``[N, 8]`` of ``images`` ``[N, 3, 16, 16]``."""
        x = self.slope(self.norm(self.conv(images)))
        return self.linear(self.last(x).flatten(1))  # type: ignore[no-any-return]


@functools.cache
def network() -> nn.Module:
    """Return the network with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return with_preprocessing(Net(), Preprocessing(size=SIZE, source="file")).eval()


@functools.cache
def student() -> nn.Module:
    """Return the network quantized to 6 bits and calibrated on noise."""
    made = qface.quantize(network(), 6)
    generator = torch.Generator().manual_seed(0)
    return qface.calibrate(made, torch.randint(0, 256, (16, 3, 112, 112), dtype=torch.uint8, generator=generator))


def _write_legacy(path: Path) -> None:
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=False)


def _write_arrays(path: Path) -> None:
    arrays = {name: value.numpy() for name, value in network().state_dict().items()}
    torch.save({"state_dict": arrays, "epoch": 3}, path)


def _write_program(path: Path) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(network(), (torch.zeros(2, 3, *SIZE),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


def _write_float_onnx(path: Path) -> None:
    qface.export(network(), path)


def _write_integers(path: Path) -> None:
    qface.export(student(), path)


def _crop(number: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def _write_bin(path: Path) -> None:
    images = [np.frombuffer(_crop(0), np.uint8), *(_crop(number) for number in range(1, 8))]
    path.write_bytes(pickle.dumps((images, [True, False] * 2), 2))


def _write_photo(path: Path) -> None:
    path.write_bytes(_crop(0))
    path.with_name("landmarks.txt").write_text(f"{path.name} 30 40 70 40 50 60 35 80 65 80\n")


def _write_image(path: Path) -> None:
    path.write_bytes(_crop(0, "PNG"))


def _record(number: int) -> bytes:
    data = struct.pack("<IfQQ", 0, number // 2, number, 0) + _crop(number)
    return struct.pack("<II", 0xCED7230A, len(data)) + data + bytes(-len(data) % 4)


def _write_records(path: Path) -> None:
    path.write_bytes(b"".join(map(_record, range(4))))


def _write_pairs(path: Path) -> None:
    lines = [f"Ann_{number}\t{number}\t{number + 1}" for number in range(1, 4)]
    lines += [f"Ann_{number}\t1\tBob_{number}\t2" for number in range(1, 4)]
    path.write_text("1\t3\n" + "\n".join(lines) + "\n", encoding="utf-8")


def _write_landmarks(path: Path) -> None:
    path.write_text("".join(f"{number}.jpg 30 40 70 40 50 60 35 80 65 80 0.9\n" for number in range(5)))


def _write_index(path: Path) -> None:
    _write_records(path.with_suffix(".rec"))
    offsets = itertools.accumulate((len(_record(number)) for number in range(3)), initial=0)
    path.write_text("".join(f"{number}\t{offset}\n" for number, offset in enumerate(offsets)))


def _write_sllfw(path: Path) -> None:
    path.write_text("".join(f"{name}/{name}_{number:04d}.jpg\n" for name in ("Ann", "Bob") for number in (1, 2)))


def _write_flagged(path: Path) -> None:
    path.write_text("first,second,same\n" + "".join(f"a/{number}.png,b/1.png,{number % 2}\n" for number in range(6)))


def _write_dictionaries(path: Path) -> None:
    names = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
    places = ((30, 40), (70, 40), (50, 60), (35, 80), (65, 80))
    face = {"box": [20, 20, 60, 80], "keypoints": dict(zip(names, places, strict=True)), "confidence": 0.99}
    path.write_text(json.dumps({f"{number}.jpg": [face] for number in range(4)}))


def _write_people(path: Path) -> None:
    path.write_text("Ann\nBob\n")


def _write_groups(path: Path) -> None:
    for name in ("Ann", "Bob"):
        (path.parent / "faces" / name).mkdir(parents=True)
        (path.parent / "faces" / name / "1.png").write_bytes(_crop(0, "PNG"))
    path.write_text("Ann,old\nBob,young\n")


def _write_templates(path: Path) -> None:
    meta = path.parent / "ijb" / "meta"
    meta.mkdir(parents=True)
    (meta.parent / "loose_crop").mkdir()
    points = "30 40 70 40 50 60 35 80 65 80 0.9"
    (meta / "ijbc_name_5pts_score.txt").write_text("".join(f"{number}.jpg {points}\n" for number in range(6)))
    (meta / "ijbc_face_tid_mid.txt").write_text("".join(f"{n}.jpg {n // 2} {n}\n" for n in range(6)))
    path.write_text("0 1 1\n0 2 0\n1 2 0\n")


def _write_bits(path: Path) -> None:
    overrides = {"conv": qface.LayerBits(8, 6), "linear": qface.LayerBits(4)}
    qface.save_bits(qface.QuantizationConfig(4, 8, overrides, ignored_layers=("fc.*",)), path)


def _write_checkpoint(path: Path) -> None:
    state = {"step": 3, "total": 9, "student": dict(network().state_dict()), "objective": {}, "optimizer": {"lr": 0.1}}
    write_checkpoint(path, {"format": 2, "config": {"epochs": 1}, "inputs": {"images": "ab"}, "state": state})


def _write_log(path: Path) -> None:
    path.write_text("".join(json.dumps({"step": step, "loss": 1 / (step + 1), "lr": 0.1}) + "\n" for step in range(5)))


def _write_run(path: Path) -> None:
    trial = {"name": "w6a8", "mb": 1.0, "passes": True, "misses": []}
    record = RunRecord("teacher.safetensors", "student.safetensors", "student.onnx", "faces", eval_people="second-half")
    folder = path.parent / "run"
    dataclasses.replace(record, trials=(trial,)).write(folder).replace(path)


# ---- reading


def _run(model: nn.Module) -> None:
    with torch.no_grad():
        model(torch.zeros(2, 3, *preprocessing_of(model).size))


def _load(path: Path) -> None:
    _run(qface.load(path))


def _fill(path: Path) -> None:
    qface.load(path, model=Net())


def _embed(path: Path) -> None:
    embedder = OnnxEmbedder(path, threads=1)
    embedder(torch.zeros(2, 3, *embedder.preprocessing.size))


def _inspect(path: Path) -> None:
    qface.thresholds_of(path)
    qface.measure_size(path)


def _read_bin(path: Path) -> None:
    images = VerificationBin(path)
    images.read(range(len(images)))


def _read_records(path: Path) -> None:
    images = RecordImages(path)
    images.read(range(len(images)))


def _read_folder(path: Path) -> None:
    images = ImageFolder(path.parent)
    images.read(range(len(images)))


def _read_index(path: Path) -> None:
    _read_records(path.with_suffix(".rec"))


def _select_people(path: Path) -> None:
    select_identities(["Ann", "Bob", "Cid"], path)


def _read_groups(path: Path) -> None:
    read_groups(path, ImageFolder(path.parent / "faces"))


def _read_templates(path: Path) -> None:
    root = path.parent / "ijb"
    shutil.copy(path, root / "meta" / "ijbc_template_pair_label.txt")
    people_of(read_templates(root))


def _read_run(path: Path) -> None:
    folder = path.parent / "run"
    shutil.copy(path, folder / "run.json")
    RunRecord.read(folder)


def _align(path: Path) -> None:
    with tempfile.TemporaryDirectory() as crops:
        qface.align(path.parent, crops, path.with_name("landmarks.txt"))


def _test_itself(path: Path) -> None:
    qface.selftest(path)


_IN_ZIP = functools.partial(zip_changed, inner={"data.pkl": pickle_changed, ".json": json_changed})
_TENSORS = (bytes_changed, _IN_ZIP, _IN_ZIP)
READERS = {
    "checkpoint": Reader(".pth", lambda path: torch.save(network().state_dict(), path), _fill, _TENSORS),
    "legacy checkpoint": Reader(".pth", _write_legacy, _fill, (bytes_changed, pickle_changed)),
    "arrays": Reader(".pth", _write_arrays, _fill, _TENSORS),
    "module": Reader(".pth", lambda path: torch.save(network(), path), _fill, _TENSORS),
    "safetensors": Reader(
        ".safetensors", lambda path: qface.save(network(), path), _fill, (bytes_changed, safetensors_changed)
    ),
    "saved graph": Reader(
        ".safetensors", lambda path: qface.save(network(), path), _load, (bytes_changed, *[safetensors_changed] * 4)
    ),
    "saved student": Reader(
        ".safetensors", lambda path: qface.save(student(), path), _load, (bytes_changed, *[safetensors_changed] * 4)
    ),
    "exported program": Reader(".pt2", _write_program, _load, _TENSORS),
    "onnx": Reader(".onnx", _write_float_onnx, _load, (bytes_changed, *[onnx_changed] * 4)),
    "embedder": Reader(".onnx", _write_integers, _embed, (bytes_changed, *[onnx_changed] * 4)),
    "float embedder": Reader(".onnx", _write_float_onnx, _embed, (bytes_changed, *[onnx_changed] * 4)),
    "size and metadata": Reader(".onnx", _write_integers, _inspect, (bytes_changed, onnx_changed)),
    "verification set": Reader(".bin", _write_bin, _read_bin, (bytes_changed, pickle_changed)),
    "records": Reader(".rec", _write_records, _read_records, (bytes_changed,)),
    "images": Reader(".png", _write_image, _read_folder, (bytes_changed,)),
    "pairs": Reader(".txt", _write_pairs, read_pairs, (bytes_changed, lines_changed)),
    "CSV pairs": Reader(".csv", _write_flagged, read_pairs, (bytes_changed, lines_changed)),
    "SLLFW pairs": Reader(".txt", _write_sllfw, read_pairs, (bytes_changed, lines_changed)),
    "index of records": Reader(".idx", _write_index, _read_index, (bytes_changed, lines_changed)),
    "people": Reader(".txt", _write_people, _select_people, (bytes_changed, lines_changed)),
    "groups": Reader(".csv", _write_groups, _read_groups, (bytes_changed, lines_changed)),
    "pairs of templates": Reader(".txt", _write_templates, _read_templates, (bytes_changed, lines_changed)),
    "photo": Reader(".jpg", _write_photo, _align, (bytes_changed,)),
    "self-test": Reader(".onnx", _write_integers, _test_itself, (bytes_changed, *[onnx_changed] * 4)),
    "bits": Reader(".json", _write_bits, qface.load_bits, (bytes_changed, *[json_changed] * 4)),
    "checkpoint of a run": Reader(".pt", _write_checkpoint, read_checkpoint, _TENSORS),
    "training log": Reader(".jsonl", _write_log, read_training, (bytes_changed, lines_changed)),
    "run record": Reader(".json", _write_run, _read_run, (bytes_changed, *[json_changed] * 4)),
    "landmark dictionaries": Reader(".json", _write_dictionaries, read_landmarks, (bytes_changed, *[json_changed] * 4)),
    "landmarks": Reader(".txt", _write_landmarks, read_landmarks, (bytes_changed, lines_changed)),
}


# ---- cases


def fuzz(name: str, cases: int, seed: int, keep: Path, progress: bool, per_process: int = 1) -> Row:
    """Read ``cases`` changed files with the reader ``name``; files of findings go to ``keep``."""
    reader, row = READERS[name], Row(name)
    with tempfile.TemporaryDirectory() as text:
        path = Path(text) / f"case{reader.ending}"
        reader.write(path)
        honest = path.read_bytes()
        gc.collect()
        before = confined(functools.partial(reader.read, path), SECONDS)
        if before.kind != "read":
            raise click.ClickException(f"{name} does not read a valid file: {before.message}")
        draws = [f"{seed} {name} {number}" for number in range(cases)]
        calls = [functools.partial(_read_changed, reader, path, honest, draw) for draw in draws]
        outcomes = confined_calls(calls, SECONDS, per_process)
        for number, outcome in enumerate(track(outcomes, name, total=cases)):
            row.cases += 1
            row.kinds[outcome.kind] = row.kinds.get(outcome.kind, 0) + 1
            row.seconds, row.memory = max(row.seconds, outcome.seconds), max(row.memory, outcome.memory)
            if (finding := _finding(outcome, before)) is not None:
                keep.mkdir(parents=True, exist_ok=True)
                kept = keep / f"{name.replace(' ', '_')}_{seed}_{number}{reader.ending}"
                kept.write_bytes(_changed(reader, honest, draws[number]))
                row.findings.append(f"{kept}: {finding}")
    return row


def _read_changed(reader: Reader, path: Path, honest: bytes, draw: str) -> None:
    path.write_bytes(_changed(reader, honest, draw))
    reader.read(path)


def _changed(reader: Reader, honest: bytes, draw: str) -> bytes:
    """Return ``honest`` with the change that the seed ``draw`` selects."""
    rng = random.Random(draw)
    mutation = rng.choice(reader.mutations)
    return mutation(honest, rng)


def _finding(outcome: Outcome, before: Outcome) -> str | None:
    """Describe why a case is a finding, or return None."""
    if outcome.kind not in ("read", "refused"):
        return f"{outcome.kind}: {outcome.message}"
    if outcome.memory > before.memory + MEMORY:
        return f"{outcome.memory / 1e6:.0f} MB: {outcome.message}"
    return f"several lines: {outcome.message}" if "\n" in outcome.message else None


def _chosen(text: str | None) -> list[str]:
    names = list(READERS) if text is None else [each.strip() for each in text.split(",")]
    unknown = [each for each in names if each not in READERS]
    if unknown:
        raise click.ClickException(f"there is no reader {unknown[0]!r}; choose from {', '.join(READERS)}")
    return names


@click.command(cls=BenchmarkCommand)
@click.option("--cases", type=click.IntRange(1), default=200, show_default=True, help="Changed files per reader.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the changes.")
@click.option(
    "--per-process", type=click.IntRange(1), default=1, show_default=True, help="Changed files that a process reads."
)
@click.option("--readers", help="Comma-separated names.  [default: all]")
@click.option(
    "--keep", type=click.Path(path_type=Path), default=Path("runs/fuzz"), show_default=True, help="Folder for findings."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(cases: int, seed: int, per_process: int, readers: str | None, keep: Path, as_json: bool) -> None:
    """Read changed files; report those that are neither read nor refused in one line."""
    torch.set_num_threads(1)
    names = _chosen(readers)
    for module in ("onnxruntime", "onnx.reference", "qface.models.onnx_import"):
        importlib.import_module(module)  # import before the forks, each of which would need seconds for it
    rows = [fuzz(name, cases, seed, keep, not as_json, per_process) for name in names]
    if as_json:
        click.echo(json.dumps({"seed": seed, "rows": [asdict(row) for row in rows]}))
    else:
        Console().print(terminal_table(f"seed {seed}", HEADINGS, [row.cells() for row in rows]))
        for finding in (finding for row in rows for finding in row.findings):
            click.echo(finding)
    if any(row.findings for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
