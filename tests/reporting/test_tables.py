"""Tables on terminals that take UTF-8 and nothing else."""

from __future__ import annotations

import io

from rich.console import Console

from qface.data import AlignmentReport
from qface.reporting.tables import alignment_table


def test_names_that_are_no_utf8_are_shown_with_escapes() -> None:
    report = AlignmentReport(
        3,
        1,
        0,
        faceless=("caf\udce9.png", "Zoë.png"),
        misplaced=("d.png: their order looks like y before x",),
        unreadable=("[b]\udcff.png",),
    )
    written = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    Console(file=written, width=100).print(alignment_table(report))
    written.seek(0)
    table = written.read()
    assert "caf\\udce9.png, Zoë.png" in table
    assert "[b]\\udcff.png" in table
