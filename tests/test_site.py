"""The API reference is complete. ``make docs`` itself checks pages, links and anchors."""

import re
from collections import Counter
from pathlib import Path

import qface

REFERENCE = Path(qface.__file__).parents[1] / "docs" / "reference"


def test_the_reference_has_every_public_name_once() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))
    names = re.findall(r"^::: qface\.(\w+)$", pages, re.MULTILINE)
    assert Counter(names) == Counter([*qface.__all__, "errors"])
