"""Groups of identities, such as demographic groups, from a text file with lines ``identity,group``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qface.data.folders import ImageFolder
from qface.data.identities import composed
from qface.data.text_lines import numbered_lines
from qface.errors import ImagesError

__all__ = ["Grouping", "read_groups"]


@dataclass(frozen=True, eq=False)
class Grouping:
    """Group of each identity.

    Args:
        names: the groups with at least one identity, sorted.
        of_person: int64 [identities], index into ``names``; -1 without a group.
    """

    names: tuple[str, ...]
    of_person: npt.NDArray[np.int64]

    @property
    def ungrouped(self) -> int:
        """Number of identities without a group."""
        return int(np.count_nonzero(self.of_person < 0))


def read_groups(path: str | Path, folder: ImageFolder) -> Grouping:
    """Read the group of each identity of ``folder``.

    Lines of identities that the folder does not select are ignored.

    Args:
        path: text file in UTF-8 with one line ``identity,group`` per identity, split at a tab or else at the last
            comma.
        folder: folder with one subfolder per identity. Names are compared in Unicode form NFC.

    Raises:
        ImagesError: the file cannot be read, a line is malformed, an identity is listed twice or has no images, or no
            selected identity has a group.
    """
    path = Path(path)
    rows = [_fields(path, number, line) for number, line in numbered_lines(path)]
    _refuse(
        path, [person for person, count in Counter(person for person, _ in rows).items() if count > 1], "more than once"
    )
    group_of, on_disk = dict(rows), {composed(name) for name in folder.all_names}
    _refuse(path, [person for person in group_of if person not in on_disk], "but have no images in the folder")
    of_selected = [group_of.get(composed(name)) for name in folder.names]
    names = tuple(sorted({group for group in of_selected if group is not None}))
    if not names:
        raise ImagesError(f"{path} has no group of {len(of_selected)} identities: write lines 'identity,group'")
    numbers = [-1 if group is None else names.index(group) for group in of_selected]
    return Grouping(names, np.array(numbers, np.int64))


def _fields(path: Path, number: int, line: str) -> tuple[str, str]:
    """Return the identity and group of a line."""
    person, _, group = (part.strip() for part in composed(line).rpartition("\t" if "\t" in line.strip() else ","))
    if not person or not group:
        raise ImagesError(f"{path}, line {number}: expected 'identity,group', got {line.strip()!r}")
    return person, group


def _refuse(path: Path, people: list[str], how: str) -> None:
    if people:
        raise ImagesError(f"{len(people)} identities are in {path} {how} (first: {people[0]}): correct the lines")
