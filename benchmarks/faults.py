"""Disturb commands with random signals, a full disk or a second process, and check their files.

    python benchmarks/faults.py [--rounds 20] [--seed 0] [--only align]... [--json]

Commands run on a tiny network and a few noise images. Each runs in a fork of this process, so that disturbances hit
the work of the command and not the import of torch. After a disturbance every output must be absent, unchanged, or
byte-identical to the output of an undisturbed run, and no traceback may be printed. The command is then repeated: it
must succeed with the same files as the undisturbed run and leave no others, not even temporary ones. Otherwise the
exit code is 1.

A full disk is a small tmpfs if this process may mount one (as root), else a limit on the file size.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from harness.benchmark_command import BenchmarkCommand
from harness.report_files import terminal_table
from PIL import Image
from rich.console import Console
from torch import nn

import qface
from qface.cli import main as command_line
from qface.data import ARCFACE_LANDMARKS
from qface.progress import track
from qface.signals import ended_by_signals

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
DISTURBANCES = (*SIGNALS, "full disk", "two at once")
TRACES = ("Traceback", "Exception ignored", "Aborted")
PAGE = 4096
ROOM = 64 * 2**20
OLD = b"an old file"
IMPORTED = ("qface.api", "onnxruntime", "torch._dynamo")
"""Imported before the forks, since otherwise every command would spend most of its time on these imports."""


@dataclass(frozen=True)
class Job:
    """A command that runs in a folder with ``out`` for its outputs and ``tmp`` for temporary files.

    Args:
        name: name of the command and its variant.
        run: function that the process calls.
        outputs: files in ``out`` that some cases create with old content before the run.
        given: inputs that the command changes; they are copied to ``out``.
        kept: run folders in ``out``; their files may be incomplete until the command ends.
    """

    name: str
    run: Callable[[], object]
    outputs: tuple[str, ...] = ()
    given: tuple[Path, ...] = ()
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ended:
    """Exit code of a process (``-number`` after a fatal signal) and its output."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Undisturbed:
    """Result of an undisturbed job: digest of each output file, standard output, and duration."""

    files: dict[str, str]
    printed: str
    seconds: float


