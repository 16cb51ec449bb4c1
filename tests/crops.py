"""Random crops in folders, for tests whose networks need no real faces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def write_crops(folder: Path, people: Mapping[str, int], ending: str = "png", seed: int = 0) -> Path:
    """Write ``<name>/<name>_%04d.<ending>`` for ``{name: number of images}`` into ``folder``, and return it."""
    rng = np.random.default_rng(seed)
    for name, count in people.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            pixels = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}_{number:04d}.{ending}")
    return folder
