"""Calibration as a sequence of short steps, which can stop after any of them and continue in its run folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx

from qface.checkpoint_file import read_checkpoint, restoring, write_checkpoint
from qface.data.images import normalize
from qface.errors import QFaceError
from qface.graph.queries import layer_of
from qface.memory_format import fastest_memory_format
from qface.model_digest import digest_of_batches, digests_of_network
from qface.network_output import embedding_of
from qface.preprocessing import preprocessing_of
from qface.progress import stage
from qface.quantization.calibration_config import CalibrationConfig
from qface.quantization.cross_layer_equalization import cross_layer_equalization
from qface.quantization.fake_quantize import LSQFakeQuantize, quantizers
from qface.quantization.gptq import weight_of
from qface.quantization.output_errors import OutputErrors, weighted_nodes
from qface.quantization.quantized_layers import WeightedLayer
from qface.run_folder import run_folder
from qface.signals import signals_noted

__all__ = ["CalibrationSteps", "calibration_checkpoint"]

_LOGGER = logging.getLogger("qface")

_CHECKPOINT = "calibration.pt"
_EQUALIZATION_IMAGES = 128

_Stage = tuple[str, Sequence[Any], Callable[[Any], None]]
"""Name, items, and the function that makes a step of each item."""


class CalibrationSteps:
    """A calibration between two of its steps.

    Args:
        student: the result of :func:`qface.quantize`, in eval mode, observers off.
        parts: the calibration set in batches of images that are not normalized yet.
        config: settings; its three methods apply to a new student.
        is_new: False for a student that was calibrated before, which only gets new ranges.
    """

    def __init__(self, student: fx.GraphModule, parts: list[Tensor], config: CalibrationConfig, is_new: bool) -> None:
        self._student = student
        self._parts = parts
        self._quantizers = quantizers(student)
        with _in_float(self._quantizers):
            self._prepare = _preparer(student, parts[0], self._quantizers[0].scale.device)
        self._equalize = is_new and config.equalize
        self._gptq = is_new and config.gptq
        self._correct = is_new and config.correct_biases
        self._errors: OutputErrors | None = None
        self._stage = self._step = 0
        for quantizer in self._quantizers:
            quantizer.activation_post_process.reset()

    def run(self, checkpoint: Path | None = None) -> None:
        """Make all steps, or those that are left in ``checkpoint``.

        In a command that handles signals, the first signal takes effect after the current step, whose state is saved.

        Args:
            checkpoint: file of the state; None saves nothing.

        Raises:
            CheckpointError: the file is damaged.
            ExportError: the file cannot be written.
        """
        if checkpoint is not None and checkpoint.exists():
            state = read_checkpoint(checkpoint)
            with restoring(checkpoint):
                self._restore(state)
            _LOGGER.warning("continuing the calibration in %s", checkpoint.parent)
        elif self._equalize:
            with _in_float(self._quantizers):  # one long step, which a signal may end
                cross_layer_equalization(
                    self._student, [self._prepare(part) for part in _first(self._parts, _EQUALIZATION_IMAGES)]
                )
        noting: AbstractContextManager[list[int]] = signals_noted() if checkpoint is not None else nullcontext([])
        with noting as signals:
            for _ in self._steps():
                if signals:
                    break
            if checkpoint is not None:
                write_checkpoint(checkpoint, self._state())

    def _steps(self) -> Iterator[None]:
        stages = self._stages()
        while self._stage < len(stages):
            name, items, step = stages[self._stage]
            with stage(name, len(items), self._step) as advance:
                for item in items[self._step :]:
                    step(item)
                    self._step += 1
                    advance()
                    yield
            self._stage, self._step = self._stage + 1, 0

    def _stages(self) -> list[_Stage]:
        return [
            ("observe", self._parts, self._observe),
            ("choose ranges", self._quantizers, self._choose_range),
            ("limit biases", [self._student], _keep_biases_in_range),
            ("round weights", weighted_nodes(self._student) if self._gptq or self._correct else [], self._round),
        ]

    def _observe(self, part: Tensor) -> None:
        with _in_float(self._quantizers), _observing(self._quantizers):
            embeddings = embedding_of(self._student(self._prepare(part)))
        if not embeddings.isfinite().all():
            raise QFaceError(
                "the network's embeddings of the calibration images are NaN or infinite: check its weights and "
                "preprocessing"
            )

    def _choose_range(self, quantizer: LSQFakeQuantize) -> None:
        quantizer.set_range()
        quantizer.activation_post_process.reset()

    def _round(self, node: fx.Node) -> None:
        """Round the weights of the layer that ``node`` calls, and give its outputs their means back."""
        if self._errors is None:
            self._errors = OutputErrors(self._student, self._prepared())
        layer = cast(Any, layer_of(node))
        statistics, before = self._errors.observe(node), weight_of(layer)
        if self._gptq:
            layer.weight.copy_(statistics.round(layer, before).view_as(layer.weight))
        if self._correct and layer.bias is not None:
            rounded = layer.weight_fake_quant(layer.weight).cpu().double().reshape_as(before)
            layer.bias.add_(statistics.bias_shift(before, rounded).to(layer.bias))

    def _prepared(self) -> list[Tensor]:
        return [self._prepare(part) for part in self._parts]

    def _state(self) -> dict[str, Any]:
        errors = self._errors
        return {
            "stage": self._stage,
            "step": self._step,
            "student": self._student.state_dict(),
            "observers": [quantizer.activation_post_process.statistics() for quantizer in self._quantizers],
            "original": errors and errors.original.state_dict(),
            "generator": errors and errors.generator.get_state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        device = self._quantizers[0].scale.device
        self._stage, self._step = state["stage"], state["step"]
        if state["original"] is not None:
            self._student.load_state_dict(state["original"])
            self._errors = OutputErrors(self._student, self._prepared())
            self._errors.generator.set_state(state["generator"])
        self._student.load_state_dict(state["student"])
        for quantizer, statistics in zip(self._quantizers, state["observers"], strict=True):
            quantizer.activation_post_process.restore(statistics, device)


@contextmanager
def calibration_checkpoint(
    folder: Path, student: fx.GraphModule, parts: Sequence[Tensor], config: CalibrationConfig
) -> Iterator[Path]:
    """Lock the run folder of a calibration, and yield the path of its checkpoint.

    Args:
        folder: the folder; it is created if it is missing.
        student: the student before calibration.
        parts: the calibration set in batches.
        config: settings.

    Raises:
        CheckpointError: the record of the inputs is damaged.
        ConfigError: the folder belongs to another calibration, or another run is using it.
        ExportError: the folder cannot be created or written to.
    """
    inputs = {**digests_of_network(student), "images": digest_of_batches(parts), "settings": asdict(config)}
    with run_folder(folder, inputs, _CHECKPOINT):
        yield folder / _CHECKPOINT


def _preparer(student: fx.GraphModule, images: Tensor, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function that normalizes a batch for ``student``, in its fastest memory format."""
    preprocessing = preprocessing_of(student)
    memory_format = fastest_memory_format(normalize(images[:1].to(device), preprocessing), student)
    return lambda part: normalize(part.to(device), preprocessing).contiguous(memory_format=memory_format)


def _first(parts: list[Tensor], num_images: int) -> list[Tensor]:
    """Return the first batches, with about ``num_images`` images."""
    return parts[: max(1, num_images // len(parts[0]))]


@contextmanager
def _in_float(found: list[LSQFakeQuantize]) -> Iterator[None]:
    for quantizer in found:
        quantizer.enable_fake_quant(False)
    try:
        yield
    finally:
        for quantizer in found:
            quantizer.enable_fake_quant()


@contextmanager
def _observing(found: list[LSQFakeQuantize]) -> Iterator[None]:
    for quantizer in found:
        quantizer.enable_observer()
    try:
        yield
    finally:
        for quantizer in found:
            quantizer.enable_observer(False)


def _keep_biases_in_range(student: fx.GraphModule) -> None:
    """Enlarge the scale of channels whose bias would overflow, such as channels that pruning left near zero."""
    for layer in student.modules():
        if isinstance(layer, WeightedLayer):
            scale = layer.weight_fake_quant.scale
            scale.copy_(torch.maximum(scale, layer.minimum_weight_scale()))
