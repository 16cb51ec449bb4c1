"""Settings of :func:`qface.prune`."""

from __future__ import annotations

from dataclasses import dataclass

from qface.checks import check_choice, check_flag, check_seed, check_whole
from qface.choices import ImportanceName
from qface.errors import ConfigError

__all__ = ["ImportanceName", "PruningConfig"]


@dataclass(frozen=True)
class PruningConfig:
    """Settings of :func:`qface.prune`.

    The defaults are those of Ef-QuantFace: remove the channels of smallest weight 2-norm, the same fraction in each
    layer (DepGraph, Fang et al., CVPR 2023).

    Args:
        importance: measure of channel importance, over all weights that are removed with the channel.
            ``"magnitude"``: norm of the weights; ``"bn_scale"``: norm of the BatchNorm scales; ``"fpgm"``: distance to
            the geometric median of the layer's filters; ``"taylor"``: first-order change of the cosine distance
            between embeddings of images and of their mirror images; ``"hessian"``: second-order change of the
            embedding. ``"taylor"`` and ``"hessian"`` need images.
        norm: p of the norm for ``"magnitude"``, 1 or 2.
        global_pruning: True to rank the channels of all layers together; False to remove the same fraction from each.
        max_pruning_ratio: maximum fraction of channels that global pruning removes from a layer, in (0, 1).
        round_to: round the channel count of each layer down to a multiple of this, >= 1. Integer kernels are fastest
            at multiples of 16.
        ignored_layers: names of layers whose output channels are all kept.
        keep_embedding: True to keep the embedding dimension.
        iterative_steps: number of pruning steps, >= 1; the ``on_step_end`` of :func:`qface.prune` can train between
            them.
        repair: True to fit layers with removed inputs to their previous outputs by ridge regression, if images are
            given (:mod:`qface.pruning.repair`).
        reestimate: True to re-estimate BatchNorm statistics on the images after the repair. Repaired layers keep their
            outputs, so they need it less.
        num_images: maximum number of images for importance, repair and BatchNorm statistics, >= 1.
        seed: random seed of importance and repair.

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
        check_choice(ImportanceName, importance=self.importance)
        check_flag(global_pruning=self.global_pruning)
        if self.norm not in (1, 2):
            raise ConfigError(f"norm must be 1 or 2, got {self.norm!r}")
        if not 0 < self.max_pruning_ratio < 1:
            raise ConfigError(f"max_pruning_ratio must be > 0 and < 1, got {self.max_pruning_ratio!r}")
        check_whole(1, round_to=self.round_to, iterative_steps=self.iterative_steps, num_images=self.num_images)
        check_seed(self.seed)

    @property
    def needs_images(self) -> bool:
        """True if the importance is measured on images."""
        return self.importance in ("taylor", "hessian")
