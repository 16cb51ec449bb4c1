"""README.md and docs/: every snippet runs on small data, every link leads somewhere, and lines are short."""

from __future__ import annotations

import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

import qface
from qface.cli import main

ROOT = Path(qface.__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("research/*.md"))]
OTHER_PAGES = [
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *ROOT.glob("examples/*/README.md"),
]

FENCE = re.compile(r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)

NOT_RUN = {
    "downloads packages": 2,
    "needs a file that is downloaded": 1,
    "needs an emulator of other processors": 1,
    "needs npm": 2,
    "reads a crop of its own, which tests/test_on_device.py makes": 1,
    "sets up a shell": 2,
    "starts several processes": 2,
    "takes minutes to hours": 2,
}
"""Why snippets do not run here, and how many may say so."""

FEW_FACES = {
    "align": ("--landmarks", "landmarks.txt"),
    "allocate-bits": ("--num-images", "4"),
    "bench": ("--runs", "1"),
    "compress": ("--at-fpr", "1e-1", "--num-images", "8"),
    "compress --max-drop": ("--max-drop", "90"),
    "evaluate --groups": ("--at-fpr", "1e-1"),
    "evaluate --stress": ("--people", "few.txt"),
    "pairs": ("--folds", "2", "--pairs-per-fold", "8"),
    "report": ("--fpr", "1e-1", "--latency-runs", "1"),
    "sensitivity": ("--num-images", "4"),
    "synthesize": ("--num-images", "2", "--num-steps", "1", "--batch-size", "2"),
    "thresholds": ("--fpr", "1e-1"),
}
"""Options added to the commands with these words, for twelve people who are noise."""

SMALLER = {
    'at_fpr="1e-4"': 'at_fpr="1e-1"',
    "max_drop=0.5": "max_drop=90",
    "num_images=512": "num_images=8",
    "round_to=16": "round_to=1",
    "conv1": "conv",
    "budget_mb=": "num_images=4, budget_mb=",
    'sensitivity(teacher, "faces/"': 'sensitivity(teacher, "faces/", num_images=4',
}
"""The same in Python, and for a tiny network."""


class Snippet(NamedTuple):
    language: str
    code: str
    not_run: str | None


def snippets(page: Path) -> list[Snippet]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Snippet(fence["language"], fence["code"], fence["reason"]) for fence in found]


def runs_here(snippet: Snippet) -> bool:
    return snippet.not_run is None and snippet.language in ("python", "console")


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command, without comments; a backslash continues a line."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def prose(page: Path) -> str:
    """The page without its snippets, as many lines long."""
    return FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), page.read_text(encoding="utf-8"))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def files_of_pages(files_of_examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the docstrings' examples, a list of pairs, and runs of compress that pages resume."""
    folder = tmp_path_factory.mktemp("pages") / "files"
    shutil.copytree(files_of_examples, folder)
    (folder / "few.txt").write_text("Ann_0\nAnn_1\nBob_0\nCid_0\n")
    qface.make_pairs(folder / "faces", folder / "pairs.txt", "second-half", folds=2, pairs_per_fold=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_commands("qface align photos/ -o faces/")
        run_commands("qface compress teacher.safetensors --images faces/ --max-drop 0.5 -o small.onnx")
        run_commands("qface compress teacher.safetensors --images faces/ --bits 6 -o w6a6.onnx")
    return folder


@pytest.fixture
def workplace(files_of_pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shutil.copytree(files_of_pages, tmp_path / "files"))
    monkeypatch.setattr("qface.distillation.batches.MIN_STEPS", 4)


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("page", [page for page in PAGES if any(map(runs_here, snippets(page)))], ids=name_of)
def test_snippets_run_in_their_order(page: Path) -> None:
    names = {"qface": qface, "teacher": qface.load("teacher.safetensors"), "student": qface.load("student.safetensors")}
    for snippet in filter(runs_here, snippets(page)):
        if snippet.language == "python":
            exec(compile(made_smaller(snippet.code), name_of(page), "exec"), names)
        else:
            run_commands(snippet.code)


def made_smaller(code: str) -> str:
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    return code


def run_commands(code: str) -> None:
    for program, *arguments in commands(code):
        assert program == "qface", f"only commands of qface run here; mark others with <!-- not run: why -->: {code}"
        arguments, output = arguments_and_output(arguments)
        added = [extra for key, extra in FEW_FACES.items() if set(key.split()) <= set(arguments)]
        result = CliRunner().invoke(main, [*arguments, *(word for extra in added for word in extra)])
        assert result.exit_code == 0, f"qface {shlex.join(arguments)}\n{result.output}"
        if output is not None:
            output.write_text(result.stdout, encoding="utf-8")


def arguments_and_output(words: list[str]) -> tuple[list[str], Path | None]:
    """The arguments of a command, and the file after ``>``."""
    return (words[:-2], Path(words[-1])) if ">" in words else (words, None)


@pytest.mark.usefixtures("workplace")
def test_readme_prints_that_the_file_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    code = next(snippet.code for snippet in snippets(ROOT / "README.md") if snippet.language == "python")
    exec(code, {})
    agrees, title, *_ = capsys.readouterr().out.splitlines()
    assert agrees == "True" and "36 images of 6 people" in title


def test_the_page_of_commands_runs_every_command() -> None:
    run = [snippet for snippet in snippets(DOCS / "cli.md") if not snippet.not_run]
    shown = {words[1] for snippet in run for words in commands(snippet.code)}
    assert shown == set(main.commands) - {"demo"}


def test_few_snippets_do_not_run() -> None:
    reasons = Counter(snippet.not_run for page in PAGES for snippet in snippets(page) if snippet.not_run)
    assert reasons == NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_that_could_run_is_found(page: Path) -> None:
    languages = {snippet.language for snippet in snippets(page) if snippet.not_run is None}
    assert languages <= {"python", "console", "text"}
    assert not re.search(r"^(```|    .*\bqface )", prose(page), re.MULTILINE), "put commands into ```console"


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=name_of)
def test_lines_are_short(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "", prose(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"no file {target}"
        assert not anchor or anchor in anchors(file), f"no heading {target}"


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=name_of)
def test_paths_of_the_repository_exist(page: Path) -> None:
    pattern = r"(?<![\w./])(?:qface|tests|benchmarks|examples|docs)/[\w./*]+"
    found = {path.rstrip(".") for path in re.findall(pattern, page.read_text(encoding="utf-8"))}
    assert not [path for path in found if not list(ROOT.glob(path))]


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, which GitHub and mkdocs agree on as long as words are parted by single spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