@dataclass
class Tally:
    """Number of cases per disturbance and outcome, and the findings."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


# ---- processes


class Running:
    """A job in a child process; its output goes to files next to the folder ``case``.

    Args:
        job: job to run.
        case: working directory.
        limit: maximum size in bytes of any file it writes.
    """

    def __init__(self, job: Job, case: Path, limit: int | None = None) -> None:
        handle, name = tempfile.mkstemp(dir=case.parent)
        os.close(handle)
        self._printed = Path(name), Path(f"{name}.err")
        self._printed[1].touch()  # the child may be killed before it opens the file
        # Block signals until the child handles them: before that the child would run the handlers of this process.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        self.pid = os.fork()
        if self.pid == 0:
            self._run_in_child(job, case, limit)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))

    def _run_in_child(self, job: Job, case: Path, limit: int | None) -> None:
        code = 1
        try:
            for path, number in zip(self._printed, (1, 2), strict=True):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os.chdir(case)
            tempfile.tempdir = str(case / "tmp")
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            with ended_by_signals():
                signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
                job.run()
            code = 0
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def end(self, at: float | None = None, name: str = "SIGKILL") -> Ended:
        """Wait for the process to end; send it the signal ``name`` if it still runs after ``at`` seconds."""
        deadline = None if at is None else time.monotonic() + at
        while deadline is not None and time.monotonic() < deadline:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                return self._ended(status)
            time.sleep(0.001)
        if deadline is not None:
            os.kill(self.pid, getattr(signal, name))
        return self._ended(os.waitpid(self.pid, 0)[1])

    def _ended(self, status: int) -> Ended:
        printed, told = (path.read_text(errors="replace") for path in self._printed)
        for path in self._printed:
            path.unlink()
        return Ended(os.waitstatus_to_exitcode(status), printed, told)


# ---- files and undisturbed runs


def files_in(folder: Path) -> dict[str, str]:
    """Map the relative path of each file in ``folder`` and its subfolders to its digest.

    The path of the folder itself, which the record of a compression holds, does not count.
    """
    own = str(folder.resolve()).encode()
    contents = {path: path.read_bytes().replace(own, b"") for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(content).hexdigest() for path, content in contents.items()
    }


def is_emptied(folder: Path) -> bool:
    """Return True when ``folder`` is empty, at the latest after 10 s.

    The workers of a killed process end by themselves within 5 s, and then remove their folders.
    """
    deadline = time.monotonic() + 10
    while any(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(folder.iterdir())


def comparable(printed: str) -> str:
    """Return standard output without the field ``seconds``, which differs between runs."""
    try:
        record = json.loads(printed)
    except ValueError:
        return printed
    record.pop("seconds", None)
    return json.dumps(record)


def prepared(job: Job, case: Path, old: bool) -> dict[str, str]:
    """Create the folder of a case, with old outputs if ``old``; return the digests of files in ``out``."""
    for name in ("out", "tmp"):
        (case / name).mkdir(parents=True)
    for source in job.given:
        shutil.copy(source, case / "out")
    for name in job.outputs if old else ():
        (case / "out" / name).write_bytes(OLD)
    return files_in(case / "out")


def undisturbed(job: Job, root: Path) -> Undisturbed:
    """Run ``job`` twice and return the second result, since only the first run includes imports."""
    for number in range(2):
        case = root / f"{job.name}-{number}"
        prepared(job, case, old=False)
        start = time.monotonic()
        ended = Running(job, case).end()
        if ended.code != 0:
            raise click.ClickException(f"{job.name} fails undisturbed: {ended.stderr}")
    return Undisturbed(files_in(case / "out"), comparable(ended.stdout), time.monotonic() - start)


# ---- disturbances


class Cases:
    """Test cases of one job.

    Args:
        job: job to disturb.
        alone: result of the undisturbed job.
        root: parent folder of the cases.
        draw: random generator for times, sizes and old outputs.
    """

    def __init__(self, job: Job, alone: Undisturbed, root: Path, draw: random.Random) -> None:
        self.job = job
        self.alone = alone
        self.root = root
        self.draw = draw
        self.tally = Tally()

    def disturb(self, disturbance: str) -> None:
        """Run the job with one disturbance, then repeat it without; record what is wrong with either run."""
        case = Path(tempfile.mkdtemp(dir=self.root)) / "case"
        case.mkdir()
        before, now = len(self.tally.findings), f"{self.job.name}, {disturbance}"
        try:
            if disturbance == "full disk":
                self._fill(case, now)
            elif disturbance == "two at once":
                self._run_two(case, now)
            else:
                self._kill(case, now, disturbance)
        finally:
            if len(self.tally.findings) == before:
                shutil.rmtree(case.parent, ignore_errors=True)

    def _kill(self, case: Path, now: str, name: str) -> None:
        at = self.draw.uniform(0, 1.1 * self.alone.seconds)
        now = f"{now} after {at:.3f} s"
        start = prepared(self.job, case, self.draw.random() < 0.5)
        ended = Running(self.job, case).end(at, name)
        number = getattr(signal, name)
        # The code is -number if the signal came before the command installed its handlers or after it removed them.
        if ended.code not in (0, -number, 128 + number):
            self._add_finding(now, f"exits with {ended.code}: {ended.stderr[-300:]}")
        self._check_files(case, now, start, ended, leaves=name == "SIGKILL")
        self._check_repetition(case, now)

    def _run_two(self, case: Path, now: str) -> None:
        start = prepared(self.job, case, self.draw.random() < 0.5)
        one = Running(self.job, case)
        time.sleep(self.draw.uniform(0, self.alone.seconds))
        other = Running(self.job, case)
        both = [other.end(), one.end()]
        for ended in both:
            refused = ended.code == 2 and "another run is writing to" in ended.stderr
            if ended.code != 0 and not refused:
                self._add_finding(now, f"exits with {ended.code}: {ended.stderr[-300:]}")
            self._check_files(case, now, start, ended, leaves=False)
        if all(ended.code for ended in both):
            self._add_finding(now, "neither succeeds")
        self._check_repetition(case, now)

    def _fill(self, case: Path, now: str) -> None:
        largest = max([PAGE, *(path.stat().st_size for path in self._kept_files())])
        with small_disk(case) as resize:
            start = prepared(self.job, case, self.draw.random() < 0.5)
            room = self.draw.randrange(largest * 2)
            if resize is not None:
                taken = sum(path.stat().st_size + PAGE for path in case.rglob("*"))
                resize(taken + PAGE + room)
            ended = Running(self.job, case, limit=room if resize is None else None).end()
            now = f"{now}, room for {room}"
            if ended.code not in (0, 2) or (ended.code == 2 and ended.stderr.count("Error:") != 1):
                self._add_finding(now, f"exits with {ended.code}: {ended.stderr[-300:]}")
            self._check_files(case, now, start, ended, leaves=False)
            if resize is not None:
                resize(ROOM)
            self._check_repetition(case, now)

    def _kept_files(self) -> Iterator[Path]:
        done = self.root / f"{self.job.name}-1"
        return (path for path in done.rglob("*") if path.is_file())

    def _check_files(self, case: Path, now: str, start: dict[str, str], ended: Ended, leaves: bool) -> None:
        """Compare the files after a disturbance with those before it and with the undisturbed run."""
        for trace in TRACES:
            if trace in ended.stderr:
                self._add_finding(now, f"prints {ended.stderr[-600:]}")
        out = files_in(case / "out")
        for name, digest in out.items():
            is_temporary = name.rpartition("/")[2].startswith(".qface-")
            if is_temporary and not leaves:
                self._add_finding(now, f"leaves {name}")
            if not (is_temporary or name.startswith(self.job.kept)) and digest not in (
                *(found.get(name) for found in (start, self.alone.files)),
            ):
                self._add_finding(now, f"{name} is neither absent, old nor complete")
        if not leaves and any((case / "tmp").iterdir()):
            self._add_finding(now, "leaves temporary files")
        done = all(out.get(name) == digest for name, digest in self.alone.files.items())
        outcome = "complete" if done and out else "as before" if out == start else "part of it"
        self.tally.outcomes[now.split(", ")[1].split(" after")[0], outcome] += 1

    def _check_repetition(self, case: Path, now: str) -> None:
        ended = Running(self.job, case).end()
        found = files_in(case / "out")
        if ended.code != 0:
            self._add_finding(now, f"the next run exits with {ended.code}: {ended.stderr[-300:]}")
        elif found != self.alone.files:
            differing = sorted(name for name, _ in found.items() ^ self.alone.files.items())
            self._add_finding(now, f"the next run ends with other files: {', '.join(differing)}")
        elif comparable(ended.stdout) != self.alone.printed and not self.job.kept and "align" not in self.job.name:
            self._add_finding(now, f"the next run prints {ended.stdout[-300:]}")
        if not is_emptied(case / "tmp"):
            self._add_finding(now, "the next run leaves temporary files")

    def _add_finding(self, now: str, what: str) -> None:
        self.tally.findings.append(f"{now}: {what.strip()}")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[int], None] | None]:
    """Mount a tmpfs and yield a function that sets its size in bytes, or None if mounting fails."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "qface-faults", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        yield None
        return

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # lazy: a child may still run after Ctrl-C


