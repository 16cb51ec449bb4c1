"""The probe of int8 kernels, on this processor and on an emulated one whose kernels saturate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qface.deployment.int8_saturation import int8_saturates, saturation_probe
from tests.runtimes.runtime import HOST, Runtime


def equals(runtime: str, folder: Path) -> bool:
    model, images, expected = saturation_probe()
    onnx.checker.check_model(model)
    onnx.save(model, folder / "probe.onnx")
    return np.array_equal(Runtime(runtime).embed(folder / "probe.onnx", images), expected)


def test_the_answer_is_that_of_another_process(tmp_path: Path) -> None:
    assert int8_saturates() == (not equals(HOST, tmp_path))


def test_a_processor_with_vnni_does_not_saturate() -> None:
    processor = Path("/proc/cpuinfo")
    if not processor.exists() or "vnni" not in processor.read_text():
        pytest.skip("this processor has no VNNI")
    assert not int8_saturates()


@pytest.mark.runtimes
@pytest.mark.parametrize(("runtime", "saturates"), [("x86-haswell", True), ("aarch64-dotprod", False)])
def test_other_processors(runtime: str, saturates: bool, tmp_path: Path) -> None:
    if reason := Runtime(runtime).reason_missing():
        pytest.skip(reason)
    assert equals(runtime, tmp_path) != saturates
