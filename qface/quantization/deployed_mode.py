"""The mode in which a student computes what its file computes: eval mode, without observers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from qface.quantization.fake_quantize import quantizers
from qface.training_mode import preserve_training_mode, shared_by_threads

__all__ = ["deployed_mode", "deployed_on_cpu"]


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
