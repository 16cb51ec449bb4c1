import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import settings

from tests.crops import write_crops

Crops = Callable[..., Path]

# The first call of a torch kernel, or a busy machine, may exceed any time limit of one example.
settings.register_profile("qface", deadline=None)
settings.load_profile("qface")


@pytest.fixture(scope="session")
def faces() -> Path:
    """Folder with ``data/`` and ``weights/`` (QFACE_DATA, by default ``shared`` beside the checkout)."""
    root = Path(os.environ.get("QFACE_DATA", Path(__file__).parents[2] / "shared"))
    if not (root / "data" / "lfw").is_dir():
        pytest.skip(f"no faces in {root}: set QFACE_DATA")
    return root


@pytest.fixture
def crops(tmp_path: Path) -> Crops:
    """Writes ``<name>/<name>_%04d.<ending>`` random crops for ``{name: number of images}``; returns the folder."""

    def write(people: Mapping[str, int], ending: str = "png", folder: str = "crops", seed: int = 0) -> Path:
        return write_crops(tmp_path / folder, people, ending, seed)

    return write
