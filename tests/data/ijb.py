"""Writes a small IJB-C: random photos with faces in them, templates, media, pairs, galleries and probes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from qface.data import ARCFACE_LANDMARKS


class SmallIjb:
    """``people`` people with ``templates`` templates each, of one to six images from photos and videos.

    Attributes:
        root: the folder.
        rows: (file, template, media, score) of each image.
        pairs: (template, template, same).
        lists: subject of each template in "gallery_G1", "gallery_G2" (the first templates of every other person) and
            "probe_mixed".
    """

    def __init__(self, root: Path, people: int = 6, templates: int = 3, seed: int = 0) -> None:
        self.root = root
        rng = np.random.default_rng(seed)
        self.rows: list[tuple[str, int, int, float]] = []
        owner: dict[int, int] = {}
        lines = []
        (root / "loose_crop").mkdir(parents=True)
        (root / "meta").mkdir()
        for person in range(people):
            base = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
            for number in range(templates):
                template = 7 + 3 * (person * templates + number)  # neither from 0 nor without gaps, as in IJB-C
                owner[template] = person
                for _ in range(int(rng.integers(1, 7))):
                    file = f"{len(self.rows) + 1}.jpg"
                    shift = rng.integers(5, 40, 2).astype(float)
                    pixels = np.asarray(Image.fromarray(base).resize((170, 160)), np.int64)
                    pixels = np.clip(pixels + rng.integers(-40, 41, (160, 170, 3)), 0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(root / "loose_crop" / file)
                    score = float(np.round(rng.uniform(0.3, 1), 3))
                    self.rows.append((file, template, int(rng.integers(1, 4)) + 100 * template, score))
                    points = " ".join(f"{value:.3f}" for value in (ARCFACE_LANDMARKS + shift).ravel())
                    lines.append(f"{file} {points} {score}\n")
        names = sorted(owner)
        self.pairs = [(a, b, int(owner[a] == owner[b])) for a in names for b in names if a < b]
        self.write("ijbc_name_5pts_score.txt", "".join(lines))
        self.write("ijbc_face_tid_mid.txt", "".join(f"{f} {t} {m}\n" for f, t, m, _ in self.rows))
        self.write("ijbc_template_pair_label.txt", "".join(f"{a} {b} {same}\n" for a, b, same in self.pairs))

        self.lists: dict[str, dict[int, int]] = {"gallery_G1": {}, "gallery_G2": {}, "probe_mixed": {}}
        for at, (template, person) in enumerate(owner.items()):
            name = "probe_mixed" if at % templates else f"gallery_G{1 + person % 2}"
            self.lists[name][template] = 90 - 7 * person
        for name in self.lists:
            self.write_list(name)

    def write_list(self, name: str) -> None:
        """Write a list of templates with a line per image, as NIST does."""
        subjects = self.lists[name]
        images = [(file, template) for file, template, *_ in self.rows if template in subjects]
        lines = [f"{template},{subjects[template]},img/{file},1,2,3,4,5" for file, template in images]
        header = "TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID,FACE_X,FACE_Y,FACE_WIDTH,FACE_HEIGHT"
        self.write(f"ijbc_1N_{name}.csv", "\n".join([header, *lines, ""]))

    def write(self, name: str, text: str) -> None:
        """Replace a file of ``meta``."""
        (self.root / "meta" / name).write_text(text)
