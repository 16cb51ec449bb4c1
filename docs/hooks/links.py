"""Make pages of the site from README.md and its neighbors, and let every link between files of the repository work."""

from __future__ import annotations

import configparser
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parents[2]
_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
"""Pages outside docs/; MkDocs serves README.md as the front page."""

_RELATIVE_LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> None:
    """Link to the repository if its URL is in setup.cfg."""
    settings = configparser.RawConfigParser()
    settings.read(_ROOT / "setup.cfg", encoding="utf-8")
    url = settings.get("metadata", "url", fallback=None)
    # Not repo_url: with it, every page of the theme asks GitHub for stars.
    config.extra["repository"] = url
    config.extra["social"] = [{"icon": "fontawesome/brands/git-alt", "link": url}] if url else []


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages outside docs/."""
    for name in _PAGES:
        files.append(File.generated(config, name, abs_src_path=str(_ROOT / name)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Rewrite the links from a page to files of the repository."""
    uri = page.file.src_uri
    folder = posixpath.dirname(uri if uri in _PAGES else f"docs/{uri}")

    def rewritten(link: re.Match[str]) -> str:
        text, target, anchor = link[1], posixpath.normpath(posixpath.join(folder, link[2])), link[3] or ""
        if target in _PAGES or target.startswith("docs/"):
            return f"[{text}]({posixpath.relpath(target.removeprefix('docs/'), posixpath.dirname(uri))}{anchor})"
        if not (_ROOT / target).exists():
            return link[0]  # MkDocs reports it
        url = config.extra["repository"]
        return f"[{text}]({url}/blob/main/{target}{anchor})" if url else text

    return _RELATIVE_LINK.sub(rewritten, markdown)