# ---- inputs and jobs


def write_inputs(folder: Path) -> None:
    """Write a network, its student, the student's ONNX file, noise crops and IJB-C templates."""
    draw = np.random.default_rng(0)
    write_crops(folder / "crops", draw)
    (folder / "tuning.txt").write_text("p0\np1\n")
    (folder / "held_out.txt").write_text("p2\np3\np4\np5\n")  # 150 impostor pairs
    write_templates(folder / "ijb", draw)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 4, 1, bias=False), nn.BatchNorm2d(8), nn.PReLU(8), nn.MaxPool2d(4)]
    layers += [nn.Conv2d(8, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.PReLU(16), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(16 * 7 * 7, 16)).eval()
    teacher = qface.with_preprocessing(network, qface.Preprocessing(source="user"))
    student = qface.calibrate(qface.quantize(teacher), folder / "crops")
    qface.save(teacher, folder / "teacher.safetensors")
    qface.save(student, folder / "student.safetensors")
    qface.export(student, folder / "student.onnx")


def write_crops(folder: Path, draw: np.random.Generator) -> None:
    """Write five noise crops for each of six identities."""
    for person in range(6):
        (folder / f"p{person}").mkdir(parents=True)
        for number in range(5):
            save_noise(folder / f"p{person}" / f"{number}.png", draw, 112)


def write_templates(folder: Path, draw: np.random.Generator) -> None:
    """Write noise photos with landmarks, as eight IJB-C templates of three; two templates per identity."""
    (folder / "loose_crop").mkdir(parents=True)
    (folder / "meta").mkdir()
    points = " ".join(f"{value:.3f}" for value in (ARCFACE_LANDMARKS + 20).ravel())
    faces = [(f"{number}.png", number // 3, number) for number in range(24)]
    for file, _, _ in faces:
        save_noise(folder / "loose_crop" / file, draw, 160)
    lists = {
        "ijbc_name_5pts_score.txt": [f"{file} {points} 0.9" for file, _, _ in faces],
        "ijbc_face_tid_mid.txt": [" ".join(map(str, face)) for face in faces],
        "ijbc_template_pair_label.txt": [f"{a} {b} {int(a // 2 == b // 2)}" for a in range(8) for b in range(a)],
        "landmarks.txt": [f"{file} {points}" for file, _, _ in faces],
    }
    for name, lines in lists.items():
        (folder / "meta" / name).write_text("\n".join(lines) + "\n")


def save_noise(path: Path, draw: np.random.Generator, side: int) -> None:
    """Write a square noise image with ``side`` pixels per side."""
    Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


def jobs_on(inputs: Path) -> list[Job]:
    """Return a job for every command that writes files or runs long."""
    crops, teacher, student = (str(inputs / name) for name in ("crops", "teacher.safetensors", "student.safetensors"))
    ijb, files = str(inputs / "ijb"), ("new.safetensors",)

    def qface_of(*arguments: str) -> Callable[[], object]:
        return lambda: command_line([*arguments], prog_name="qface")

    images, output, own_run = ("--images", crops), ("-o", "out/new.safetensors"), ("new.safetensors.run/",)
    training = ("--batch-size", "8", "--epochs", "2")
    run = ("--run-dir", "out/run", "--resume")
    people = ("--people", str(inputs / "tuning.txt"), "--eval-people", str(inputs / "held_out.txt"))
    fixed_bits = (*people, "--bits", "6", "--at-fpr", "1e-1", "--num-images", "8")
    distill = ("distill", student, *images)
    few_images = ("--num-images", "6", "--num-steps", "3", "--batch-size", "2")
    prune, taught = ("prune", teacher, *images, "--json"), ("--teacher", teacher)
    return [
        Job("quantize", qface_of("quantize", teacher, *output), files),
        Job("calibrate", qface_of("calibrate", student, *images, *output), files, kept=own_run),
        Job("prune", qface_of(*prune, *output), files),
        Job(
            "prune and distill",
            qface_of(*prune, *output, "--distill", *training, *run, "--iterative-steps", "2"),
            files,
            kept=("run/",),
        ),
        Job("distill", qface_of(*distill, *taught, *output, *training), files, kept=own_run),
        Job("distill with resume", qface_of(*distill, *taught, *output, *training, *run), files, kept=("run/",)),
        Job("distill by steps", lambda: distill_by_steps(inputs), files, kept=("run/",)),
        Job("export", qface_of("export", student, "-o", "out/new.onnx", "--no-card"), ("new.onnx",)),
        Job("export of floats", qface_of("export", teacher, "-o", "out/new.onnx", *images, "--no-card"), ("new.onnx",)),
        Job("evaluate", qface_of("evaluate", student, *images, "--json")),
        Job(
            "thresholds",
            qface_of("thresholds", student, *taught, *images, "--fpr", "0.1", "--write", "out/student.onnx", "--json"),
            given=(inputs / "student.onnx",),
        ),
        Job(
            "sensitivity",
            qface_of("sensitivity", teacher, *images, "--figure", "out/new.svg", "--json"),
            ("new.svg",),
        ),
        Job(
            "sensitivity with a run folder",
            qface_of("sensitivity", teacher, *images, *run[:2], "--json"),
            kept=("run/",),
        ),
        Job(
            "allocate-bits",
            qface_of("allocate-bits", teacher, *images, "--budget-mb", "1", "-o", "out/new.json"),
            ("new.json",),
            kept=("new.json.run/",),
        ),
        Job(
            "compress",
            qface_of("compress", teacher, *images, *fixed_bits, *training, "-o", "out/new.onnx", "--no-card", "--json"),
            ("new.onnx",),
            kept=("new.run/",),
        ),
        Job(
            "align",
            qface_of("align", f"{ijb}/loose_crop", "-o", "out", "--landmarks", f"{ijb}/meta/landmarks.txt", "--json"),
        ),
        Job("synthesize", qface_of("synthesize", teacher, "-o", "out/made", *few_images)),
        Job("ijb", qface_of("ijb", student, "--data", ijb, "--json")),
        Job("ijb with a run folder", qface_of("ijb", student, "--data", ijb, *run[:2], "--json"), kept=("run/",)),
    ]


def distill_by_steps(inputs: Path) -> None:
    """Run distillation like the command, with a checkpoint after every step."""
    config = qface.DistillConfig(batch_size=8, epochs=2, checkpoint_every=1, device="cpu")
    student, teacher = (qface.load(inputs / f"{name}.safetensors") for name in ("student", "teacher"))
    try:
        qface.distill(student, teacher, inputs / "crops", config, "out/run", resume=True)
        qface.save(student, "out/new.safetensors")
    except qface.QFaceError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)


# ---- report


@click.command(cls=BenchmarkCommand)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Cases per command and kind.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of times and sizes.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([job.name for job in jobs_on(Path())]),
    help="Command to test; repeatable.  [default: all]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def main(rounds: int, seed: int, only: tuple[str, ...], as_json: bool) -> None:
    """Run every command with each disturbance and check the files it leaves."""
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="qface-faults-"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(root / "torch")  # torch would create it in ``tmp``: a false finding
    for module in IMPORTED:
        importlib.import_module(module)
    inputs = root / "inputs"
    jobs = [job for job in jobs_on(inputs) if not only or job.name in only]
    made = Running(Job("inputs", lambda: write_inputs(inputs)), _new_case(root)).end()
    if made.code != 0:
        raise click.ClickException(made.stderr)
    cases = [Cases(job, undisturbed(job, root), root, random.Random(f"{seed} {job.name}")) for job in jobs]
    wanted = [(each, disturbance) for _ in range(rounds) for each in cases for disturbance in DISTURBANCES]
    for each, disturbance in track(wanted, "disturb"):
        each.disturb(disturbance)
    findings = [finding for each in cases for finding in each.tally.findings]
    show(cases, findings, as_json)
    if findings:
        click.echo(f"the files of the failed cases are in {root}", err=True)
        raise click.exceptions.Exit(1)
    shutil.rmtree(root)


def _new_case(root: Path) -> Path:
    case = root / "making"
    (case / "tmp").mkdir(parents=True)
    return case


def show(cases: list[Cases], findings: list[str], as_json: bool) -> None:
    """Print the number of cases per outcome for each command and disturbance, and the findings."""
    rows = [
        {"command": each.job.name, "disturbance": disturbance, "seconds": each.alone.seconds}
        | {outcome: each.tally.outcomes[disturbance, outcome] for outcome in ("as before", "part of it", "complete")}
        for each in cases
        for disturbance in DISTURBANCES
    ]
    if as_json:
        click.echo(json.dumps({"rows": rows, "findings": findings}))
        return
    cells: list[list[Any]] = [
        [f"{row[key]:.2f}" if key == "seconds" else str(row[key]) for key in rows[0]] for row in rows
    ]
    Console(width=120).print(terminal_table("Disturbed commands", list(rows[0]), cells))
    for finding in findings:
        click.echo(f"FOUND: {finding}")


if __name__ == "__main__":
    with ended_by_signals():  # otherwise a signal would leave a disk mounted
        main()
