"""Optimizer with its parameter groups, and the learning rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from qface.distillation.distill_config import LR_PER_RMS_DISTANCE, OptimizerConfig, ScheduleConfig
from qface.distillation.losses import CosineEmbeddingLoss
from qface.distillation.relative_adam import RelativeAdam
from qface.errors import TrainingError

__all__ = ["initial_learning_rate", "optimizer_for", "optimizer_step", "schedule_for"]


def initial_learning_rate(config: OptimizerConfig, student: Tensor, teacher: Tensor) -> float:
    """Return the configured learning rate, or the one that suits the distance of student and teacher.

    Args:
        config: settings of the optimizer.
        student: embeddings [N, D] before training.
        teacher: embeddings [N, D] of the same images.
    """
    if config.learning_rate is not None:
        return config.learning_rate
    distance = math.sqrt(2 * max(0.0, float(CosineEmbeddingLoss()(student, teacher))))
    return LR_PER_RMS_DISTANCE * distance


def optimizer_for(
    config: OptimizerConfig, learning_rate: float, student: nn.Module, objective: nn.Module
) -> torch.optim.Optimizer:
    """Return an optimizer with three groups: weights (decayed), other parameters, quantizer scales.

    Args:
        config: settings of the optimizer.
        learning_rate: initial learning rate.
        student: the network to train.
        objective: the losses with their trainable parameters.

    Raises:
        TrainingError: the student has no trainable parameter.
    """
    scales = _scales(student)
    scale_ids = {id(p) for p in scales}
    plain = [p for p in student.parameters() if p.requires_grad and id(p) not in scale_ids]
    scale_rate = learning_rate if config.scale_learning_rate is None else config.scale_learning_rate
    trained_scales = [p for p in scales if p.requires_grad and scale_rate > 0]
    if not plain and not trained_scales:
        raise TrainingError("no parameter of the student requires a gradient: call requires_grad_() to train it")
    plain += list(objective.parameters())
    groups = [
        _group([p for p in plain if p.ndim > 1], learning_rate, config.weight_decay),
        _group([p for p in plain if p.ndim <= 1], learning_rate, 0.0),
        _group(trained_scales, scale_rate, 0.0),
    ]
    return _optimizer(config, [group for group in groups if group["params"]])


def _group(parameters: list[nn.Parameter], learning_rate: float, weight_decay: float) -> dict[str, Any]:
    return {"params": parameters, "lr": learning_rate, "weight_decay": weight_decay}


def _optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if config.name == "adamw":
        return torch.optim.AdamW(groups)
    if config.name == "relative_adam":
        return RelativeAdam([{**group, "weight_decay": 0.0} for group in groups])
    return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov)


def _scales(student: nn.Module) -> list[nn.Parameter]:
    from qface.quantization import scale_parameters  # only that package knows about torch.ao

    return list(scale_parameters(student))


def schedule_for(config: ScheduleConfig, optimizer: torch.optim.Optimizer, step: int, total: int) -> LambdaLR:
    """Return a scheduler that sets the learning rates of step ``step`` and moves on with each ``step()``.

    Args:
        config: settings of the schedule.
        optimizer: new, or with the state of step ``step``, which includes the initial learning rates.
        step: the next step, >= 0.
        total: number of steps of the run.
    """

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
        return warm * (0.5 * (1 + math.cos(math.pi * step / total)) if config.name == "cosine" else 1.0)

    return LambdaLR(optimizer, factor, last_epoch=step - 1)


def optimizer_step(optimizer: torch.optim.Optimizer, student: nn.Module, config: OptimizerConfig, done: float) -> float:
    """Clip the gradient and take one step, unless the gradient is not finite.

    Weights of quantized layers move with their scales, and towards their integers.

    Args:
        optimizer: the optimizer; its parameters hold their gradients.
        student: the network that it trains.
        config: settings of the optimizer.
        done: share of all steps before this one, 0 to 1.

    Returns:
        The 2-norm of the gradient before clipping.
    """
    from qface.quantization import pull_to_integers, weights_follow_scales  # only that package knows about torch.ao

    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    limit = math.inf if config.max_gradient_norm is None else config.max_gradient_norm
    norm = float(nn.utils.clip_grad_norm_(parameters, limit))
    if math.isfinite(norm):
        with weights_follow_scales(student):
            optimizer.step()
        pull_to_integers(student, config.dampening * done)
    return norm
