"""Structural pruning: a smaller network of the same kind, whole channels removed with all that depends on them."""

from qface.pruning.budget import Budget, Cost, cost_of
from qface.pruning.prune import prune
from qface.pruning.pruning_config import PruningConfig

__all__ = ["Budget", "Cost", "PruningConfig", "cost_of", "prune"]
