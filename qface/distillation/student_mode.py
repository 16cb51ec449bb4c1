"""Training mode and device of the networks during distillation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch
from torch import nn

from qface.distillation.distill_config import DistillConfig
from qface.training_mode import preserve_training_mode

__all__ = ["has_batch_norm", "mode_changes", "on_device", "set_observers", "set_student_mode"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def set_observers(model: nn.Module, enabled: bool) -> None:
    """Switch the observers of all quantizers on or off; a float network has none.

    Args:
        model: any network.
        enabled: True to let observers follow the data.
    """
    from qface.quantization import set_observers as set_all  # only that package knows about torch.ao

    set_all(model, enabled)


def set_student_mode(student: nn.Module, config: DistillConfig, step: int) -> None:
    """Set training mode for a step: dropout is off; batch norms and observers follow their schedule.

    Args:
        student: the network to train.
        config: settings with the schedule of batch norms and observers.
        step: the next step, >= 0.
    """
    frozen = config.bn_statistics_steps is not None and step >= config.bn_statistics_steps
    student.train()
    for module in student.modules():
        if isinstance(module, _DROPOUTS) or (frozen and isinstance(module, _BATCH_NORMS)):
            module.eval()
    set_observers(student, step < config.observer_steps)


def mode_changes(config: DistillConfig) -> set[int]:
    """Return the steps, other than the first, at which :func:`set_student_mode` has to be called."""
    return {config.observer_steps, config.bn_statistics_steps or 0}


def has_batch_norm(model: nn.Module) -> bool:
    """True if ``model`` contains a batch norm that is not folded into a convolution."""
    return any(isinstance(module, _BATCH_NORMS) for module in model.modules())


@contextmanager
def on_device(device: torch.device, *models: nn.Module) -> Iterator[None]:
    """Move ``models`` to ``device`` within the block, then restore their device and training mode."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(preserve_training_mode(model))
            stack.callback(_restore, model, _device_of(model))
            model.to(device)
        yield


def _restore(model: nn.Module, device: torch.device | None) -> None:
    if device is not None:
        model.to(device)


def _device_of(model: nn.Module) -> torch.device | None:
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), None)
