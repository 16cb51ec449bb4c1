"""Settings of :func:`qface.prune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from qface.checks import check_seed, check_whole
from qface.choices import ImportanceName
from qface.errors import ConfigError

__all__ = ["ImportanceName", "PruningConfig"]


@dataclass(frozen=True)
class PruningConfig:
    """Settings of pruning: the choice of channels, and the repair of what is lost.

    The defaults choose as Ef-QuantFace does: the weakest channels of every layer by 2-norm of the weights (DepGraph,
    Fang et al., CVPR 2023).

    Args:
        importance: of a channel, over all weights that go with it. ``"magnitude"``: the norm of its weights;
            ``"bn_scale"``: of its batch norm's scales; ``"fpgm"``: how far it lies from the geometric median of its
            layer; ``"taylor"``: how much its removal changes a loss to first order, that of embeddings which differ
            from those of mirror images; ``"hessian"``: to second order, of the embedding. The last two need images.
        norm: p of ``"magnitude"``, 1 or 2.
        global_pruning: compare all channels of the network; otherwise each layer loses the same share.
        max_pruning_ratio: what no layer loses more than, of its channels; of global pruning.
        round_to: number of channels is brought down to a multiple of it. Integer kernels are fastest at
            multiples of 16.
        ignored_layers: layers, by name, whose outputs stay as they are.
        keep_embedding: leave the size of the embedding as it is.
        iterative_steps: how many rounds the channels are removed in; between them :func:`qface.prune` can train.
        repair: solve each layer that reads fewer channels for the outputs that it had, by least squares over images
            (:mod:`qface.pruning.repair`), where images are given.
        reestimate: measure the statistics of batch norms again, on images, behind the repair. Repaired layers make what
            they made, and their batch norms need it less.
        num_images: how many of them importance, repair and batch norms look at.
        seed: of what is drawn for importance and repair.

    Raises:
        ConfigError: a setting is out of range.

    Example:
        >>> PruningConfig(round_to=16).round_to
        16
    """

    importance: ImportanceName = "magnitude"
    norm: int = 2
    global_pruning: bool = False
    max_pruning_ratio: float = 0.8
    round_to: int = 1
    ignored_layers: tuple[str, ...] = ()
    keep_embedding: bool = True
    iterative_steps: int = 1
    repair: bool = True
    reestimate: bool = False
    num_images: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.importance not in get_args(ImportanceName):
            raise ConfigError(f"importance is one of {', '.join(get_args(ImportanceName))}, not {self.importance!r}")
        if not isinstance(self.global_pruning, bool):
            raise ConfigError(f"global_pruning is True or False, not {self.global_pruning!r}")
        if self.norm not in (1, 2):
            raise ConfigError(f"norm is 1 or 2, not {self.norm!r}")
        if not 0 < self.max_pruning_ratio < 1:
            raise ConfigError(f"max_pruning_ratio lies between 0 and 1, not {self.max_pruning_ratio!r}")
        check_whole(1, round_to=self.round_to, iterative_steps=self.iterative_steps, num_images=self.num_images)
        check_seed(self.seed)

    @property
    def needs_images(self) -> bool:
        """True if importance is measured on images."""
        return self.importance in ("taylor", "hessian")
