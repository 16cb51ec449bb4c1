"""The API reference and the list of extras are complete. ``make docs`` itself checks pages, links and anchors."""

import re
from collections import Counter
from configparser import RawConfigParser
from pathlib import Path

import qface

ROOT = Path(qface.__file__).parents[1]


def test_the_reference_has_every_public_name_once() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    names = re.findall(r"^::: qface\.(\w+)$", pages, re.MULTILINE)
    assert Counter(names) == Counter([*qface.__all__, "errors"])


def test_the_installation_page_has_every_extra() -> None:
    settings = RawConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`qface\[(\w+)\]`", page)) - {"cpu"} == set(settings.options("options.extras_require"))
