"""The settings of a distillation run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

from qface.checks import check_seed, check_whole
from qface.choices import PrecisionName
from qface.data.augmentation import AugmentationConfig
from qface.errors import ConfigError

__all__ = [
    "LR_PER_RMS_DISTANCE",
    "DistillConfig",
    "EmbeddingLossName",
    "OptimizerName",
    "PrecisionName",
    "ScheduleName",
    "Surrogate",
]

Surrogate = Literal["sigmoid", "linear"]
EmbeddingLossName = Literal["cosine", "mse"]
OptimizerName = Literal["relative_adam", "sgd", "adamw"]
ScheduleName = Literal["cosine", "constant"]


LR_PER_RMS_DISTANCE = 0.017
"""The learning rate that brought students nearest to their teachers, in parts of their distance before training."""


@dataclass(frozen=True)
class DistillConfig:
    """Settings of a distillation; the defaults repair a quantized or pruned student in one epoch.

    They compare embeddings and residual sums, and take steps as large as the student is far from its teacher.
    EKD is off: beside an embedding term it costs more than it gives (``docs/distillation.md`` has the figures).

    Args:
        epochs: rounds of ``floor(images / batch_size)`` steps, at least one (of a loader: its own length). Where EKD
            knows who is who, or ``pseudo_pairs`` says so, half of each batch is chosen for its pairs: a round shows
            some images several times and others not at all, of LFW a quarter. Without EKD it shows each image once.
        batch_size: images a step, over all devices together; smaller where there are fewer images. A loader
            keeps its own batches.
        max_steps: an upper limit for all steps together, which the schedule then spans; None sets none.
        ekd_weight: weight of the EKD term (:class:`qface.distillation.losses.EKDLoss`); 0 switches it off. Beside an
            embedding loss it has to be small: at its authors' weights its gradient is three times as long as the cosine
            loss's and far noisier (MobileFaceNet at w6a6).
        ekd_surrogate: ``"sigmoid"`` as in the EKD authors' code, ``"linear"`` as in the paper's equation 1.
        reference_ekd: start the thresholds at zero and let a batch without positives fail, as the original does.
        pseudo_pairs: of images without labels, let EKD take those for one person that the teacher is sure of
            (:mod:`qface.distillation.pseudo_labels`); otherwise it sees negative pairs only. A class head needs
            true labels.
        embedding_loss: ``"cosine"``, ``"mse"`` (QuantFace's) or None for no embedding term. It needs a
            teacher with embeddings as long as the student's; EKD does not.
        embedding_weight: weight of the embedding term.
        feature_loss_weight: weight of the difference between the residual sums of both networks, in parts of their
            variance (:mod:`qface.distillation.feature_taps`). It needs a student that was quantized from such a network
            as the teacher; for others there is no such term.
        class_head: train an ArcFace head on the identities beside the student (the paper's equation 3). It needs a
            folder or a tensor with labels: how many people a loader will name is not known before its end.
        class_head_weight: weight of its loss, whose gradient is some hundred times as long as the cosine loss's.
        margin: angular margin of the class head in radians.
        scale: the class head's factor on the cosines.
        optimizer: ``"relative_adam"``, whose steps are in parts of the size of what they change
            (:mod:`qface.distillation.relative_adam`); ``"sgd"`` or ``"adamw"``.
        learning_rate: at the start of the schedule. For SGD 0.005: channels that calibration equalized have weights of
            very different size, and at 0.02 the first ten steps triple the loss. None, of ``"relative_adam"`` beside an
            embedding loss, takes :data:`LR_PER_RMS_DISTANCE` times the root mean square distance of student and teacher
            before training, between embeddings of length 1.
        scale_learning_rate: the same for the quantizers' scales; None means ``learning_rate``, 0 leaves them
            as they are.
        momentum: of SGD.
        nesterov: Nesterov's momentum, of SGD.
        weight_decay: on the weights of convolutions and linear layers only: not on biases, norms, PReLU
            slopes and quantizer scales. Not of ``"relative_adam"``.
        schedule: ``"cosine"`` falls to zero at the last step, ``"constant"`` does not.
        warmup_steps: steps before the rate is whole; it grows by the same amount in each.
        max_gradient_norm: longer gradients are shortened to this 2-norm; None leaves them.
        horizontal_flip: mirror every image with probability 1/2, the same way for student and teacher.
        augmentation: random changes of the images, the same for student and teacher, as cameras make them
            (:mod:`qface.data.augmentation`); None shows them as they are, which is best for one epoch on a few thousand
            faces (``docs/distillation.md``). Floats are never changed.
        bn_statistics_steps: for so many steps batch norms use and update the statistics of the batch, then
            the running ones are kept; None means always. Their affine parameters learn throughout.
        observer_steps: for so many steps the observers of the quantizers follow the data; afterwards they are
            off. Until then no checkpoint is written.
        precision: ``"float32"``, or ``"bf16"`` to multiply in bfloat16 (autocast), which is less exact, and for large
            networks faster on GPUs and on CPUs with AMX. Quantizers and losses compute in float32 in any case.
        seed: of batches, flips and the class head's first weights.
        checkpoint_every: steps between two checkpoints; they are written only where a run folder is given.
        device: where to train, as torch names it; None takes a GPU where there is one.

    Raises:
        ConfigError: a field is out of its range, or no loss is left.

    Example:
        >>> DistillConfig(epochs=3, device="cpu").batch_size
        16
    """

    epochs: int = 1
    batch_size: int = 16
    max_steps: int | None = None
    ekd_weight: float = 0.0
    ekd_surrogate: Surrogate = "sigmoid"
    reference_ekd: bool = False
    pseudo_pairs: bool = True
    embedding_loss: EmbeddingLossName | None = "cosine"
    embedding_weight: float = 1.0
    feature_loss_weight: float = 3.0
    class_head: bool = False
    class_head_weight: float = 0.001
    margin: float = 0.4
    scale: float = 64.0
    optimizer: OptimizerName = "relative_adam"
    learning_rate: float | None = None
    scale_learning_rate: float | None = None
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: ScheduleName = "cosine"
    warmup_steps: int = 8
    max_gradient_norm: float | None = None
    horizontal_flip: bool = True
    augmentation: AugmentationConfig | None = None
    bn_statistics_steps: int | None = 0
    observer_steps: int = 0
    precision: PrecisionName = "float32"
    seed: int = 0
    checkpoint_every: int = 50
    device: str | None = None

    def __post_init__(self) -> None:
        _at_least(1, epochs=self.epochs, max_steps=self.max_steps, checkpoint_every=self.checkpoint_every)
        _at_least(2, batch_size=self.batch_size)
        _at_least(
            0,
            bn_statistics_steps=self.bn_statistics_steps,
            observer_steps=self.observer_steps,
            warmup_steps=self.warmup_steps,
        )
        check_seed(self.seed)
        _not_negative(
            ekd_weight=self.ekd_weight,
            embedding_weight=self.embedding_weight,
            feature_loss_weight=self.feature_loss_weight,
            class_head_weight=self.class_head_weight,
            margin=self.margin,
            scale_learning_rate=self.scale_learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        _positive(learning_rate=self.learning_rate, scale=self.scale, max_gradient_norm=self.max_gradient_norm)
        _one_of(("sigmoid", "linear"), ekd_surrogate=self.ekd_surrogate)
        _one_of(("cosine", "mse", None), embedding_loss=self.embedding_loss)
        _one_of(get_args(OptimizerName), optimizer=self.optimizer)
        _one_of(("cosine", "constant"), schedule=self.schedule)
        _one_of(("float32", "bf16"), precision=self.precision)
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov needs a momentum above 0: set nesterov=False, or a momentum")
        if not (self.uses_ekd or self.uses_embedding_loss or self.class_head):
            raise ConfigError(
                "no loss is left: give ekd_weight or embedding_weight a positive value, or set class_head"
            )
        if self.learning_rate is None and not (self.optimizer == "relative_adam" and self.uses_embedding_loss):
            raise ConfigError(
                "without a learning_rate steps are as large as the embeddings are far apart, which is for "
                "relative_adam and an embedding loss: give a learning_rate"
            )

    @property
    def uses_ekd(self) -> bool:
        """True if EKD is part of the loss."""
        return self.ekd_weight > 0

    @property
    def uses_embedding_loss(self) -> bool:
        """True if the distance to the teacher's embedding is part of the loss."""
        return self.embedding_loss is not None and self.embedding_weight > 0

    @classmethod
    def paper(cls) -> DistillConfig:
        """The settings of Ef-QuantFace, section 4.2, with what it leaves open filled from the EKD authors'
        code.

        The paper: one epoch, batch 64, learning rate 0.001, margin 0.4, scale 64, EKD without a class head
        (equation 4). Assumed: SGD with momentum 0.9 and weight decay 5e-4, no schedule within the one epoch,
        batch norms that train as usual, thresholds that start at zero, all as in TFace
        ``recognition/tasks/ekd``; quantizer scales that stay where calibration put them.
        """
        return cls(
            epochs=1,
            batch_size=64,
            ekd_weight=1.0,
            ekd_surrogate="sigmoid",
            reference_ekd=True,
            embedding_loss=None,
            feature_loss_weight=0.0,
            class_head=False,
            class_head_weight=1.0,
            margin=0.4,
            scale=64.0,
            optimizer="sgd",
            learning_rate=0.001,
            scale_learning_rate=0.0,
            momentum=0.9,
            nesterov=False,
            weight_decay=5e-4,
            schedule="constant",
            warmup_steps=0,
            bn_statistics_steps=None,
        )


_OPTIONAL = frozenset({"max_steps", "bn_statistics_steps", "max_gradient_norm", "learning_rate", "scale_learning_rate"})


def _at_least(least: int, **fields: int | None) -> None:
    check_whole(least, **{name: value for name, value in fields.items() if not _left_out(name, value)})


def _not_negative(**fields: float | None) -> None:
    for name, value in fields.items():
        if not _left_out(name, value) and not (_is_number(value) and 0 <= value < math.inf):
            raise ConfigError(f"{name} is a number from 0 on, not {value!r}")


def _positive(**fields: float | None) -> None:
    for name, value in fields.items():
        if not _left_out(name, value) and not (_is_number(value) and 0 < value < math.inf):
            raise ConfigError(f"{name} is a number above 0, not {value!r}")


def _left_out(name: str, value: object) -> bool:
    return value is None and name in _OPTIONAL


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_of(choices: tuple[str | None, ...], **fields: str | None) -> None:
    for name, value in fields.items():
        if value not in choices:
            raise ConfigError(f"{name} is one of {', '.join(map(repr, choices))}, not {value!r}")
