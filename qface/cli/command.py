"""What all commands share: how they fail, what they read, and how they show what came of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from qface.errors import QFaceError
from qface.evaluation import as_embedder
from qface.evaluation.embedding import Embedder
from qface.models.resolve import resolve_model
from qface.preprocessing import PreprocessingOverride

__all__ = ["Command", "embedder", "show"]


class Command(click.Command):
    """Turns errors of the library into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click's, but for those errors."""
        try:
            return super().invoke(ctx)
        except QFaceError as error:
            click.echo(f"Error: {' '.join(str(error).split())}", err=True)
            ctx.exit(2)


def embedder(text: str, preprocessing: PreprocessingOverride | None = None) -> Embedder:
    """A file in onnxruntime, or a network in torch; see :func:`resolve_model`."""
    if text.lower().endswith(".onnx"):
        return as_embedder(Path(text), preprocessing)
    return as_embedder(resolve_model(text, preprocessing=preprocessing))


def show(record: dict[str, Any], table: Any, as_json: bool) -> None:
    """Print what a verb found, as one JSON object or as a table; of several processes, the first does."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        click.echo(json.dumps(record))
    else:
        Console().print(table)
