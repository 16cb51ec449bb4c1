"""Structural pruning: remove channels together with all weights that depend on them."""

from qface.pruning.budget import Budget, Cost, cost_of
from qface.pruning.prune import prune
from qface.pruning.pruning_config import PruningConfig

__all__ = ["Budget", "Cost", "PruningConfig", "cost_of", "prune"]
