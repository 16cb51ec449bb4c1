"""``sensitivity``, which measures the loss of the embedding when a single tensor is quantized.

The float network runs once. At each tensor to measure, it branches: the rest of the network runs again with that tensor
quantized to each number of bits, so that earlier layers are never computed twice.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qface.checks import check_whole
from qface.choices import SENSITIVITY_IMAGES
from qface.data.images import Images, normalize
from qface.data.sample import sample_batches
from qface.data.sources import as_image_source
from qface.errors import ConfigError, one_line
from qface.graph.layers import along_channels
from qface.graph.queries import is_quantized, is_shape_only, layer_of
from qface.kept_memory import memory_kept
from qface.mixed_precision.loss_store import Losses, loss_store
from qface.model_digest import digest_of_batches, digests_of_network
from qface.models.resolve import NetworkLike, as_network
from qface.preprocessing import example_input, preprocessing_of
from qface.progress import shows_progress, stage
from qface.quantization.cross_layer_equalization import cross_layer_equalization
from qface.quantization.fake_quantize import ImageFakeQuantize, LSQFakeQuantize, quantizers
from qface.quantization.placement import Role, role_of
from qface.quantization.prepare import quantize
from qface.quantization.quantization_config import MAX_BITS, MIN_BITS, QuantizationConfig
from qface.quantization.quantized_layers import QuantizedConv2d, QuantizedLinear, WeightedLayer
from qface.results import Result

__all__ = ["BIT_WIDTHS", "SENSITIVITY_IMAGES", "LayerSensitivity", "Sensitivity", "read_sample", "sensitivity"]

BIT_WIDTHS = tuple(range(MIN_BITS, MAX_BITS + 1))
"""All supported bits, 2 to 8."""

_READ_AT_ONCE = 64
_ROUNDED = 0.05  # steps between a weight and an integer; float32 and exact scales move it by less


@dataclass(frozen=True)
class LayerSensitivity:
    """Loss from quantizing one tensor of a convolution or linear layer, with all else in float.

    A loss is the mean over images of 1 - cosine to the float network's embedding, 0..2.

    Args:
        name: name of the layer, as in ``QuantizationConfig.overrides``.
        elements: number of elements of the weight.
        weight: loss by bits of the weight.
        activation: loss by bits of the input, which other layers may share; empty if the input is the image, which
            always has 8 bits.
    """

    name: str
    elements: int
    weight: Mapping[int, float]
    activation: Mapping[int, float]


@dataclass(frozen=True, repr=False)
class Sensitivity(Result):
    """The result of :func:`sensitivity`.

    Args:
        images: number of images.
        layers: all convolutions and linear layers, in execution order.

    Example:
        >>> result = qface.sensitivity(teacher, "faces/", num_images=8)
        >>> qface.Sensitivity.from_dict(result.to_dict()) == result
        True
    """

    images: int
    layers: tuple[LayerSensitivity, ...]

    def _key_figures(self) -> Mapping[str, object]:
        return {"images": self.images, "layers": len(self.layers), "tensors": self.tensors}

    def losses(self, tensor: str) -> list[Mapping[int, float]]:
        """Return the losses by bits of each layer's ``"weight"`` or ``"activation"``."""
        return [layer.weight if tensor == "weight" else layer.activation for layer in self.layers]

    def bit_widths(self, tensor: str) -> list[int]:
        """Return the measured bits of ``"weight"`` or ``"activation"`` in ascending order."""
        return sorted({bits for losses in self.losses(tensor) for bits in losses})

    @property
    def tensors(self) -> list[str]:
        """Kinds of tensors that were measured: ``"weight"``, ``"activation"`` or both."""
        return [tensor for tensor in ("weight", "activation") if self.bit_widths(tensor)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values with bits as strings, for JSON."""
        return {"images": self.images, "layers": [_layer_record(layer) for layer in self.layers]}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Sensitivity:
        """Restore the result of :meth:`to_dict`.

        Raises:
            ConfigError: ``record`` is not such a result.
        """
        try:
            return cls(int(record["images"]), tuple(map(_layer_of_record, record["layers"])))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"this is no sensitivity table ({one_line(error, 200)}); write one with qface sensitivity --json"
            ) from error


def _layer_record(layer: LayerSensitivity) -> dict[str, Any]:
    losses = {"weight": layer.weight, "activation": layer.activation}
    plain = {name: {str(bits): loss for bits, loss in of.items()} for name, of in losses.items()}
    return {"name": layer.name, "elements": layer.elements, **plain}


def _layer_of_record(record: Mapping[str, Any]) -> LayerSensitivity:
    losses = ({int(bits): float(loss) for bits, loss in record[name].items()} for name in ("weight", "activation"))
    return LayerSensitivity(str(record["name"]), int(record["elements"]), *losses)


@shows_progress
@memory_kept()
@torch.no_grad()
def sensitivity(
    model: NetworkLike,
    images: Images,
    identities: str | Path | None = None,
    weight_bits: Sequence[int] = BIT_WIDTHS,
    activation_bits: Sequence[int] = BIT_WIDTHS,
    num_images: int = SENSITIVITY_IMAGES,
    batch_size: int = 16,
    run_dir: str | Path | None = None,
    progress: bool = False,
) -> Sensitivity:
    """Measure the loss from quantizing one tensor at a time, for each convolution and linear layer.

    A calibrated student keeps its own scale at its own bits. Otherwise the student's observer chooses the scale, from
    the weight itself or from the activations of ``images``. Each layer, tensor and number of bits takes about half a
    forward pass. Does not change ``model``.

    Args:
        model: a float network or a student: a module, the path of its file, or ``package.module:factory``. Of a student
            that :func:`qface.calibrate` rounded with GPTQ, only activations can be measured.
        images: calibration set: a folder of crops, a tensor [N, 3, H, W], or a loader.
        identities: identities to use of a folder: ``"first-half"``, ``"second-half"`` or a file of names; None for all.
        weight_bits: bits of weights to measure, 2 to 8 (default all); empty skips weights.
        activation_bits: bits of layer inputs to measure, 2 to 8 (default all); empty skips activations.
        num_images: number of images, evenly spaced in a folder or tensor, the first ones of a loader (default 32).
        batch_size: batch size (default 16).
        run_dir: folder for the losses measured so far; the same call continues there after an interruption. None
            (default) stores nothing.
        progress: True to show the stages on stderr.

    Returns:
        The losses of each layer.

    Raises:
        CheckpointError: the file of the network cannot be read.
        ConfigError: bits are out of range, the weights are already rounded, ``run_dir`` belongs to another model, other
            images or settings, or another run is using it.
        ExportError: ``run_dir`` cannot be created or written to.
        ImagesError: the images cannot be used, or there are none.
        TraceError: torch.export cannot trace the network.
        UnsupportedLayerError: a layer has weights that cannot be quantized; the message names it.

    Example:
        >>> result = qface.sensitivity(teacher, "faces/", num_images=8)
        >>> [layer.name for layer in result.layers][-1]
        'fc'
    """
    _check_bit_widths(weight_bits, activation_bits)
    check_whole(1, batch_size=batch_size)
    model = as_network(model)
    if weight_bits and any(_is_rounded(layer) for layer in model.modules() if isinstance(layer, WeightedLayer)):
        raise ConfigError(
            "GPTQ has rounded this student's weights, so their loss cannot be measured; pass the float network that it "
            "was made from"
        )
    faces = read_sample(images, identities, num_images)
    network = _without_quantization(model)
    device = example_input(network, 1).device
    batches = [normalize(batch.to(device), preprocessing_of(model)) for batch in torch.split(faces, batch_size)]
    if not any(quantizer.calibrated for quantizer in quantizers(network)):
        cross_layer_equalization(network, batches)  # as calibration does
    layers = [node for node in network.graph.nodes if isinstance(layer_of(node), WeightedLayer)]
    changes = [
        *_weight_changes(layers, sorted(set(weight_bits))),
        *_activation_changes(network, layers, sorted(set(activation_bits)), batches),
    ]
    store: AbstractContextManager[Losses] = nullcontext({})
    if run_dir is not None:
        bits = f"weights {sorted(set(weight_bits))}, activations {sorted(set(activation_bits))}"
        inputs = {
            **digests_of_network(model),
            "images": digest_of_batches([faces]),
            "settings": f"{bits}, batches of {batch_size}",
        }
        store = loss_store(Path(run_dir), inputs)
    with store as kept:
        losses = _mean_losses(network, batches, changes, kept)
    return Sensitivity(len(faces), tuple(_of_layer(node, losses) for node in layers))


def read_sample(images: Images, identities: str | Path | None, num_images: int) -> Tensor:
    """Read about ``num_images`` images as one tensor [N, 3, H, W], uint8 crops or normalized floats.

    Args:
        images: a folder of crops, a tensor, or a loader.
        identities: identities to use of a folder; None for all.
        num_images: number of images, evenly spaced in a folder or tensor, the first ones of a loader.

    Raises:
        ImagesError: the images cannot be used, or there are none.
    """
    return torch.cat(sample_batches(as_image_source(images, identities), num_images, _READ_AT_ONCE))


def _check_bit_widths(weight_bits: Sequence[int], activation_bits: Sequence[int]) -> None:
    for bits in weight_bits:
        QuantizationConfig(weight_bits=bits)
    for bits in activation_bits:
        QuantizationConfig(activation_bits=bits)


def _is_rounded(layer: QuantizedConv2d | QuantizedLinear) -> bool:
    """True if GPTQ has replaced the weights by multiples of their scales."""
    quantizer = layer.weight_fake_quant
    if not quantizer.calibrated:
        return False
    weight = layer.weight.detach()
    steps = weight / along_channels(quantizer.qparams().scale, weight, 0)
    return bool(((steps - steps.round()).abs() < _ROUNDED).all())


def _without_quantization(model: nn.Module) -> fx.GraphModule:
    """Return a student of ``model``, or a copy of a student, with all quantizers and observers off."""
    student = copy.deepcopy(model) if is_quantized(model) else quantize(model)
    assert isinstance(student, fx.GraphModule)
    for layer in student.modules():
        if isinstance(layer, (ImageFakeQuantize, LSQFakeQuantize)):
            layer.disable_fake_quant()
            layer.disable_observer()
    return student.eval()


# ---- single quantized tensors


@dataclass(frozen=True)
class _Change:
    """One tensor quantized to ``bits`` bits; ``compute`` maps the input of ``node`` to its output."""

    node: fx.Node
    bits: int
    compute: Callable[[Tensor], Tensor]


_MeanLosses = Mapping[tuple[fx.Node, int], float]
"""Mean loss by node and bits."""


def _weight_changes(layers: Sequence[fx.Node], bit_widths: Sequence[int]) -> list[_Change]:
    return [_weight_change(node, bits) for node in layers for bits in bit_widths]


def _weight_change(node: fx.Node, bits: int) -> _Change:
    layer = cast(Any, layer_of(node))
    quantizer = _with_bits(layer.weight_fake_quant, bits)
    if not quantizer.calibrated:
        quantizer.observe(layer.weight)
    return _Change(node, bits, lambda x: layer.multiply(x, quantizer(layer.weight), layer.bias))


def _activation_changes(
    network: fx.GraphModule, layers: Sequence[fx.Node], bit_widths: Sequence[int], batches: Sequence[Tensor]
) -> list[_Change]:
    of_source = {
        source: [_with_bits(cast(LSQFakeQuantize, layer_of(source)), bits) for bits in bit_widths]
        for source in dict.fromkeys(map(_source, layers))
        if _has_configured_bits(source)
    }
    _calibrate(network, of_source, batches)
    return [_Change(source, quantizer.bits, quantizer) for source, of in of_source.items() for quantizer in of]


def _source(node: fx.Node) -> fx.Node:
    """Return the quantizer node of the input of ``node``, looking through shape-only nodes."""
    source = cast(fx.Node, node.args[0])
    return _source(source) if is_shape_only(source) else source


def _has_configured_bits(source: fx.Node) -> bool:
    """Return True if ``source`` quantizes to the config's activation bits; the image has its own."""
    quantizes = isinstance(layer_of(source), LSQFakeQuantize)
    return quantizes and role_of(cast(fx.Node, source.args[0])) is Role.MATMUL_INPUT


def _with_bits(own: LSQFakeQuantize, bits: int) -> LSQFakeQuantize:
    """Return a copy of ``own`` if it has these bits and is calibrated, else a new uncalibrated quantizer."""
    if own.bits != bits or not own.calibrated:
        return LSQFakeQuantize(bits, own.num_channels, own.observer, own.percentile).to(own.scale.device).eval()
    same = copy.deepcopy(own)
    same.enable_fake_quant()
    return same


def _calibrate(
    network: fx.GraphModule, quantizers: Mapping[fx.Node, Sequence[LSQFakeQuantize]], batches: Sequence[Tensor]
) -> None:
    """Calibrate the uncalibrated quantizers with the float activations of ``network``."""
    missing = {node: [quantizer for quantizer in of if not quantizer.calibrated] for node, of in quantizers.items()}
    if not any(missing.values()):
        return
    for batch in batches:
        _Observing(network, missing).run(batch)
    for of in missing.values():
        for quantizer in of:
            quantizer.set_range()
            quantizer.activation_post_process.reset()


class _Observing(fx.Interpreter):
    """Interpreter that passes each node's output to its observers."""

    def __init__(self, network: fx.GraphModule, observing: Mapping[fx.Node, Sequence[LSQFakeQuantize]]) -> None:
        super().__init__(network)
        self._observing = observing

    def run_node(self, n: fx.Node) -> Any:
        """Run node ``n`` and observe its output."""
        value = super().run_node(n)
        for quantizer in self._observing.get(n, ()):
            quantizer.activation_post_process(value)
        return value


# ---- losses


def _mean_losses(
    network: fx.GraphModule, batches: Sequence[Tensor], changes: Sequence[_Change], kept: Losses
) -> _MeanLosses:
    """Return the mean loss of each change; ``kept`` holds known sums per batch, and receives the others."""
    _measure(network, batches, changes, kept)
    images = sum(map(len, batches))
    return {
        (change.node, change.bits): sum(kept[number, change.node.name, change.bits] for number in range(len(batches)))
        / images
        for change in changes
    }


def _measure(network: fx.GraphModule, batches: Sequence[Tensor], changes: Sequence[_Change], kept: Losses) -> None:
    """Measure the missing sums over a batch of 1 - cosine, and add them to ``kept``."""
    missing = [
        [change for change in changes if (number, change.node.name, change.bits) not in kept]
        for number in range(len(batches))
    ]
    total = len(batches) * len(changes)
    with stage("sensitivity", total, total - sum(map(len, missing))) as advance:
        for number, (batch, left) in enumerate(zip(batches, missing, strict=True)):
            if not left:
                continue
            embeddings = network(batch).double()
            for change, changed in _forks(network, batch, left):
                cosines = F.cosine_similarity(embeddings, changed.double())
                kept[number, change.node.name, change.bits] = float((1 - cosines).clamp(min=0).sum())
                advance()


def _forks(network: fx.GraphModule, images: Tensor, changes: Sequence[_Change]) -> Iterator[tuple[_Change, Tensor]]:
    """Run ``network`` once, branch at each change, and yield the embeddings of each branch."""
    at = defaultdict(list)
    for change in changes:
        at[change.node].append(change)
    trunk, branch = fx.Interpreter(network), fx.Interpreter(network)
    values = trunk.env
    for node in network.graph.nodes:
        for change in at[node]:
            changed = change.compute(values[node.args[0]])
            yield change, branch.run(initial_env={**values, node: changed})
        values[node] = images if node.op == "placeholder" else trunk.run_node(node)
        for unused in trunk.user_to_last_uses.get(node, ()):
            values[unused] = None  # frees memory; a removed entry would be computed again in a branch


def _of_layer(node: fx.Node, losses: _MeanLosses) -> LayerSensitivity:
    source = _source(node)
    return LayerSensitivity(
        name=str(node.target),
        elements=cast(Any, layer_of(node)).weight.numel(),
        weight={bits: loss for (changed, bits), loss in losses.items() if changed is node},
        activation={bits: loss for (changed, bits), loss in losses.items() if changed is source},
    )
