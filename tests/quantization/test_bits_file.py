"""``save_bits`` and ``load_bits``: what is read is what was written, or is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qface
from qface import LayerBits, QuantizationConfig
from qface.errors import ConfigError, ExportError, LimitError
from qface.quantization.quantization_config import ActivationObserver, WeightObserver

BITS = st.integers(2, 8)
NAMES = st.text(min_size=1)
CONFIGS = st.builds(
    QuantizationConfig,
    weight_bits=BITS,
    activation_bits=BITS,
    overrides=st.dictionaries(NAMES, st.builds(LayerBits, weight=st.none() | BITS, activation=st.none() | BITS)),
    weight_observer=st.from_type(WeightObserver),
    activation_observer=st.from_type(ActivationObserver),
    percentile=st.floats(50, 100, exclude_min=True),
    wide_residuals=st.booleans(),
    ignored_layers=st.lists(NAMES).map(tuple),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bits") / "bits.json"


@given(CONFIGS)
def test_every_config_is_read_as_it_was_written(file: Path, config: QuantizationConfig) -> None:
    qface.save_bits(config, file)
    assert qface.load_bits(file) == config


@given(CONFIGS, st.sampled_from(list(QuantizationConfig().to_dict())), st.none() | st.text() | st.lists(st.integers()))
def test_a_field_of_another_type_is_refused_or_read(
    file: Path, config: QuantizationConfig, field: str, value: Any
) -> None:
    file.write_text(json.dumps({"schema_version": 1, **config.to_dict(), field: value}))
    refused = ""
    try:
        qface.load_bits(file)
    except ConfigError as error:
        refused = str(error)
    assert not refused or (str(file) in refused and "\n" not in refused)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("{", "Expecting property name"),
        ("[]", "schema_version"),
        ("{}", "schema_version"),
        ('{"schema_version": 2}', "schema_version"),
        ('{"schema_version": 1, "bits": 6}', "unknown field 'bits'"),
        ('{"schema_version": 1, "weight_bits": 9}', "weight_bits"),
        ('{"schema_version": 1, "wide_residuals": 1}', "wide_residuals"),
        ('{"schema_version": 1, "ignored_layers": "fc"}', "ignored_layers"),
        ('{"schema_version": 1, "overrides": ["fc"]}', "overrides"),
        ('{"schema_version": 1, "overrides": {"fc": {"bits": 4}}}', "bits"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path: Path, text: str, hint: str) -> None:
    (tmp_path / "bits.json").write_text(text)
    with pytest.raises(ConfigError, match=hint) as refused:
        qface.load_bits(tmp_path / "bits.json")
    assert "give a file of qface allocate-bits" in str(refused.value)


def test_fields_that_are_left_out_take_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "bits.json").write_text('{"schema_version": 1, "weight_bits": 4}')
    assert qface.load_bits(tmp_path / "bits.json") == QuantizationConfig(weight_bits=4)


def test_a_missing_file_and_one_without_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json"):
        qface.load_bits(tmp_path / "absent.json")
    (tmp_path / "deep.json").write_text("[" * 1000 + "]" * 1000)
    with pytest.raises(LimitError, match=r"deep\.json"):
        qface.load_bits(tmp_path / "deep.json")
    with pytest.raises(ExportError, match="cannot write"):
        qface.save_bits(QuantizationConfig(), tmp_path / "absent" / "bits.json")
