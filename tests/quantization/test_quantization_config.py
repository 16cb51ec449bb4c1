import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qface.errors import ConfigError
from qface.quantization import LayerBits, QuantizationConfig, quantize

BIT_WIDTHS = st.integers(2, 8)
NO_BIT_WIDTHS = st.one_of(
    st.integers(max_value=1), st.integers(min_value=9), st.booleans(), st.floats(), st.text(), st.just(None)
)


@st.composite
def configs(draw: st.DrawFn) -> QuantizationConfig:
    layer_bits = st.builds(LayerBits, st.none() | BIT_WIDTHS, st.none() | BIT_WIDTHS)
    return QuantizationConfig(
        weight_bits=draw(BIT_WIDTHS),
        activation_bits=draw(BIT_WIDTHS),
        overrides=draw(st.dictionaries(st.text(), layer_bits, max_size=4)),
        weight_observer=draw(st.sampled_from(["mse", "minmax", "percentile"])),
        activation_observer=draw(st.sampled_from(["mse", "minmax", "percentile", "moving_average"])),
        percentile=draw(st.floats(50, 100, exclude_min=True)),
    )


@given(configs())
def test_plain_values_build_the_same_config(config: QuantizationConfig) -> None:
    fields = json.loads(json.dumps(config.to_dict()))
    overrides = {name: LayerBits(**bits) for name, bits in fields.pop("overrides").items()}
    assert QuantizationConfig(overrides=overrides, **fields) == config


@given(configs(), st.text())
def test_an_override_changes_what_it_names(config: QuantizationConfig, name: str) -> None:
    override = config.overrides.get(name, LayerBits())
    assert config.weight_bits_of(name) == (override.weight or config.weight_bits)
    assert config.activation_bits_of(name) == (override.activation or config.activation_bits)


@given(NO_BIT_WIDTHS)
def test_other_bits_are_refused_everywhere(bits: Any) -> None:
    for make in (
        lambda: QuantizationConfig(weight_bits=bits),
        lambda: QuantizationConfig(activation_bits=bits),
        lambda: quantize(nn.Linear(1, 1), bits),
    ):
        with pytest.raises(ConfigError) as caught:
            make()
        assert "\n" not in str(caught.value)
    if bits is not None:
        for override in ("weight", "activation"):
            with pytest.raises(ConfigError):
                LayerBits(**{override: bits})


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_observer": "moving_average"},
        {"weight_observer": "max"},
        {"activation_observer": ""},
        {"percentile": 50},
        {"percentile": 100.1},
        {"percentile": float("nan")},
        {"overrides": {"fc": 4}},
        {"overrides": {"fc": {"weight": 4}}},
    ],
)
def test_other_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        QuantizationConfig(**fields)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        QuantizationConfig().weight_bits = 3  # type: ignore[misc]
