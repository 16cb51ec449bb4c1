"""Groups of people, such as demographic ones, that a text file tells: a line ``person,group`` for each person."""

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
    """The group of each person.

    Args:
        names: the groups that have somebody, sorted.
        of_person: int64 [people], an index into ``names`` for each identity; -1 for a person in none.
    """

    names: tuple[str, ...]
    of_person: npt.NDArray[np.int64]

    @property
    def ungrouped(self) -> int:
        """The number of people in no group."""
        return int(np.count_nonzero(self.of_person < 0))


def read_groups(path: str | Path, folder: ImageFolder) -> Grouping:
    """Read the groups of the people of ``folder``; those who are not selected are passed over.

    Args:
        path: a text file in UTF-8 with one line ``person,group`` a person. A tab parts the two, or else the last comma.
        folder: it has one subfolder a person. Names are compared in Unicode's form NFC.

    Raises:
        ImagesError: the file cannot be read, a line is malformed, somebody is named twice or has no images, or nobody
            who is selected has a group.
    """
    path = Path(path)
    rows = [_fields(path, number, line) for number, line in numbered_lines(path)]
    _refuse(path, [person for person, count in Counter(person for person, _ in rows).items() if count > 1], "twice")
    group_of, on_disk = dict(rows), {composed(name) for name in folder.all_names}
    _refuse(path, [person for person in group_of if person not in on_disk], "and have no images in the folder")
    of_selected = [group_of.get(composed(name)) for name in folder.names]
    names = tuple(sorted({group for group in of_selected if group is not None}))
    if not names:
        raise ImagesError(f"{path} gives none of {len(of_selected)} people a group: write lines 'person,group'")
    numbers = [-1 if group is None else names.index(group) for group in of_selected]
    return Grouping(names, np.array(numbers, np.int64))


def _fields(path: Path, number: int, line: str) -> tuple[str, str]:
    """Person and group of a line."""
    person, _, group = (part.strip() for part in composed(line).rpartition("\t" if "\t" in line.strip() else ","))
    if not person or not group:
        raise ImagesError(f"{path}, line {number}: expected 'person,group', not {line.strip()!r}")
    return person, group


def _refuse(path: Path, people: list[str], how: str) -> None:
    if people:
        raise ImagesError(f"{len(people)} people are named in {path} {how} (first: {people[0]}): correct the lines")
