"""The verb ``distill``, and the loop behind it."""

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
from qface.distillation.batches import Batch, Batches, batches_of
from qface.distillation.checkpoint import RunFolder, check_run_folder, run_folder
from qface.distillation.distill_config import DistillConfig
from qface.distillation.feature_taps import FeaturePairs, FeatureTaps
from qface.distillation.memory import memory_kept
from qface.distillation.objective import Objective
from qface.distillation.optim import learning_rate_of, optimizer_for, optimizer_step, schedule_factor
from qface.distillation.pseudo_labels import with_pseudo_labels
from qface.distillation.student_mode import has_batch_norm, mode_changes, on_device, set_observers, set_student_mode
from qface.errors import ConfigError, TrainingError, UnsupportedLayerError
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
"""Images on which both networks are compared before training."""


def check_run(config: DistillConfig, run_dir: str | Path | None = None, resume: bool = False) -> None:
    """Make sure, before long work, that :func:`distill` can train where these arguments say.

    Raises:
        ConfigError: there is no such device; the run folder holds a run that is not to be resumed, or none is given to
            resume from.
        ExportError: the run folder cannot be made or written to.
    """
    if resume and run_dir is None:
        raise ConfigError("resume=True needs the run_dir to go on from")
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
    """Train ``student`` to embed faces as ``teacher`` does.

    Changes ``student`` in place and returns it; of a path it loads, changes and returns the network, and the file stays
    as it is. Does not change ``teacher``.

    Any two networks that map images to embeddings [N, D] will do: quantized ones, pruned ones, float ones,
    and, where EKD is the only loss, ones with embeddings of different length. Both come back on the device
    and in the mode they were given in, even after an error; the observers of the student's quantizers are off
    afterwards.

    Under ``torchrun`` all processes share every batch and end with the same student, as one process alone
    would (extra ``qface[distributed]``); a run folder must then be visible to all of them, and the first one
    writes it.

    Args:
        student: the network that learns: a module, the path of its file, or ``package.module:factory``.
        teacher: the network to learn from, likewise.
        images: a folder, a tensor, a loader or an image source (:func:`qface.data.sources.as_image_source`).
            Bytes are normalized for each network by the preprocessing it carries, floats reach both as they
            are. Batches of one image that a loader yields are passed over. EKD uses identities where they are
            known. Where they are not, it takes the teacher's word for them (``config.pseudo_pairs``), or, of a
            loader, sees negative pairs only.
        config: the settings; None takes the defaults.
        run_dir: folder for ``checkpoint.pt`` and ``log.jsonl`` (step, loss terms, learning rate, gradient
            norm); None writes nothing. It belongs to one run, and another process is kept out of it.
        resume: go on from the checkpoint in ``run_dir``, or start there where it holds none, with the student that
            the run was begun with or the one that it trained, the same teacher and images. Of images all names and
            bytes are compared, of a loader only how many it has. A run that was
            killed ends with the weights it would have had, bit for bit on a CPU with as many threads, and of a loader
            only if its order repeats; a finished one returns at once. With more epochs than it was begun with it goes
            on, from there at the learning rates of the longer schedule.
        identities: for a folder, which identities to keep.
        progress: show the stages on stderr.

    Returns:
        ``student``, trained.

    Raises:
        CheckpointError: the checkpoint is damaged, or the file of a network cannot be read.
        ConfigError: settings contradict each other, the images, or the checkpoint, or another run is in the folder.
        DependencyError: several processes without Lightning Fabric.
        ExportError: the run folder cannot be made or written to.
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
    writes = parallel.rank == 0
    with ExitStack() as stack:
        folder: RunFolder | None = None
        if run_dir is not None:
            folder = stack.enter_context(run_folder(Path(run_dir), config, student, teacher, source, writes))
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
    """Leave ``student`` without gradients and with its observers off."""
    try:
        yield
    finally:
        student.zero_grad(set_to_none=True)
        set_observers(student, False)


def _batches(source: ImageSource, teacher: nn.Module, config: DistillConfig, parallel: Parallel) -> Batches:
    """The training batches of ``source``, with the teacher's word for who is who where EKD has no other."""
    if config.pseudo_pairs and config.uses_ekd and not config.class_head:
        source = with_pseudo_labels(source, teacher)
    return batches_of(source, config, parallel)


def _total_steps(config: DistillConfig, batches: Batches) -> int:
    if batches.steps_per_epoch is None:
        if config.max_steps is None:
            raise ConfigError("these images have no known number: set max_steps to say how long to train")
        return config.max_steps
    steps = config.epochs * batches.steps_per_epoch
    return steps if config.max_steps is None else min(steps, config.max_steps)


def _check_settings(config: DistillConfig, batches: Batches, student: nn.Module, parallel: Parallel) -> None:
    if config.uses_ekd and config.reference_ekd and batches.lacks_positives:
        raise ConfigError(
            "reference_ekd needs two images of one person in every batch, but none with two images is known: "
            "set reference_ekd=False, or give images with identities"
        )
    moving_statistics = config.bn_statistics_steps != 0 and has_batch_norm(student)
    if parallel.world_size > 1 and (moving_statistics or config.observer_steps > 0):
        raise ConfigError(
            "several processes would learn different statistics: set bn_statistics_steps=0 and observer_steps=0"
        )


