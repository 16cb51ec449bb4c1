"""Make the links of README.md work on PyPI; every other setting of the package is in setup.cfg."""

import re
from configparser import RawConfigParser
from pathlib import Path

from setuptools import setup

RELATIVE_LINK = re.compile(r"!?\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")

settings = RawConfigParser()
settings.read("setup.cfg", encoding="utf-8")
url = settings.get("metadata", "url", fallback="")

setup(
    long_description=RELATIVE_LINK.sub(
        rf"[\1]({url}/blob/main/\2)" if url else r"\1", Path("README.md").read_text(encoding="utf-8")
    ),
    project_urls={
        "Documentation": f"{url}/tree/main/docs",
        "Changelog": f"{url}/blob/main/CHANGELOG.md",
        "Issues": f"{url}/issues",
    }
    if url
    else {},
)
