"""Which identities of a folder are used: all, one half of them, or those that a file names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from qface.errors import ImagesError

__all__ = ["FIRST_HALF", "SECOND_HALF", "select_identities"]

FIRST_HALF = "first-half"
SECOND_HALF = "second-half"


def select_identities(names: Sequence[str], identities: str | Path | None) -> list[str]:
    """Pick identities by a rule that depends on their names alone, so that every machine picks the same.

    Args:
        names: all identities.
        identities: ``None`` for all of them; ``"first-half"`` for the first ceil(n / 2) in the order of the
            SHA-256 of their UTF-8 names, ``"second-half"`` for the rest; otherwise a text file with one name
            a line.

    Returns:
        The names that are picked, sorted.

    Raises:
        ImagesError: the file cannot be read or names somebody who is not in ``names``, or nobody is picked.
    """
    selected = sorted(_select(sorted(set(names)), identities))
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


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def _listed(names: list[str], path: Path) -> list[str]:
    wanted = _read_names(path)
    unknown = sorted(wanted - set(names))
    if unknown:
        raise ImagesError(
            f"{len(unknown)} of {len(wanted)} names in {path} have no images in the folder "
            f"(first: {unknown[0]}): correct the list or the folder"
        )
    return list(wanted)


def _read_names(path: Path) -> set[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ImagesError(
            f"people {str(path)!r} is no file: pass {FIRST_HALF}, {SECOND_HALF} or a text file with one name a line"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ImagesError(f"the list of people {path} cannot be read as text: {error}") from error
    return {line.strip() for line in lines if line.strip()}