class _Trainer:
    """Student, teacher, losses and optimizer at some step of a run."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        batches: Batches,
        config: DistillConfig,
        parallel: Parallel,
    ) -> None:
        self.student = student
        make_taps = FeatureTaps.shared if config.feature_loss_weight > 0 else FeatureTaps
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
            _LOGGER.warning("images that are normalized already are not augmented: pass bytes (uint8), or a folder")
        found, wanted, features = self._compare(examples)
        objective = Objective(config, found.shape[1], wanted.shape[1], batches.num_identities, features)
        self.objective = objective.to(parallel.device, found.dtype)
        self._log_missing_terms(features)
        self.learning_rate = learning_rate_of(config, found, wanted)
        self.optimizer = optimizer_for(config, self.learning_rate, student, self.objective)
        self._student_of_all = parallel.wrap(student)

    def _log_missing_terms(self, features: FeaturePairs) -> None:
        """Name the terms of the loss that cannot do what the settings ask for."""
        if self.config.feature_loss_weight > 0 and not features:
            _LOGGER.warning("the feature loss drops out: student and teacher share no residual sums to compare")
        if self.config.uses_ekd and self.batches.lacks_positives:
            _LOGGER.warning("EKD sees pairs of two people only: no two images are known to show one person")

    @torch.no_grad()
    def _compare(self, examples: Tensor) -> tuple[Tensor, Tensor, FeaturePairs]:
        """Run both networks on some images: the student's embeddings, the teacher's, and residual sums."""
        with self.taps.attached():
            found, wanted = (self._embed(model, examples) for model in (self.student, self.teacher))
            features = self.taps.take(len(examples))
        for name, embeddings in (("student", found), ("teacher", wanted)):
            if not embeddings.isfinite().all():
                raise TrainingError(f"embeddings of the {name} are not finite: check its weights and scales")
        return found, wanted, features

    def _embed(self, model: nn.Module, images: Tensor, through: nn.Module | None = None) -> Tensor:
        """Embeddings [n, D] of ``images``, normalized for ``model``, sent ``through`` what stands for it."""
        images = normalize(images.to(self.parallel.device), preprocessing_of(model)).to(dtype_of(model))
        with torch.autocast(self.parallel.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            returned = (through or model)(images)
        try:
            embeddings = embedding_of(returned)
        except UnsupportedLayerError as error:
            raise TrainingError(f"{type(model).__name__} does not map images to embeddings: {error}") from error
        return embeddings.float() if embeddings.dtype in (torch.bfloat16, torch.float16) else embeddings

    def run(self, folder: RunFolder | None, state: dict[str, Any] | None) -> None:
        """Train from the first step, or the one of ``state``, to the last, and keep ``folder`` up to date.

        Where a command hears signals, the first one is put off to the end of the step, whose state is then saved.
        """
        if folder is not None:
            if state is not None:
                with folder.restoring():
                    self._go_on_from(state)
                _LOGGER.warning("resuming at step %d of %d", self.step, self.total)
            folder.begin_log(self.step)
        changes = mode_changes(self.config) | {self.step}
        alone = folder is not None and self.parallel.world_size == 1  # others would wait for this process
        noting: AbstractContextManager[list[int]] = signals_noted() if alone else nullcontext([])
        with self.taps.attached(), stage("distill", self.total, self.step) as advance, noting as signals:
            for step, batch in zip(range(self.step, self.total), self.batches.stream(self.step), strict=False):
                if step in changes:
                    set_student_mode(self.student, self.config, step)
                record = self._train_on(batch)
                self.step = step + 1
                advance(f"loss {record['loss']:.4f}")
                if folder is not None and self._written(folder, record, signals):
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
        factor = schedule_factor(self.config, self.step, self.total)
        norm = optimizer_step(self.optimizer, factor, self.config.max_gradient_norm)
        self._require_finite("gradient", norm)
        return record | {"learning_rate": self.learning_rate * factor, "gradient_norm": norm}

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        images = batch.images.contiguous(memory_format=self.memory_format)
        with torch.no_grad():
            teacher = self.parallel.gather(self._embed(self.teacher, images))
        student = self.parallel.gather(self._embed(self.student, images, through=self._student_of_all))
        teacher = teacher.to(student.dtype)
        labels = None if batch.labels is None else batch.labels.to(student.device)
        terms: dict[str, Tensor] = self.objective(student, teacher, labels)
        if features := self.taps.take(len(images)):
            terms["feature"] = self.parallel.gather(self.objective.weighted_feature_loss(features)).mean()
        return terms

    def _require_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            cure = f"choose a learning_rate below {self.learning_rate:g}"
            if self.config.reference_ekd:
                cure += ", or set reference_ekd=False where batches may lack positive pairs"
            raise TrainingError(f"the {name} is {value} at step {self.step}: {cure}")

    def _go_on_from(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.learning_rate = state["learning_rate"]

    def _written(self, folder: RunFolder, record: dict[str, float], signals: list[int]) -> bool:
        """Write the step to ``folder``; True if a signal came before its checkpoint was due, and has made it so."""
        folder.log(record)
        stops = bool(signals)
        # What observers have seen is no part of a network's state, so no run could go on from between their steps.
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
            "learning_rate": self.learning_rate,
        }
