from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qface.errors import ConfigError
from qface.quantization import CalibrationConfig


@given(st.integers(1), st.integers(1))
def test_every_positive_size_is_accepted(num_images: int, batch_size: int) -> None:
    config = CalibrationConfig(num_images, batch_size)
    assert (config.num_images, config.batch_size) == (num_images, batch_size)


@pytest.mark.parametrize("name", ["num_images", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "64"])
def test_a_size_that_is_no_positive_integer_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        CalibrationConfig(**{name: value})


@pytest.mark.parametrize("name", ["equalize", "gptq", "correct_biases"])
@pytest.mark.parametrize("value", [0, 1, None, "yes"])
def test_a_stage_is_switched_by_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be True or False"):
        CalibrationConfig(**{name: value})
