"""Settings of a distillation run: losses, optimizer, learning rate schedule, and everything else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from qface.checks import check_choice, check_not_negative, check_positive, check_seed, check_share, check_whole
from qface.choices import PrecisionName
from qface.data.augmentation import AugmentationConfig
from qface.errors import ConfigError

__all__ = [
    "LR_PER_RMS_DISTANCE",
    "MIN_STEPS",
    "DistillConfig",
    "EmbeddingLossName",
    "LossConfig",
    "OptimizerConfig",
    "OptimizerName",
    "PrecisionName",
    "ScheduleConfig",
    "ScheduleName",
    "Surrogate",
]

Surrogate = Literal["sigmoid", "linear"]
EmbeddingLossName = Literal["similarity", "cosine", "mse"]
OptimizerName = Literal["relative_adam", "sgd", "adamw"]
ScheduleName = Literal["cosine", "constant"]


LR_PER_RMS_DISTANCE = 0.017
"""Best learning rate of relative_adam, divided by the RMS distance of student and teacher before training."""


MIN_STEPS = 400
"""Minimum number of steps if the number of epochs is not given."""


@dataclass(frozen=True)
class LossConfig:
    """Terms of the distillation loss and their weights.

    The defaults compare embeddings and residual sums. EKD is off: together with an embedding loss it costs more than it
    gains (figures in ``docs/research/distillation.md``).

    Args:
        ekd_weight: weight of :class:`qface.distillation.losses.EKDLoss`; 0 switches it off. Keep it small together with
            an embedding loss: at its authors' weights, the EKD gradient is three times as long as that of the cosine
            loss and much noisier (MobileFaceNet, w6a6).
        ekd_surrogate: ``"sigmoid"`` as in the EKD authors' code, or ``"linear"`` as in equation 1 of the paper.
        reference_ekd: follow the authors' code: thresholds start at 0, and a batch without positive pairs fails.
        pseudo_pairs: for images without labels, let EKD use the positive pairs that the teacher is sure of
            (:mod:`qface.distillation.pseudo_labels`). If False, all pairs are negative.
        embedding_loss: ``"similarity"``, the change of cosines with other faces
            (:class:`qface.distillation.losses.SimilarityEmbeddingLoss`), ``"cosine"``, the distance to the teacher's
            embedding, ``"mse"`` (QuantFace), or None for no embedding term. Student and teacher need the same embedding
            dimension for it; EKD alone does not require that.
        embedding_weight: weight of the embedding term.
        feature_loss_weight: weight of the residual sum term in the first step, relative to the variance of the sums
            (:mod:`qface.distillation.feature_taps`). It falls to 0 with the square of the share of steps that are left.
            The term needs a student that was quantized from the teacher's architecture, and is left out for other
            students.
        class_head: also train an ArcFace head on the identities (equation 3 of the paper). It needs a folder or a
            tensor with labels.
        class_head_weight: weight of the ArcFace loss, whose gradient is about 100 times as long as the cosine gradient.
        margin: angular margin of the ArcFace head in radians.
        scale: factor of the ArcFace head on the cosines.

    Raises:
        ConfigError: a value is out of range, or no term has a positive weight.

    Example:
        >>> LossConfig(ekd_weight=0.1).uses_ekd
        True
    """

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

    def __post_init__(self) -> None:
        check_choice(Surrogate, ekd_surrogate=self.ekd_surrogate)
        if self.embedding_loss is not None:
            check_choice(EmbeddingLossName, embedding_loss=self.embedding_loss)
        check_not_negative(
            ekd_weight=self.ekd_weight,
            embedding_weight=self.embedding_weight,
            feature_loss_weight=self.feature_loss_weight,
            class_head_weight=self.class_head_weight,
            margin=self.margin,
        )
        check_positive(scale=self.scale)
        if not (self.uses_ekd or self.uses_embedding_loss or self.class_head):
            raise ConfigError(
                "no loss is left: set embedding_loss and embedding_weight, ekd_weight > 0, or class_head=True"
            )

    @property
    def uses_ekd(self) -> bool:
        """True if EKD is a term of the loss."""
        return self.ekd_weight > 0

    @property
    def uses_embedding_loss(self) -> bool:
        """True if the distance to the teacher's embedding is a term of the loss."""
        return self.embedding_loss is not None and self.embedding_weight > 0


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning rates and regularization.

    Args:
        name: ``"relative_adam"``, whose steps are relative to the size of each weight
            (:mod:`qface.distillation.relative_adam`), ``"sgd"`` or ``"adamw"``.
        learning_rate: initial learning rate. None, for relative_adam with an embedding loss, means
            :data:`LR_PER_RMS_DISTANCE` times the RMS distance between the normalized embeddings of student and teacher
            before training. 0.005 suits SGD: equalized channels have weights of very different size, and 0.02
            triples the loss within ten steps.
        scale_learning_rate: initial learning rate of the quantizer scales; None means ``learning_rate``, 0 keeps
            the scales fixed.
        momentum: momentum of SGD.
        nesterov: use Nesterov momentum in SGD.
        weight_decay: weight decay of SGD and AdamW on weights of convolutions and linear layers; biases, norms, PReLU
            slopes and quantizer scales have none. Relative_adam ignores it.
        max_gradient_norm: clip the gradient to this 2-norm; None does not clip.
        dampening: share of the distance to the values of their integers by which weights of quantized layers move after
            the last step. It grows linearly from 0 (oscillation dampening; Nagel et al., ICML 2022).

    Raises:
        ConfigError: a value is out of range, or ``sgd`` or ``adamw`` has no learning rate.

    Example:
        >>> OptimizerConfig("sgd", learning_rate=0.005).momentum
        0.9
    """

    name: OptimizerName = "relative_adam"
    learning_rate: float | None = None
    scale_learning_rate: float | None = None
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    max_gradient_norm: float | None = None
    dampening: float = 0.003

    def __post_init__(self) -> None:
        check_choice(OptimizerName, optimizer=self.name)
        check_positive(**_given(learning_rate=self.learning_rate, max_gradient_norm=self.max_gradient_norm))
        check_not_negative(momentum=self.momentum, weight_decay=self.weight_decay)
        check_share(dampening=self.dampening)
        check_not_negative(**_given(scale_learning_rate=self.scale_learning_rate))
        if self.learning_rate is None and self.name != "relative_adam":
            raise ConfigError(f"the optimizer {self.name!r} needs a learning_rate: set it")
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov needs momentum > 0: set nesterov=False, or a momentum")


@dataclass(frozen=True)
class ScheduleConfig:
    """Schedule of the learning rate over all steps.

    Args:
        name: ``"cosine"`` decays to 0 at the last step, ``"constant"`` does not decay.
        warmup_steps: steps of linear warm-up before the full learning rate.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> ScheduleConfig("constant").warmup_steps
        8
    """

    name: ScheduleName = "cosine"
    warmup_steps: int = 8

    def __post_init__(self) -> None:
        check_choice(ScheduleName, schedule=self.name)
        check_whole(0, warmup_steps=self.warmup_steps)


@dataclass(frozen=True)
class DistillConfig:
    """Settings of a distillation; the defaults repair a quantized or pruned student in one epoch.

    Args:
        epochs: number of epochs of ``floor(images / batch_size)`` steps, at least one step (for a loader: its
            length). None means one epoch, or :data:`MIN_STEPS` steps where an epoch has fewer, since steps count more
            than images (``docs/research/distillation.md``). With EKD and known identities, half of each batch is chosen
            for its positive pairs, and an epoch repeats some images and skips others (a quarter of LFW). Without EKD it
            shows each image once.
        batch_size: images per step over all processes; smaller if there are fewer images. A loader keeps its own
            batches.
        max_steps: maximum number of steps in total, which the schedule then spans; None sets no limit.
        losses: terms of the loss.
        optimizer: optimizer and learning rates.
        schedule: schedule of the learning rate.
        augmentation: random changes of the images, the same for student and teacher; None does not change them, which
            is best for one epoch on a few thousand faces (``docs/research/distillation.md``). Float images are never
            changed.
        horizontal_flip: mirror each image with probability 1/2, the same for student and teacher.
        bn_statistics_steps: number of steps in which batch norms use and update batch statistics before the running
            statistics are frozen; None never freezes them. The affine parameters always train.
        observer_steps: number of steps in which the observers of quantizers follow the data. No checkpoint is written
            before they are off.
        precision: ``"float32"``, or ``"bf16"`` for bfloat16 autocast, which is less exact and faster for large
            networks on GPUs and on CPUs with AMX. Quantizers and losses always compute in float32.
        seed: seed of batches, flips, augmentation and the initial weights of the class head.
        checkpoint_every: steps between two checkpoints, if a run folder is given.
        device: device to train on, such as ``"cuda:1"``; None means a GPU if there is one.
        num_workers: processes that decode and augment the next batches; None means one per core that torch leaves
            free, at most 4, and 0 reads in the training process. They never change a result. Images in memory and
            loaders use none, and neither do systems other than Linux.

    Raises:
        ConfigError: a value is out of range, or the parts contradict each other.

    Example:
        >>> DistillConfig(epochs=3, optimizer=OptimizerConfig(learning_rate=0.002), device="cpu").batch_size
        16
    """

    epochs: int | None = None
    batch_size: int = 16
    max_steps: int | None = None
    losses: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augmentation: AugmentationConfig | None = None
    horizontal_flip: bool = True
    bn_statistics_steps: int | None = 0
    observer_steps: int = 0
    precision: PrecisionName = "float32"
    seed: int = 0
    checkpoint_every: int = 50
    device: str | None = None
    num_workers: int | None = None

    def __post_init__(self) -> None:
        _check_type(LossConfig, losses=self.losses)
        _check_type(OptimizerConfig, optimizer=self.optimizer)
        _check_type(ScheduleConfig, schedule=self.schedule)
        if self.augmentation is not None:
            _check_type(AugmentationConfig, augmentation=self.augmentation)
        check_whole(1, checkpoint_every=self.checkpoint_every, **_given(epochs=self.epochs, max_steps=self.max_steps))
        check_whole(2, batch_size=self.batch_size)
        check_whole(0, observer_steps=self.observer_steps)
        check_whole(0, **_given(bn_statistics_steps=self.bn_statistics_steps, num_workers=self.num_workers))
        check_seed(self.seed)
        check_choice(PrecisionName, precision=self.precision)
        if self.optimizer.learning_rate is None and not self.losses.uses_embedding_loss:
            raise ConfigError("without an embedding loss the optimizer needs a learning_rate: set it")

    @classmethod
    def paper(cls) -> DistillConfig:
        """Return the settings of Ef-QuantFace, section 4.2.

        The paper: one epoch, batch size 64, learning rate 0.001, margin 0.4, scale 64, EKD without a class head
        (equation 4). The rest follows the EKD authors' code (TFace, ``recognition/tasks/ekd``): SGD with momentum 0.9
        and weight decay 5e-4, a constant learning rate, batch norms that train as usual, and thresholds that start at
        0. Quantizer scales stay at their calibrated values.

        Returns:
            The settings, with the defaults in all other fields.

        Example:
            >>> DistillConfig.paper().optimizer.name
            'sgd'
        """
        return cls(
            epochs=1,
            batch_size=64,
            losses=LossConfig(
                ekd_weight=1.0,
                ekd_surrogate="sigmoid",
                reference_ekd=True,
                embedding_loss=None,
                feature_loss_weight=0.0,
                class_head=False,
                class_head_weight=1.0,
                margin=0.4,
                scale=64.0,
            ),
            optimizer=OptimizerConfig(
                "sgd",
                learning_rate=0.001,
                scale_learning_rate=0.0,
                momentum=0.9,
                nesterov=False,
                weight_decay=5e-4,
                dampening=0.0,
            ),
            schedule=ScheduleConfig("constant", warmup_steps=0),
            bn_statistics_steps=None,
        )


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _check_type(kind: type, **fields: object) -> None:
    for name, value in fields.items():
        if not isinstance(value, kind):
            raise ConfigError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")
