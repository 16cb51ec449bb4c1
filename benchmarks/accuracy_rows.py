"""What the accuracy table measures, and what each line has to reach."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Goal:
    """Points that may be lost against float, and points to be won over another row; None means anything will do.

    Args:
        tpr: TPR at FPR 1e-4 that may be lost.
        accuracy: 10-fold accuracy that may be lost.
        gallery: TPR at FPR 1e-4 that may be lost against a gallery of the float network.
        gain: TPR at FPR 1e-4 to be won over the row ``over``.
        over: its name.
    """

    tpr: float | None = None
    accuracy: float | None = None
    gallery: float | None = None
    gain: float | None = None
    over: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: of the line.
        weight_bits: of weights; where they are mixed, the most that they have on average.
        activation_bits: of activations.
        trained: distilled after calibration.
        share: of the images that are seen at all.
        mixed: bits chosen for each weight.
        goal: of the recipe ``qface``.
        exceptions: networks with another goal.
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
        """What ``network`` has to reach."""
        return self.exceptions.get(network, self.goal)

    def settings(self) -> dict[str, Any]:
        """All that figures depend on."""
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
    Row("w4a4", 4, 4, goal=Goal(tpr=4.0)),
)

SWEEP_BITS = (8, 6, 4, 2)
_UNIFORM = [Row(f"w{bits}a{bits}", bits, bits) for bits in SWEEP_BITS]
_UNIFORM += [replace(row, name=f"{row.name}-untrained", trained=False) for row in _UNIFORM]

EVERY_ROW = {row.name: row for row in ROWS} | {
    row.name: row for row in _UNIFORM if row.name not in {each.name for each in ROWS}
}
SWEEP = tuple(row.name for row in _UNIFORM)
"""Names of the rows with the same bits for weights and activations."""
