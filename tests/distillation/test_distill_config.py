from __future__ import annotations

from typing import Any

import pytest

from qface.distillation import DistillConfig, LossConfig, OptimizerConfig, ScheduleConfig
from qface.errors import ConfigError


def test_paper_settings() -> None:
    paper = DistillConfig.paper()
    assert (paper.epochs, paper.batch_size, paper.bn_statistics_steps) == (1, 64, None)
    losses, optimizer = paper.losses, paper.optimizer
    assert (losses.margin, losses.scale) == (0.4, 64)
    assert losses.ekd_weight == 1.0  # the authors' own weights, 0.02 and 0.01, unchanged
    assert losses.reference_ekd
    assert not losses.uses_embedding_loss
    assert not losses.class_head
    assert losses.class_head_weight == 1.0  # equation 3
    assert (optimizer.name, optimizer.momentum, optimizer.weight_decay, optimizer.nesterov) == ("sgd", 0.9, 5e-4, False)
    assert (optimizer.learning_rate, optimizer.scale_learning_rate) == (0.001, 0)
    assert paper.schedule == ScheduleConfig("constant", warmup_steps=0)


BAD: list[tuple[type, dict[str, Any], str]] = [
    (DistillConfig, {"epochs": 0}, "epochs"),
    (DistillConfig, {"batch_size": 1}, "batch_size"),
    (DistillConfig, {"batch_size": 2.5}, "batch_size"),
    (DistillConfig, {"max_steps": 0}, "max_steps"),
    (DistillConfig, {"checkpoint_every": 0}, "checkpoint_every"),
    (DistillConfig, {"checkpoint_every": None}, "checkpoint_every"),
    (DistillConfig, {"seed": -1}, "seed"),
    (DistillConfig, {"seed": 2**63}, "seed"),
    (DistillConfig, {"observer_steps": -1}, "observer_steps"),
    (DistillConfig, {"bn_statistics_steps": -1}, "bn_statistics_steps"),
    (DistillConfig, {"num_workers": -1}, "num_workers"),
    (DistillConfig, {"precision": "fp8"}, "precision must be one of 'float32', 'bf16', got 'fp8'"),
    (DistillConfig, {"losses": {"ekd_weight": 1.0}}, "losses must be of type LossConfig, got dict"),
    (DistillConfig, {"optimizer": "sgd"}, "optimizer must be of type OptimizerConfig, got str"),
    (DistillConfig, {"schedule": "cosine"}, "schedule must be of type ScheduleConfig, got str"),
    (DistillConfig, {"augmentation": True}, "augmentation must be of type AugmentationConfig, got bool"),
    (DistillConfig, {"losses": LossConfig(embedding_loss=None, ekd_weight=1.0)}, "needs a learning_rate"),
    (LossConfig, {"ekd_weight": -1.0}, "ekd_weight must be a finite number >= 0, got -1.0"),
    (LossConfig, {"class_head": True, "class_head_weight": -0.5}, "class_head_weight"),
    (LossConfig, {"scale": 0.0}, "scale must be a finite number > 0, got 0.0"),
    (LossConfig, {"ekd_surrogate": "cubic"}, "ekd_surrogate must be one of 'sigmoid', 'linear', got 'cubic'"),
    (LossConfig, {"embedding_loss": "l1"}, "embedding_loss must be one of 'similarity', 'cosine', 'mse', got 'l1'"),
    (LossConfig, {"ekd_weight": 0.0, "embedding_loss": None}, "no loss is left"),
    (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate"),
    (OptimizerConfig, {"learning_rate": float("nan")}, "learning_rate"),
    (OptimizerConfig, {"learning_rate": float("inf")}, "learning_rate"),
    (OptimizerConfig, {"learning_rate": True}, "learning_rate"),
    (OptimizerConfig, {"name": "adamw"}, "'adamw' needs a learning_rate"),
    (OptimizerConfig, {"scale_learning_rate": -0.1}, "scale_learning_rate"),
    (OptimizerConfig, {"momentum": -0.1}, "momentum"),
    (OptimizerConfig, {"momentum": 0.0, "name": "sgd", "learning_rate": 0.005}, "nesterov"),
    (OptimizerConfig, {"max_gradient_norm": 0.0}, "max_gradient_norm"),
    (OptimizerConfig, {"dampening": 1.1}, "dampening must be a number from 0 to 1, got 1.1"),
    (OptimizerConfig, {"dampening": -0.1}, "dampening"),
    (OptimizerConfig, {"name": "lamb"}, "optimizer must be one of 'relative_adam', 'sgd', 'adamw', got 'lamb'"),
    (ScheduleConfig, {"name": "step"}, "schedule must be one of 'cosine', 'constant', got 'step'"),
    (ScheduleConfig, {"warmup_steps": -1}, "warmup_steps"),
]


@pytest.mark.parametrize(("kind", "fields", "cause"), BAD, ids=[str(fields) for _, fields, _ in BAD])
def test_a_bad_setting_is_refused_in_one_line(kind: type, fields: dict[str, Any], cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**fields)
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)
