"""Selection of a folder's identities: all, one half of them, or those that a file names."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from qface.errors import ImagesError, one_line

__all__ = ["FIRST_HALF", "SECOND_HALF", "composed", "select_identities"]

FIRST_HALF = "first-half"
SECOND_HALF = "second-half"


def composed(name: str) -> str:
    """``name`` in Unicode's form NFC: file systems of macOS give names in NFD, and others as they were written."""
    return unicodedata.normalize("NFC", name)


def select_identities(names: Sequence[str], identities: str | Path | None) -> list[str]:
    """Pick identities by a rule that depends on their names alone, so that every machine picks the same.

    Args:
        names: all identities.
        identities: ``None`` for all of them; ``"first-half"`` for the first ceil(n / 2) in the order of the
            SHA-256 of their names in UTF-8 and NFC, ``"second-half"`` for the rest; otherwise a text file with one
            name a line.

    Returns:
        The names that are picked, as they are in ``names``, sorted by their form NFC.

    Raises:
        ImagesError: the file cannot be read or names somebody who is not in ``names``, nobody is picked, or two names
            differ in their Unicode form alone.
    """
    _check_forms(set(names))
    selected = sorted(_select(sorted(set(names), key=composed), identities), key=composed)
    if not selected:
        raise ImagesError(f"no identity is left of {len(names)} (people: {identities}): select at least one")
    return selected


def _select(names: list[str], identities: str | Path | None) -> list[str]:
    if identities is None:
        return names
    if str(identities) in (FIRST_HALF, SECOND_HALF):
        shuffled = sorted(names, key=_digest)
        half = (len(names) + 1) // 2
        return shuffled[:half] if str(identities) == FIRST_HALF else shuffled[half:]
    return _listed(names, Path(identities))


def _check_forms(names: set[str]) -> None:
    of_form: dict[str, str] = {}
    for name in sorted(names):
        if of_form.setdefault(composed(name), name) != name:
            raise ImagesError(f"two people are called {name}, in two forms of Unicode: rename or join their folders")


def _digest(name: str) -> str:
    return hashlib.sha256(composed(name).encode("utf-8", "surrogateescape")).hexdigest()


def _listed(names: list[str], path: Path) -> list[str]:
    wanted = _read_names(path)
    on_disk = {composed(name): name for name in names}
    unknown = sorted(wanted - set(on_disk))
    if unknown:
        raise ImagesError(
            f"{len(unknown)} of {len(wanted)} names in {path} have no images in the folder "
            f"(first: {unknown[0]}): correct the list or the folder"
        )
    return [on_disk[name] for name in wanted]


def _read_names(path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ImagesError(
            f"people {str(path)!r} is no file: pass {FIRST_HALF}, {SECOND_HALF} or a text file with one name a line"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ImagesError(
            f"the list of people {path} cannot be read as text ({one_line(error)}): give one in UTF-8"
        ) from error
    return {composed(line.strip()) for line in lines if line.strip()}
