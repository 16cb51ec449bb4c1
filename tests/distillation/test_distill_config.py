from __future__ import annotations

from typing import Any

import pytest

from qface.distillation import DistillConfig
from qface.errors import ConfigError


def test_paper_settings() -> None:
    paper = DistillConfig.paper()
    assert (paper.batch_size, paper.learning_rate, paper.margin, paper.scale, paper.epochs) == (
        64,
        0.001,
        0.4,
        64,
        1,
    )
    assert (paper.optimizer, paper.momentum, paper.weight_decay, paper.nesterov) == ("sgd", 0.9, 5e-4, False)
    assert paper.warmup_steps == 0
    assert paper.ekd_weight == 1.0  # the authors' own weights, 0.02 and 0.01, unchanged
    assert paper.reference_ekd
    assert not paper.uses_embedding_loss
    assert not paper.class_head
    assert paper.class_head_weight == 1.0  # equation 3


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"batch_size": 2.5},
        {"max_steps": 0},
        {"checkpoint_every": 0},
        {"learning_rate": 0.0},
        {"learning_rate": None, "optimizer": "adamw"},
        {"learning_rate": None, "embedding_loss": None, "ekd_weight": 1.0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"scale_learning_rate": -0.1},
        {"momentum": -0.1},
        {"max_gradient_norm": 0.0},
        {"seed": -1},
        {"seed": 2**63},
        {"observer_steps": -1},
        {"bn_statistics_steps": -1},
        {"ekd_surrogate": "cubic"},
        {"embedding_loss": "l1"},
        {"optimizer": "lamb"},
        {"schedule": "step"},
        {"ekd_weight": 0.0, "embedding_loss": None},
        {"class_head": True, "class_head_weight": -0.5},
        {"momentum": 0.0, "optimizer": "sgd", "learning_rate": 0.005},
        {"warmup_steps": -1},
    ],
)
def test_a_bad_setting_is_refused_in_one_line(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        DistillConfig(**fields)
    assert "\n" not in str(caught.value)
    assert next(iter(fields)) in str(caught.value) or "nesterov" in str(caught.value)
