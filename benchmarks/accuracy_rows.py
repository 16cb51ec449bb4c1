"""Rows of the accuracy table and their goals."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Goal:
    """Limits in percentage points; None means no limit.

    Args:
        tpr: maximum loss of TPR at FPR 1e-4 against the float network.
        accuracy: maximum loss of 10-fold accuracy.
        gallery: maximum loss of TPR at FPR 1e-4 with a gallery of float embeddings.
        gain: minimum gain of TPR at FPR 1e-4 over the row ``over``.
        over: name of the row to compare with.
    """

    tpr: float | None = None
    accuracy: float | None = None
    gallery: float | None = None
    gain: float | None = None
    over: str = ""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        name: row name.
        weight_bits: weight bits; with ``mixed``, the maximum mean over all weights.
        activation_bits: activation bits.
        trained: distill after calibration.
        share: fraction of the tuning images that is used.
        mixed: choose bits per weight tensor.
        goal: goal for the recipe ``qface``.
        exceptions: goals of networks that differ from ``goal``.
    """

    name: str
    weight_bits: int
    activation_bits: int
    trained: bool = True
    share: float = 1.0
    mixed: bool = False
    goal: Goal = Goal()
    exceptions: dict[str, Goal] = field(default_factory=dict)

    def goal_of(self, network: str) -> Goal:
        """Return the goal for ``network``."""
        return self.exceptions.get(network, self.goal)

    def settings(self) -> dict[str, Any]:
        """Return the settings that affect the figures."""
        fields = ("weight_bits", "activation_bits", "trained", "share", "mixed")
        return {name: getattr(self, name) for name in fields}


ROWS = (
    Row("w8a8", 8, 8, goal=Goal(tpr=0.1, accuracy=0.05)),
    Row("w6a6", 6, 6, goal=Goal(0.5, 0.15, gallery=0.4), exceptions={"iresnet18": Goal(0.2, 0.15, gallery=0.4)}),
    Row("w6a6-untrained", 6, 6, trained=False, goal=Goal(tpr=1.5)),
    Row("w6a6-25%", 6, 6, share=0.25, goal=Goal(tpr=0.8)),
    Row("w4a8", 4, 8, goal=Goal(tpr=1.0)),
    Row("w4a8-untrained", 4, 8, trained=False),
    Row("mixed-w4a8", 4, 8, mixed=True, goal=Goal(gain=1.0, over="w4a8")),
    Row("mixed-w4a8-untrained", 4, 8, trained=False, mixed=True, goal=Goal(gain=1.0, over="w4a8-untrained")),
    Row("w4a4", 4, 4, goal=Goal(tpr=4.0), exceptions={"iresnet18": Goal(tpr=0.1)}),
)

SWEEP_BITS = (8, 6, 4, 2)
_UNIFORM = [Row(f"w{bits}a{bits}", bits, bits) for bits in SWEEP_BITS]
_TWO_BIT_WEIGHTS = Row("w2a8", 2, 8, exceptions={"iresnet18": Goal(tpr=2.0)})


def _not_trained(row: Row) -> Row:
    return replace(row, name=f"{row.name}-untrained", trained=False, goal=Goal(), exceptions={})


SWEEP = tuple(row.name for row in (*_UNIFORM, *map(_not_trained, _UNIFORM)))
"""Names of the rows with the same bits for weights and activations."""
_MAIN = {row.name: row for row in ROWS}
_OTHERS = (*_UNIFORM, _TWO_BIT_WEIGHTS)
EVERY_ROW = _MAIN | {row.name: row for row in (*_OTHERS, *map(_not_trained, _OTHERS)) if row.name not in _MAIN}
