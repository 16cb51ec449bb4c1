"""The model card next to an exported ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from qface.cli.command import note

__all__ = ["card_option", "write_card"]

card_option = click.option(
    "--card/--no-card",
    default=True,
    help="Write a model card next to the file: student.md for student.onnx. An existing card is kept.",
)


def write_card(file: Path, figures: Sequence[str] = ()) -> None:
    """Write the model card of a file; keep an existing one, which may have text of its owner.

    Args:
        file: the ONNX file.
        figures: sentences on its accuracy.
    """
    from qface.reporting.model_card import card_path, write_model_card

    path = card_path(file)
    if path.exists():
        note(f"kept {path}: delete it and run the command again for a card of the new file")
    else:
        note(f"wrote {write_model_card(file, figures)}")
