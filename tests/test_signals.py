"""Commands in processes of their own, which send signals to themselves at chosen places."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def hear_interrupts() -> None:
    """Undo what a shell does to commands in its background, which ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ended(code: str, folder: Path, **options: object) -> tuple[int, str]:
    """Exit code and stderr of ``code``, run with qface's imports, ``send`` and its working directory ``folder``."""
    preamble = "import gc, os, signal\nfrom qface.files import replacing\nfrom qface.signals import ended_by_signals\n"
    preamble += "def send(name): os.kill(os.getpid(), getattr(signal, name))\n"
    done = subprocess.run(
        [sys.executable, "-c", preamble + code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=hear_interrupts,
        capture_output=True,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(("name", "expected"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_cleans_up_and_says_nothing(name: str, expected: int, tmp_path: Path) -> None:
    code = f"with ended_by_signals(), replacing('file') as temporary:\n temporary.touch()\n send({name!r})\n"
    assert ended(code, tmp_path) == (expected, "")
    assert not list(tmp_path.iterdir())


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    code = "with ended_by_signals():\n try: send('SIGINT')\n finally:\n  send('SIGINT')\n  open('went on', 'w')\n"
    assert ended(code, tmp_path) == (-signal.SIGINT, "")
    assert not list(tmp_path.iterdir())


def test_a_signal_in_a_destructor_is_not_lost(tmp_path: Path) -> None:
    code = (
        "class Last:\n def __del__(self): send('SIGTERM')\n"
        "with ended_by_signals():\n last = Last()\n del last\n signal.pause()\n"
    )
    assert ended(code, tmp_path) == (143, "")


def test_what_code_makes_of_the_signal_does_not_matter(tmp_path: Path) -> None:
    code = "with ended_by_signals():\n try: send('SIGINT')\n except BaseException: raise ValueError\n"
    assert ended(code, tmp_path) == (130, "")


def test_signals_that_are_ignored_stay_ignored(tmp_path: Path) -> None:
    code = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nwith ended_by_signals(): send('SIGHUP')\n"
    assert ended(code, tmp_path) == (0, "")


@pytest.mark.parametrize(("name", "expected"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_torch_is_imported(name: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})\n")
    done = subprocess.run(
        [sys.executable, "-m", "qface", "export", "student.safetensors", "-o", "student.onnx"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        preexec_fn=hear_interrupts,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (expected, "")


def test_a_noted_signal_ends_at_the_end_of_the_block(tmp_path: Path) -> None:
    code = "from qface.signals import signals_noted\nwith ended_by_signals():\n with signals_noted() as noted:\n"
    code += "  send('SIGTERM')\n  open('went on', 'w').close() if noted else None\n open('too far', 'w')\n"
    number, said = ended(code, tmp_path)
    assert number == 143 and said.startswith("stopping after this step")
    assert [path.name for path in tmp_path.iterdir()] == ["went on"]


TRACED = """
import torch, qface
class Stopped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 112 * 112, 4)
    def forward(self, images):
        if torch.compiler.is_exporting():
            send('SIGTERM')
            open('traced', 'w')
        return self.linear(images.flatten(1))
with ended_by_signals():
    qface.quantize(Stopped().eval())
    open('went on', 'w')
"""


def test_a_signal_waits_while_torch_traces_a_network(tmp_path: Path) -> None:
    assert ended(TRACED, tmp_path)[0] == 143
    assert [path.name for path in tmp_path.iterdir()] == ["traced"]


def test_held_signals_end_the_outer_block(tmp_path: Path) -> None:
    code = (
        "from qface.signals import signals_noted\n"
        "with ended_by_signals(), signals_noted() as noted:\n"
        " with signals_noted(): send('SIGINT')\n"
        " open(f'noted {noted}', 'w')\n"
    )
    assert ended(code, tmp_path)[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["noted [2]"]
