"""Modes of a student.

In deployed mode it computes what its file computes: eval mode, without observers. In simulated mode it computes the
same in float, up to float noise, in less time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from qface.graph.layers import FakeQuantizer
from qface.quantization.fake_quantize import SharedScaleFakeQuantize, quantizers
from qface.quantization.quantized_layers import (
    QuantizedAffine,
    QuantizedGlobalAveragePool,
    QuantizedPReLU,
    WeightedLayer,
)
from qface.shared_context import shared_by_threads
from qface.training_mode import preserve_training_mode

__all__ = ["deployed_mode", "deployed_on_cpu", "simulated_mode"]

_HAVE_MODES = (
    FakeQuantizer,
    SharedScaleFakeQuantize,
    *WeightedLayer,
    QuantizedAffine,
    QuantizedGlobalAveragePool,
    QuantizedPReLU,
)
"""Modules that compute with integers in eval mode and with fake-quantized floats in training mode."""


def deployed_mode(student: nn.Module) -> AbstractContextManager[None]:
    """Keep ``student`` in eval mode with its observers off within the block; then restore both."""
    return shared_by_threads(student, _deployed_mode)


@contextmanager
def _deployed_mode(student: nn.Module) -> Iterator[None]:
    observing = [quantizer for quantizer in quantizers(student) if quantizer.observing]
    with preserve_training_mode(student):
        student.eval()
        for quantizer in observing:
            quantizer.enable_observer(False)
        try:
            yield
        finally:
            for quantizer in observing:
                quantizer.enable_observer()


@contextmanager
def deployed_on_cpu(student: nn.Module) -> Iterator[nn.Module]:
    """Yield ``student`` in deployed mode, or a copy on the CPU if it is on another device."""
    if any(tensor.device.type != "cpu" for tensor in student.state_dict().values()):
        student = copy.deepcopy(student).cpu()
    with deployed_mode(student):
        yield student


@contextmanager
def simulated_mode(student: nn.Module) -> Iterator[None]:
    """Let the quantized layers of ``student`` compute in float within the block; all other layers keep their mode."""
    with preserve_training_mode(student):
        for module in student.modules():
            if isinstance(module, _HAVE_MODES):
                module.training = True
        yield
