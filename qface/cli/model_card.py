"""The model card that commands write beside an ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from qface.cli.command import note

__all__ = ["card_option", "write_card"]

card_option = click.option(
    "--card/--no-card",
    default=True,
    help="Write a model card beside the file: student.md beside student.onnx. One that is there is left as it is.",
)


def write_card(file: Path, figures: Sequence[str] = ()) -> None:
    """Write the card of ``file`` and say so; one that is there may hold what its owner filled in, and stays."""
    from qface.reporting.model_card import card_path, write_model_card

    path = card_path(file)
    if path.exists():
        note(f"left {path} as it was: remove it and run this again for a card of the new file")
    else:
        note(f"wrote {write_model_card(file, figures)}")
