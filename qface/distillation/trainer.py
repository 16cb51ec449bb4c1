"""The verb ``distill`` and its training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qface.data.images import Images, ImageSource, IndexedImages, normalize
from qface.data.sources import as_image_source, source_record
from qface.distillation.batch_sampler import seeded_rng
from qface.distillation.batches import Batch, Batches, batches_of, with_length
from qface.distillation.checkpoint import TrainingRun, check_run_folder, training_run
from qface.distillation.distill_config import DistillConfig
from qface.distillation.feature_taps import FeaturePairs, FeatureTaps
from qface.distillation.objective import Objective
from qface.distillation.optim import initial_learning_rate, optimizer_for, optimizer_step, schedule_for
from qface.distillation.pseudo_labels import with_pseudo_labels
from qface.distillation.student_mode import has_batch_norm, mode_changes, on_device, set_observers, set_student_mode
from qface.errors import ConfigError, TrainingError, UnsupportedLayerError
from qface.kept_memory import memory_kept
from qface.memory_format import fastest_memory_format
from qface.models.resolve import NetworkLike, as_network
from qface.network_output import embedding_of
from qface.parallel import Parallel, device_for, processes_for
from qface.preprocessing import dtype_of, preprocessing_of
from qface.progress import shows_progress, stage
from qface.provenance import record_step
from qface.signals import signals_noted

__all__ = ["check_run", "distill"]

_LOGGER = logging.getLogger("qface")

_EXAMPLES = 64
"""Number of images on which student and teacher are compared before training."""


def check_run(config: DistillConfig, run_dir: str | Path | None = None, resume: bool = False) -> None:
    """Check, before expensive work, that :func:`distill` can run with these arguments.

    Args:
        config: settings of the distillation.
        run_dir: run folder, or None for none.
        resume: resume from the checkpoint in ``run_dir``.

    Raises:
        ConfigError: the device does not exist, the run folder holds a run and ``resume`` is False, or ``resume`` is
            True without a run folder.
        ExportError: the run folder cannot be created or written to.
    """
    if resume and run_dir is None:
        raise ConfigError("resume=True needs a run_dir: pass the folder of the run")
    device_for(config.device)
    if run_dir is not None:
        check_run_folder(Path(run_dir), resume)


@shows_progress
def distill(
    student: NetworkLike,
    teacher: NetworkLike,
    images: Images,
    config: DistillConfig | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    identities: str | Path | None = None,
    progress: bool = False,
) -> nn.Module:
    """Train ``student`` to embed faces like ``teacher``.

    Changes ``student`` in place and returns it; of a path it loads, changes and returns the network, and the file stays
    as it is. Does not change ``teacher``.

    Student and teacher may be any networks that map images to embeddings [N, D]: float, quantized or pruned. Both keep
    their device and training mode, even after an error; the observers of the student are off afterwards.

    Under ``torchrun`` (extra ``qface[distributed]``) the processes share each batch and end with the student that a
    single process trains. All of them must see the run folder, which the first process writes.

    A resumed run ends with the weights of an uninterrupted one: bit for bit on a CPU with the same number of threads,
    and for a loader only if its order repeats. A finished run returns its weights at once, unless ``config`` has more
    epochs or steps, for which it continues with the learning rates of the longer schedule.

    Args:
        student: the network to train: a module, the path of its file, or ``package.module:factory``.
        teacher: the network to learn from, given like ``student``.
        images: a folder, a tensor, a loader or an image source (:func:`qface.data.sources.as_image_source`). uint8
            images are normalized for each network with its preprocessing; float images must be normalized already.
            Batches of one image from a loader are skipped. EKD uses labels where they are known. Without
            labels it uses those that the teacher finds (``config.losses.pseudo_pairs``), or, for a loader, negative
            pairs only.
        config: settings; None means the defaults.
        run_dir: folder for ``checkpoint.pt`` and ``log.jsonl`` (step, loss terms, learning rate, gradient norm); None
            writes neither. It belongs to one run and is locked against others.
        resume: resume from the checkpoint in ``run_dir``, or start if there is none. Teacher and images must be those
            of the run (all names and bytes are compared; for a loader, only its length), and the student must be
            the one before or after training.
        identities: which identities of a folder to use: ``"first-half"``, ``"second-half"``, or a file of names.
        progress: show progress on stderr.

    Returns:
        The trained student.

    Raises:
        CheckpointError: the checkpoint or the file of a network cannot be read.
        ConfigError: the settings contradict each other, the images or the checkpoint, or another run uses the folder.
        DependencyError: there are several processes, but Lightning Fabric is not installed.
        ExportError: the run folder cannot be created or written to.
        ImagesError: the images cannot be used.
        TrainingError: the networks do not fit each other, or embeddings or the loss are not finite.

    Example:
        >>> config = qface.DistillConfig(max_steps=2, device="cpu")
        >>> student = qface.distill(student, teacher, "faces/", config, run_dir="run")
    """
    student, teacher = as_network(student), as_network(teacher)
    if student is teacher:
        raise TrainingError("student and teacher are one network: pass copy.deepcopy(network) as the teacher")
    config = config or DistillConfig()
    check_run(config, run_dir, resume)
    parallel = processes_for(config.device)
    source = as_image_source(images, identities)
    config = with_length(config, source)
    writes = parallel.rank == 0
    with ExitStack() as stack:
        folder: TrainingRun | None = None
        if run_dir is not None:
            folder = stack.enter_context(training_run(Path(run_dir), config, student, teacher, source, writes))
        state = None if folder is None else folder.load()
        stack.enter_context(memory_kept())
        stack.enter_context(on_device(parallel.device, student, teacher))
        stack.enter_context(_released(student))
        finished = state is not None and state["step"] == state["total"]
        if folder is not None and state is not None and finished and not folder.is_longer:
            with folder.restoring():
                student.load_state_dict(state["student"])
        else:
            batches = _batches(source, teacher, config, parallel)
            _check_settings(config, batches, student, parallel)
            _Trainer(student, teacher, batches, config, parallel).run(folder, state)
        parallel.wait()
    used = {"images": len(source)} if isinstance(source, IndexedImages) else {}
    return record_step(student, "distill", asdict(config) | used | source_record(source))


@contextmanager
def _released(student: nn.Module) -> Iterator[None]:
    """Clear the gradients of ``student`` and switch off its observers at the end of the block."""
    try:
        yield
    finally:
        student.zero_grad(set_to_none=True)
        set_observers(student, False)


def _batches(source: ImageSource, teacher: nn.Module, config: DistillConfig, parallel: Parallel) -> Batches:
    """Return the training batches of ``source``, with pseudo labels if EKD needs them."""
    losses = config.losses
    if losses.pseudo_pairs and losses.uses_ekd and not losses.class_head:
        source = with_pseudo_labels(source, teacher)
    return batches_of(source, config, parallel)


def _total_steps(config: DistillConfig, batches: Batches) -> int:
    if batches.steps_per_epoch is None:
        if config.max_steps is None:
            raise ConfigError("the number of images is unknown: set max_steps")
        return config.max_steps
    assert config.epochs is not None  # see with_length
    steps = config.epochs * batches.steps_per_epoch
    return steps if config.max_steps is None else min(steps, config.max_steps)


def _check_settings(config: DistillConfig, batches: Batches, student: nn.Module, parallel: Parallel) -> None:
    if config.losses.uses_ekd and config.losses.reference_ekd and batches.lacks_positives:
        raise ConfigError(
            "reference_ekd needs two images of one identity in every batch, but no identity with two images is known: "
            "set reference_ekd=False, or pass images with identities"
        )
    moving_statistics = config.bn_statistics_steps != 0 and has_batch_norm(student)
    if parallel.world_size > 1 and (moving_statistics or config.observer_steps > 0):
        raise ConfigError(
            "several processes would learn different statistics: set bn_statistics_steps=0 and observer_steps=0"
        )


class _Trainer:
    """Student, teacher, losses and optimizer at one step of a run."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        batches: Batches,
        config: DistillConfig,
        parallel: Parallel,
    ) -> None:
        self.student = student
        make_taps = FeatureTaps.shared if config.losses.feature_loss_weight > 0 else FeatureTaps
        self.taps = make_taps(student, teacher)
        self.teacher = self.taps.teacher.eval()
        self.batches = batches
        self.config = config
        self.parallel = parallel
        self.step = 0
        self.total = _total_steps(config, batches)
        self.student.eval()
        set_observers(self.student, False)
        examples = batches.examples(_EXAMPLES)
        self.memory_format = fastest_memory_format(
            examples[:1].to(parallel.device), partial(self._embed, student), partial(self._embed, self.teacher)
        )
        if config.augmentation is not None and examples.dtype != torch.uint8:
            _LOGGER.warning("float images are not augmented: pass uint8 images or a folder")
        found, wanted, features = self._compare(examples)
        objective = Objective(
            config.losses, found.shape[1], wanted.shape[1], batches.num_identities, features, config.seed
        )
        self.objective = objective.to(parallel.device, found.dtype)
        self._log_missing_terms(features)
        learning_rate = initial_learning_rate(config.optimizer, found, wanted)
        self.optimizer = optimizer_for(config.optimizer, learning_rate, student, self.objective)
        self.schedule = schedule_for(config.schedule, self.optimizer, self.step, self.total)
        self._student_of_all = parallel.wrap(student)

    def _log_missing_terms(self, features: FeaturePairs) -> None:
        """Warn about configured loss terms that have no effect."""
        if self.config.losses.feature_loss_weight > 0 and not features:
            _LOGGER.warning("the feature loss is left out: student and teacher have no residual sums in common")
        if self.config.losses.uses_ekd and self.batches.lacks_positives:
            _LOGGER.warning("EKD sees negative pairs only: no two images are known to show one identity")

    @torch.no_grad()
    def _compare(self, examples: Tensor) -> tuple[Tensor, Tensor, FeaturePairs]:
        """Return the embeddings of student and teacher and their residual sums for ``examples``."""
        with self.taps.attached():
            found, wanted = (self._embed(model, examples) for model in (self.student, self.teacher))
            features = self.taps.take(len(examples))
        for name, embeddings in (("student", found), ("teacher", wanted)):
            if not embeddings.isfinite().all():
                raise TrainingError(f"embeddings of the {name} are not finite: check its weights and scales")
        return found, wanted, features

    def _embed(self, model: nn.Module, images: Tensor, wrapped: nn.Module | None = None) -> Tensor:
        """Return embeddings [N, D] of ``images``, normalized for ``model``, by calling ``wrapped`` or it."""
        images = normalize(images.to(self.parallel.device), preprocessing_of(model)).to(dtype_of(model))
        with torch.autocast(self.parallel.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            returned = (wrapped or model)(images)
        try:
            embeddings = embedding_of(returned)
        except UnsupportedLayerError as error:
            raise TrainingError(f"{type(model).__name__} does not map images to embeddings: {error}") from error
        return embeddings.float() if embeddings.dtype in (torch.bfloat16, torch.float16) else embeddings

    def run(self, folder: TrainingRun | None, state: dict[str, Any] | None) -> None:
        """Train from the first step, or the step of ``state``, to the last, and update ``folder``.

        In a command that handles signals, the first signal takes effect after the current step, whose state is saved.
        """
        if folder is not None:
            if state is not None:
                with folder.restoring():
                    self._restore(state)
                _LOGGER.warning("resuming at step %d of %d", self.step, self.total)
            folder.begin_log(self.step)
        changes = mode_changes(self.config) | {self.step}
        alone = folder is not None and self.parallel.world_size == 1  # others would wait for this process
        noting: AbstractContextManager[list[int]] = signals_noted() if alone else nullcontext([])
        with self.taps.attached(), stage("distill", self.total, self.step) as advance, noting as signals:
            steps = range(self.step, self.total)
            for step, batch in zip(steps, self.batches.stream(steps), strict=True):
                if step in changes:
                    set_student_mode(self.student, self.config, step)
                record = self._train_on(batch)
                self.step = step + 1
                advance(f"loss {record['loss']:.4f}")
                if folder is not None and self._write(folder, record, signals):
                    break

    def _train_on(self, batch: Batch) -> dict[str, float]:
        with seeded_rng(self.config.seed, self.step, self.parallel.device):
            terms = self._terms(batch)
        loss = torch.stack(list(terms.values())).sum()
        record = {
            "step": self.step,
            **{name: term.item() for name, term in terms.items()},
            "loss": loss.item(),
        }
        self._require_finite("loss", record["loss"])
        self.student.zero_grad(set_to_none=True)
        self.objective.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        record["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        done = 1 - self._share_of_steps_left
        record["gradient_norm"] = optimizer_step(self.optimizer, self.student, self.config.optimizer, done)
        self._require_finite("gradient", record["gradient_norm"])
        self.schedule.step()
        return record

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        images = batch.images.contiguous(memory_format=self.memory_format)
        with torch.no_grad():
            teacher = self.parallel.gather(self._embed(self.teacher, images))
        student = self.parallel.gather(self._embed(self.student, images, wrapped=self._student_of_all))
        teacher = teacher.to(student.dtype)
        labels = None if batch.labels is None else batch.labels.to(student.device)
        terms: dict[str, Tensor] = self.objective(student, teacher, labels)
        if features := self.taps.take(len(images)):
            loss = self.parallel.gather(self.objective.weighted_feature_loss(features)).mean()
            terms["feature"] = self._share_of_steps_left**2 * loss
        return terms

    @property
    def _share_of_steps_left(self) -> float:
        return 1 - self.step / self.total

    def _require_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            cure = f"choose a learning_rate below {self.optimizer.param_groups[0]['initial_lr']:g}"
            if self.config.losses.reference_ekd:
                cure += ", or set reference_ekd=False where batches may lack positive pairs"
            raise TrainingError(f"the {name} is {value} at step {self.step}: {cure}")

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule = schedule_for(self.config.schedule, self.optimizer, self.step, self.total)

    def _write(self, folder: TrainingRun, record: dict[str, float], signals: list[int]) -> bool:
        """Log the step, save a checkpoint if it is due or a signal came, and return True in the latter case."""
        folder.log(record)
        stops = bool(signals)
        # The state dict lacks what observers have seen, so a run cannot be resumed between their steps.
        observing = self.step < self.config.observer_steps
        is_due = stops or self.step % self.config.checkpoint_every == 0
        if (is_due and not observing) or self.step == self.total:
            folder.save(self._state())
        return stops

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "total": self.total,
            "student": self.student.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
