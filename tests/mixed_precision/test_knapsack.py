"""``choose_bit_widths`` against trying every combination."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qface.errors import ConfigError
from qface.mixed_precision import BIT_WIDTHS, LayerSensitivity, Sensitivity, choose_bit_widths

losses = st.floats(0, 2, allow_nan=False)
weights = st.dictionaries(st.sampled_from(BIT_WIDTHS), losses, min_size=1, max_size=4)
tables = st.lists(st.tuples(st.integers(1, 40), weights), min_size=1, max_size=4)


def table(*layers: tuple[int, Mapping[int, float]]) -> Sensitivity:
    rows = (LayerSensitivity(f"layer{n}", elements, weight, {}) for n, (elements, weight) in enumerate(layers))
    return Sensitivity(1, tuple(rows))


def bits(of: Sensitivity, bit_widths: Mapping[str, int], overhead: int = 0) -> int:
    return sum(layer.elements * bit_widths[layer.name] for layer in of.layers) + overhead * len(
        set(bit_widths.values())
    )


def loss(of: Sensitivity, bit_widths: Mapping[str, int]) -> float:
    return sum(layer.weight[bit_widths[layer.name]] for layer in of.layers)


def every_choice(of: Sensitivity) -> list[dict[str, int]]:
    names = [layer.name for layer in of.layers]
    return [
        dict(zip(names, choice, strict=True)) for choice in itertools.product(*(layer.weight for layer in of.layers))
    ]


@given(tables.map(lambda layers: table(*layers)), st.floats(0, 1.1), st.integers(0, 60))
def test_no_other_choice_within_the_budget_loses_less(of: Sensitivity, generosity: float, overhead: int) -> None:
    sizes = [bits(of, choice, overhead) for choice in every_choice(of)]
    budget = int(min(sizes) + generosity * (max(sizes) - min(sizes)))
    chosen = choose_bit_widths(of, budget, overhead)
    assert list(chosen) == [layer.name for layer in of.layers]
    assert bits(of, chosen, overhead) <= budget
    best = min(loss(of, choice) for choice in every_choice(of) if bits(of, choice, overhead) <= budget)
    assert loss(of, chosen) == pytest.approx(best, abs=1e-12)


large_tables = st.lists(st.tuples(st.integers(10**6, 10**7), weights), min_size=1, max_size=4)


@settings(max_examples=25)
@given(large_tables.map(lambda layers: table(*layers)), st.floats(0, 1.1))
def test_budgets_of_millions_of_weights_are_kept(of: Sensitivity, generosity: float) -> None:
    sizes = [bits(of, choice) for choice in every_choice(of)]
    budget = int(min(sizes) + generosity * (max(sizes) - min(sizes)))
    assert bits(of, choose_bit_widths(of, budget)) <= budget


def test_layers_that_lose_less_get_fewer_bits() -> None:
    falling = {bit_width: 4.0**-bit_width for bit_width in BIT_WIDTHS}
    of = table((100, falling), (100, {bit_width: 50 * value for bit_width, value in falling.items()}))
    chosen = choose_bit_widths(of, 200 * 4)
    assert chosen["layer0"] < 4 < chosen["layer1"]
    assert bits(of, chosen) == 200 * 4


def test_of_equal_losses_the_narrower_is_chosen() -> None:
    assert choose_bit_widths(table((10, dict.fromkeys(BIT_WIDTHS, 0.5))), 1000) == {"layer0": 2}


def test_networks_of_odd_millions_of_weights_take_few_states() -> None:
    losses_of = [{bit_width: (n + 1) * 4.0**-bit_width for bit_width in BIT_WIDTHS} for n in range(10)]
    odd = table(*((1_000_003 + n, losses) for n, losses in enumerate(losses_of)))
    even = table(*((1, losses) for losses in losses_of))
    assert choose_bit_widths(odd, 45_020_000) == choose_bit_widths(even, 45)


@pytest.mark.parametrize(
    ("of", "budget", "hint"),
    [(table((10, {2: 0.0})), 19, "19 bits"), (table((10, {})), 99, "no losses of weights"), (table(), 9, "no")],
)
def test_what_cannot_be_solved_is_refused(of: Sensitivity, budget: int, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        choose_bit_widths(of, budget)
