import importlib.util
import itertools
import json

import pytest
import torch
from click.testing import CliRunner

import qface
from qface.cli import main
from qface.deployment import latency, median_milliseconds
from qface.deployment.latency import Candidate, compare, open_file
from qface.errors import CheckpointError, ConfigError
from qface.preprocessing import Preprocessing, with_preprocessing
from tests.benchmarks.scripts import script
from tests.networks import tiny_face_net

SIZE = (32, 24)
RUNS = 4

benchmark = script("latency")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A network as a float file and as a packed student."""
    folder = tmp_path_factory.mktemp("latency")
    teacher = with_preprocessing(tiny_face_net(size=SIZE), Preprocessing(size=SIZE))
    student = qface.calibrate(qface.quantize(teacher, 6), torch.randint(256, (4, 3, 112, 112)).byte())
    return [qface.export(teacher, folder / "float.onnx"), qface.export(student, folder / "student.onnx")]


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self):
        self.now = 0.0
        self.slept = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.slept += seconds
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


def candidate(name, clock, seconds, calls):
    """A network whose calls take ``seconds`` in turn, and that is 2 MiB on disk."""
    seconds = itertools.cycle(seconds)

    def embed(images):
        calls.append((name, tuple(images.shape)))
        clock.now += next(seconds)

    return Candidate(name, embed, SIZE, "a provider", 2**21, 0.5)


def test_candidates_take_turns_on_batches_of_their_size(clock):
    calls = []
    compare([candidate(name, clock, [1], calls) for name in "ab"], batch=3, runs=RUNS)
    rounds = ["".join(names) for names in zip(*[(name for name, _ in calls)] * 2, strict=True)]
    assert set(rounds) == {"ab", "ba"}  # now one first, now the other
    assert {shape for _, shape in calls} == {(3, 3, *SIZE)}


def test_candidates_get_what_they_read(clock):
    seen = []

    def embed(images):
        seen.append(images)
        clock.now += 1

    compare([Candidate(kind, embed, SIZE, "a provider", 1, 0.5, kind) for kind in ("float32", "uint8")], runs=1)
    assert {images.dtype for images in seen[:2]} == {torch.float32, torch.uint8}
    assert all(images.float().std() > 0.5 for images in seen)


def test_rows_hold_median_minimum_and_the_ratio_to_the_first(clock):
    first, second = compare(
        [candidate("a", clock, [0.002], []), candidate("b", clock, [0.009, 0.001, 0.003], [])], runs=6
    )
    assert (first.median, first.minimum, first.ratio) == pytest.approx((2, 2, 1))
    assert (second.median, second.minimum, second.ratio) == pytest.approx((3, 1, 1.5))


def test_the_warm_up_is_not_counted(clock):
    slow_start = [100] * 5 + [0.002] * RUNS
    (row,) = compare([candidate("a", clock, slow_start, [])], runs=RUNS)
    assert row.median == pytest.approx(2)


@pytest.mark.parametrize(("threads", "waits"), [(1, False), (2, True)])
def test_threads_of_the_one_before_get_time_to_rest(clock, threads, waits):
    (row,) = compare([candidate("a", clock, [0.002], [])], threads=threads, runs=RUNS)
    assert (clock.slept > 0) == waits
    assert row.median == pytest.approx(2)


def test_a_row_as_plain_values(clock):
    (row,) = compare([candidate("a", clock, [0.002], [])], batch=2, runs=RUNS)
    record = json.loads(json.dumps(row.to_dict()))
    assert record["bytes"] == 2**21
    assert record["median_ms"] == pytest.approx(2) and record["load_seconds"] == 0.5
    assert (record["name"], record["provider"], record["batch"]) == ("a", "a provider", 2)


@pytest.mark.parametrize("setting", [{"threads": 0}, {"batch": 0}, {"runs": -1}])
def test_counts_below_one_are_refused(clock, setting):
    with pytest.raises(ConfigError, match="must be an integer >= 1"):
        compare([candidate("a", clock, [1], [])], **setting)


def test_files_are_timed_as_what_they_are(files):
    rows = compare([open_file(file, providers=["CPUExecutionProvider"]) for file in files], runs=2)
    assert [row.name for row in rows] == [str(file) for file in files]
    assert [row.bytes for row in rows] == [file.stat().st_size for file in files]
    assert {row.provider for row in rows} == {"CPUExecutionProvider"}
    assert all(0 < row.minimum <= row.median and row.load_seconds > 0 for row in rows)
    assert len(median_milliseconds(files, runs=1)) == len(files)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no\.onnx"):
        open_file(tmp_path / "no.onnx")


def bench(*arguments):
    return CliRunner().invoke(main, ["bench", *(str(argument) for argument in arguments)])


def test_command_prints_a_table_or_json(files):
    table = bench(*files, "--runs", 2)
    assert table.exit_code == 0, table.output
    assert "1 thread, 1 image a call" in table.stdout and "median ms" in table.stdout
    rows = json.loads(bench(*files, "--runs", 2, "--batch", 2, "--json").stdout)["rows"]
    assert [row["ratio"] == 1 for row in rows] == [True, False]
    assert {row["batch"] for row in rows} == {2}


@pytest.mark.parametrize("arguments", [["--runs", 0], ["--threads", 0], ["no.onnx"]])
def test_command_refuses_in_one_line(files, arguments):
    result = bench(files[0], *arguments)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1


def test_benchmark_makes_and_times_every_form(tmp_path, monkeypatch):
    tiny = with_preprocessing(tiny_face_net(size=SIZE), Preprocessing(size=SIZE))
    monkeypatch.setattr(qface, "load", lambda name: tiny)
    monkeypatch.setattr(benchmark, "has_openvino", lambda: False)
    options = ["--data", tmp_path / "none", "--networks", "mobilefacenet", "--threads", 1, "--runs", 1, "-o", tmp_path]
    result = CliRunner().invoke(benchmark.main, [str(option) for option in options])
    assert result.exit_code == 0, result.output

    report = json.loads((tmp_path / "latency.json").read_text())
    assert any("NNCF int8" in note for note in report["notes"])
    assert report["networks"]["mobilefacenet"]["weights"] == "random"
    rows = [row for row in report["networks"]["mobilefacenet"]["rows"] if row["provider"] == "CPUExecutionProvider"]
    forms = ["qface packed", "qface int8", "float32", "quantize_static"]
    assert [(row["name"], row["batch"]) for row in rows] == [(form, batch) for batch in (1, 16) for form in forms]
    assert [row["ratio"] == 1 for row in rows] == [form == "qface packed" for form in forms] * 2
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "latency.png").exists() == drawn


def test_random_networks_do_not_overflow():
    crops = torch.randint(256, (4, 3, 112, 112)).byte()
    network = benchmark.with_statistics(qface.load("iresnet18"), crops)
    assert not network.training
    with torch.no_grad():
        assert network(torch.randn(2, 3, 112, 112)).isfinite().all()
