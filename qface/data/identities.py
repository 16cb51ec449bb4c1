"""Selection of identities: all, one half, or those listed in a file."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from qface.data.text_lines import numbered_lines
from qface.errors import ImagesError

__all__ = ["FIRST_HALF", "SECOND_HALF", "composed", "select_identities"]

FIRST_HALF = "first-half"
SECOND_HALF = "second-half"


def composed(name: str) -> str:
    """Normalize ``name`` to Unicode form NFC, since file systems of macOS return NFD."""
    return unicodedata.normalize("NFC", name)


def select_identities(names: Sequence[str], identities: str | Path | None) -> list[str]:
    """Select identities by name only, so that the selection is the same on every machine.

    Args:
        names: all identities.
        identities: ``"first-half"`` for the first ceil(n / 2) identities in the order of SHA-256(name in UTF-8, NFC);
            ``"second-half"`` for the others; the path of a text file with one name per line; None for all.

    Returns:
        The selected names as in ``names``, sorted by their NFC form.

    Raises:
        ImagesError: the file cannot be read or lists an unknown name, no identity is selected, or two names differ
            only in Unicode form.
    """
    _check_forms(set(names))
    selected = sorted(_select(sorted(set(names), key=composed), identities), key=composed)
    if not selected:
        raise ImagesError(f"{len(names)} identities, none selected (identities={identities}): select at least one")
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
            raise ImagesError(f"two identities named {name} differ only in Unicode form: rename or merge the folders")


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
    if not os.path.exists(path):
        raise ImagesError(
            f"identities file {str(path)!r} does not exist: pass {FIRST_HALF}, {SECOND_HALF} or a text file with one "
            "name per line"
        )
    return {composed(line.strip()) for _, line in numbered_lines(path)}
