"""The parts that the runtimes are made of, each installed into a folder of its own.

Only the standard library is imported here, so that the setup can run before anything is installed. Nothing needs root:
Debian packages are unpacked, not installed, and qemu looks for a foreign processor's files in their folder first.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["ARM_CORES", "PARTS", "PartError", "install", "part_folder", "reason_missing"]

ARM_CORES = {"cortex-a72": ("0xd08", ""), "max": ("0xd0c", "asimddp")}
"""The CPU part and feature in /proc/cpuinfo for each core of qemu; onnxruntime chooses its kernels by them."""

_HEADERS_URL = "http://deb.debian.org/debian/pool/main/o/onnxruntime/libonnxruntime-dev_1.21.0+dfsg-1_amd64.deb"
_HEADERS_SHA256 = "14f7d959d5deacbcf1504830d4189f91fc67382b399ed9ae9d3aa9c4050ced08"
_ARM_WHEELS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")


class PartError(Exception):
    """A part cannot be installed; says why in one line."""


def part_folder(name: str) -> Path:
    """The folder of the part ``name``, in the folder QFACE_RUNTIMES, by default ``.runtimes`` in the checkout."""
    root = os.environ.get("QFACE_RUNTIMES") or Path(__file__).parents[2] / ".runtimes"
    return Path(root).resolve() / name


def reason_missing(name: str) -> str | None:
    """Why the part ``name`` cannot be used, in one line; None if it is there."""
    if part_folder(name).is_dir():
        return None
    note = _note(name)
    return note.read_text(encoding="utf-8") if note.exists() else f"{name} is not set up: run make runtimes"


def install(name: str) -> None:
    """Install the part ``name`` if it is missing. Its folder appears whole or not at all.

    Raises:
        PartError: something that it needs is missing; :func:`reason_missing` says the same from then on.
    """
    folder = part_folder(name)
    if folder.is_dir():
        return
    temporary = folder.with_name(f"{name}.{os.getpid()}.part")
    temporary.mkdir(parents=True)
    try:
        PARTS[name](temporary)
        temporary.rename(folder)
    except PartError as error:
        _note(name).write_text(f"{name} is left out: {error}", encoding="utf-8")
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _note(name).unlink(missing_ok=True)


def _note(name: str) -> Path:
    return part_folder(name).with_name(f"{name}.missing")


def _install_qemu(folder: Path) -> None:
    _unpack_debian(["qemu-user-static"], _output("dpkg", "--print-architecture").strip(), folder)


def _install_aarch64(folder: Path) -> None:
    """Python and onnxruntime of aarch64 in ``root``, and the files that name the core in a folder for each core."""
    root = folder / "root"
    _unpack_debian(["python3", "libstdc++6"], "arm64", root)
    version = (root / "usr" / "bin" / "python3").readlink().name.removeprefix("python")
    platforms = [word for wheel in _ARM_WHEELS for word in ("--platform", wheel)]
    _install_python(folder / "site", "onnxruntime", "numpy", options=("--python-version", version, *platforms))
    for core, (part, feature) in ARM_CORES.items():
        _describe_core(folder / core, part, feature)


def _describe_core(folder: Path, part: str, feature: str) -> None:
    cpus = folder / "sys" / "devices" / "system" / "cpu"
    cpus.mkdir(parents=True)
    (folder / "proc").mkdir()
    for link in ("etc", "lib", "usr"):
        (folder / link).symlink_to(Path("..", "root", link))
    for name in ("possible", "present"):
        (cpus / name).write_text("0\n")
    features = f"fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid {feature}".strip()
    fields = {"implementer": "0x41", "architecture": "8", "variant": "0x0", "part": part, "revision": "1"}
    lines = ["processor\t: 0", f"Features\t: {features}", *(f"CPU {key}\t: {value}" for key, value in fields.items())]
    (folder / "proc" / "cpuinfo").write_text("\n".join(lines) + "\n\n")


def _install_headers(folder: Path) -> None:
    """C++ headers of onnxruntime, which its wheels leave out; those of an older version serve a newer library."""
    package = folder / "headers.deb"
    try:
        with urllib.request.urlopen(_HEADERS_URL, timeout=60) as answer:
            package.write_bytes(answer.read())
    except OSError as error:
        raise PartError(f"{_HEADERS_URL}: {error}") from error
    if hashlib.sha256(package.read_bytes()).hexdigest() != _HEADERS_SHA256:
        raise PartError(f"{_HEADERS_URL} is not the file that it was")
    _output("dpkg-deb", "--extract", package, folder)
    package.unlink()


def _install_web(folder: Path) -> None:
    _output("node", "--version")
    _output("npm", "install", "--prefix", folder, "--ignore-scripts", "--no-audit", "--no-fund", "onnxruntime-web")


def _install_chromium(folder: Path) -> None:
    _unpack_debian(
        ["chromium-headless-shell", "fonts-dejavu-core"], _output("dpkg", "--print-architecture").strip(), folder
    )


def _install_python(folder: Path, *requirements: str, options: Sequence[str] = ()) -> None:
    # Without dependencies: onnxruntime and OpenVINO need only numpy to run a file.
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:")
    _output(*pip, "--target", folder, *options, *requirements)


def _unpack_debian(packages: Sequence[str], architecture: str, folder: Path) -> None:
    """Unpack ``packages`` with all that they depend on, by an apt that knows of nothing installed."""
    state = folder / "apt"
    for name in ("lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True)
    (state / "status").touch()
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "",
        "Debug::NoLocking": 1,
        "Dir::Cache": state,
        "Dir::State": state,
        "Dir::State::status": state / "status",
    }
    apt = ("apt-get", "-qq", *(word for key, value in settings.items() for word in ("-o", f"{key}={value}")))
    _output(*apt, "update")
    _output(*apt, "install", "--yes", "--download-only", "--no-install-recommends", *packages)
    for package in sorted((state / "archives").glob("*.deb")):
        _output("dpkg-deb", "--extract", package, folder)
    shutil.rmtree(state)


def _output(*command: str | Path) -> str:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise PartError(f"there is no {command[0]}") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines() or [f"exit code {error.returncode}"]
        raise PartError(f"{Path(command[0]).name} says: {said[-1]}") from error
    return done.stdout


PARTS: dict[str, Callable[[Path], None]] = {
    "qemu": _install_qemu,
    "aarch64": _install_aarch64,
    "web": _install_web,
    "chromium": _install_chromium,
    "onnxruntime-1.24": lambda folder: _install_python(folder, "onnxruntime==1.24.*", "numpy"),
    "onnxruntime-newest": lambda folder: _install_python(folder, "onnxruntime", "numpy"),
    "headers": _install_headers,
    "openvino": lambda folder: _install_python(folder, "openvino", "numpy"),
}
"""The function that installs each part into an empty folder."""
