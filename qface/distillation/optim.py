"""The optimizer, its parameter groups and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qface.distillation.distill_config import LR_PER_RMS_DISTANCE, DistillConfig
from qface.distillation.losses import CosineEmbeddingLoss
from qface.distillation.relative_adam import RelativeAdam
from qface.errors import TrainingError

__all__ = ["learning_rate_of", "optimizer_for", "optimizer_step", "schedule_factor"]

_BASE = "base_learning_rate"


def learning_rate_of(config: DistillConfig, student: Tensor, teacher: Tensor) -> float:
    """The learning rate at the start of the schedule.

    Args:
        config: has it, or leaves it to the distance of these embeddings.
        student: embeddings [N, D].
        teacher: embeddings of the same images.
    """
    if config.learning_rate is not None:
        return config.learning_rate
    distance = math.sqrt(2 * max(0.0, float(CosineEmbeddingLoss()(student, teacher))))
    return LR_PER_RMS_DISTANCE * distance


def optimizer_for(
    config: DistillConfig, learning_rate: float, student: nn.Module, objective: nn.Module
) -> torch.optim.Optimizer:
    """An optimizer over all that is trained: the weights (with decay), the other parameters, the quantizer
    scales.

    Args:
        config: which optimizer.
        learning_rate: at the start of the schedule.
        student: the network that learns.
        objective: the losses, with what they learn.

    Raises:
        TrainingError: nothing of the student is trained.
    """
    scales = _scales(student)
    scale_ids = {id(p) for p in scales}
    plain = [p for p in student.parameters() if p.requires_grad and id(p) not in scale_ids]
    scale_rate = learning_rate if config.scale_learning_rate is None else config.scale_learning_rate
    trained_scales = [p for p in scales if p.requires_grad and scale_rate > 0]
    if not plain and not trained_scales:
        raise TrainingError("no parameter of the student requires a gradient: there is nothing to train")
    plain += list(objective.parameters())
    groups = [
        _group([p for p in plain if p.ndim > 1], learning_rate, config.weight_decay),
        _group([p for p in plain if p.ndim <= 1], learning_rate, 0.0),
        _group(trained_scales, scale_rate, 0.0),
    ]
    return _optimizer(config, [group for group in groups if group["params"]])


def _group(parameters: list[nn.Parameter], learning_rate: float, weight_decay: float) -> dict[str, Any]:
    return {"params": parameters, "lr": learning_rate, _BASE: learning_rate, "weight_decay": weight_decay}


def _optimizer(config: DistillConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    if config.optimizer == "relative_adam":
        return RelativeAdam([{**group, "weight_decay": 0.0} for group in groups])
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov)


def _scales(student: nn.Module) -> list[nn.Parameter]:
    from qface.quantization import scale_parameters  # only that package knows about torch.ao

    return list(scale_parameters(student))


def schedule_factor(config: DistillConfig, step: int, total: int) -> float:
    """The factor of the learning rate at step ``step`` of ``total``."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return warm * (0.5 * (1 + math.cos(math.pi * step / total)) if config.schedule == "cosine" else 1.0)


def optimizer_step(optimizer: torch.optim.Optimizer, factor: float, max_norm: float | None) -> float:
    """One step at ``factor`` times the learning rates, along gradients of at most ``max_norm``.

    Returns:
        The 2-norm of the gradient before it was shortened; where that is not finite, nothing is changed.
    """
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = group[_BASE] * factor
        optimizer.step()
    return norm
