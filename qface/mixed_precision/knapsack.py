"""Choice of bits per weight tensor as a multiple-choice knapsack problem."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from qface.errors import ConfigError
from qface.mixed_precision.sensitivity import Sensitivity

__all__ = ["choose_bit_widths"]

_STATES = 2**15
"""Number of distinct budgets in dynamic programming; rounding leaves at most 0.05 % of a budget unused."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Options = Sequence[tuple[int, float]]
"""Candidate bits in ascending order, each with its loss."""


def choose_bit_widths(table: Sensitivity, budget: int, overhead_bits: int = 0) -> dict[str, int]:
    """Choose bits per weight tensor that minimize the summed loss within a total number of bits.

    Losses of single layers are assumed to add up. Each set of bit widths that may occur gives a multiple-choice
    knapsack, solved by dynamic programming: exact up to the rounding of :data:`_STATES`.

    Args:
        table: losses of the weights at the candidate bit widths.
        budget: maximum of the sum over layers of elements x bits, plus ``overhead_bits`` per bit width that occurs.
        overhead_bits: fixed cost in bits of each bit width that occurs.

    Returns:
        Bits by layer name, in the order of the table.

    Raises:
        ConfigError: the table has no losses of weights, or every choice exceeds the budget.
    """
    elements = [layer.elements for layer in table.layers]
    best: tuple[float, list[int]] | None = None
    for allowed in _sets_of_bit_widths(table):
        options = [[(bits, layer.weight[bits]) for bits in allowed if bits in layer.weight] for layer in table.layers]
        found = _best_choice(elements, options, budget - overhead_bits * len(allowed)) if all(options) else None
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    if best is None:
        raise ConfigError(f"no choice of bit widths fits into {budget} bits; raise the budget")
    return {layer.name: bits for layer, bits in zip(table.layers, best[1], strict=True)}


def _sets_of_bit_widths(table: Sensitivity) -> Iterator[tuple[int, ...]]:
    """Yield all sets of bit widths that may occur together, small sets first."""
    bit_widths = table.bit_widths("weight")
    if not bit_widths:
        raise ConfigError("the table has no losses of weights; measure the sensitivity with weight_bits first")
    for count in range(1, len(bit_widths) + 1):
        yield from itertools.combinations(bit_widths, count)


def _best_choice(elements: Sequence[int], options: Sequence[Options], budget: int) -> tuple[float, list[int]] | None:
    """Return the minimum summed loss and its bits; None if nothing fits into ``budget`` bits."""
    costs = [count * np.array([bits for bits, _ in of]) for count, of in zip(elements, options, strict=True)]
    losses = [np.array([loss for _, loss in of]) for of in options]
    spare = budget - sum(int(cost[0]) for cost in costs)
    if spare < 0:
        return None
    extras = [cost - cost[0] for cost in costs]
    unit = _unit(extras, spare)
    picks = _knapsack([-(-extra // unit) for extra in extras], losses, spare // unit)
    loss = sum(float(of[pick]) for of, pick in zip(losses, picks, strict=True))
    return loss, [of[pick][0] for of, pick in zip(options, picks, strict=True)]


def _unit(extras: Sequence[Ints], spare: int) -> int:
    """Return the unit of cost: a multiple of the costs' common divisor with <= `_STATES` budgets."""
    common = max(int(np.gcd.reduce(np.concatenate(extras))), 1)
    return common * max(-(-spare // (common * _STATES)), 1)


def _knapsack(costs: Sequence[Ints], losses: Sequence[Floats], budget: int) -> list[int]:
    """Return each item's option, with minimum summed loss; the first option of an item costs 0."""
    budget = min(budget, sum(int(cost.max()) for cost in costs))
    minimum = np.zeros(budget + 1)  # minimum loss of the items so far, for each budget
    picks = []
    for cost, loss in zip(costs, losses, strict=True):
        totals = np.full((len(cost), budget + 1), np.inf)
        for option, price in enumerate(cost):
            totals[option, price:] = minimum[: max(budget + 1 - price, 0)] + loss[option]
        picks.append(totals.argmin(0).astype(np.int8))
        minimum = totals.min(0)
    return _walk_back(picks, costs, budget)


def _walk_back(picks: Sequence[npt.NDArray[np.int8]], costs: Sequence[Ints], budget: int) -> list[int]:
    """Trace the chosen options back from the last item to the first."""
    chosen = []
    for pick, cost in zip(reversed(picks), reversed(costs), strict=True):
        chosen.append(int(pick[budget]))
        budget -= int(cost[chosen[-1]])
    return chosen[::-1]
