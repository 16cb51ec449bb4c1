"""``sensitivity``: what the embedding loses when a single tensor of a network is quantized.

The float network runs once. At every tensor in question it forks: from there on it runs again with that tensor rounded
to each number of bits, so that what lies before is never computed twice.
"""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ao.quantization import disable_fake_quant, disable_observer

from qface.checks import check_whole
from qface.choices import SENSITIVITY_IMAGES
from qface.data.images import Images, bytes_of, normalize
from qface.data.sample import sample_batches
from qface.data.sources import as_image_source
from qface.errors import ConfigError, one_line
from qface.graph.queries import is_shape_only, layer_of
from qface.model_digest import digest_of_structure, digest_of_values
from qface.models.resolve import NetworkLike, as_network
from qface.preprocessing import example_input, preprocessing_of
from qface.progress import shows_progress, stage
from qface.provenance import provenance_of
from qface.quantization.calibrate import quantizers
from qface.quantization.cross_layer_equalization import cross_layer_equalization
from qface.quantization.fake_quantize import LSQFakeQuantize
from qface.quantization.loss_store import Losses, loss_store
from qface.quantization.placement import Role, role_of
from qface.quantization.prepare import is_quantized, quantize
from qface.quantization.quantization_config import MAX_BITS, MIN_BITS, QuantizationConfig
from qface.quantization.quantized_layers import WeightedLayer
from qface.results import Result

__all__ = ["BIT_WIDTHS", "SENSITIVITY_IMAGES", "LayerSensitivity", "Sensitivity", "read_sample", "sensitivity"]

BIT_WIDTHS = tuple(range(MIN_BITS, MAX_BITS + 1))
"""All bits there are."""

_READ_AT_ONCE = 64


@dataclass(frozen=True)
class LayerSensitivity:
    """The loss by quantizing one tensor of a convolution or linear layer, all else in float.

    Losses are means over images of 1 - cosine between the embedding and that of the float network, 0..2.

    Args:
        name: of the layer, as ``QuantizationConfig.overrides`` calls it.
        elements: numbers in its weight.
        weight: loss at each number of bits of its weight.
        activation: loss at each number of bits of the tensor that it reads, which other layers may read too; empty for
            the image, which always has 8 bits.
    """

    name: str
    elements: int
    weight: Mapping[int, float]
    activation: Mapping[int, float]


@dataclass(frozen=True, repr=False)
class Sensitivity(Result):
    """The result of :func:`sensitivity`.

    Args:
        images: images that the losses are means over.
        layers: all convolutions and linear layers, in the order in which they run.

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
        """The losses of each layer's ``"weight"`` or ``"activation"``, by bits."""
        return [layer.weight if tensor == "weight" else layer.activation for layer in self.layers]

    def bit_widths(self, tensor: str) -> list[int]:
        """Those at which any ``"weight"`` or ``"activation"`` was measured, in rising order."""
        return sorted({bits for losses in self.losses(tensor) for bits in losses})

    @property
    def tensors(self) -> list[str]:
        """``"weight"``, ``"activation"`` or both: what was measured."""
        return [tensor for tensor in ("weight", "activation") if self.bit_widths(tensor)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values with bits as strings, for JSON."""
        return {"images": self.images, "layers": [_layer_record(layer) for layer in self.layers]}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Sensitivity:
        """Read what :meth:`to_dict` returned.

        Raises:
            ConfigError: it is something else.
        """
        try:
            return cls(int(record["images"]), tuple(map(_layer_of_record, record["layers"])))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"this is no sensitivity ({one_line(error, 200)}): write it with qface sensitivity --json"
            ) from error


def _layer_record(layer: LayerSensitivity) -> dict[str, Any]:
    losses = {"weight": layer.weight, "activation": layer.activation}
    plain = {name: {str(bits): loss for bits, loss in of.items()} for name, of in losses.items()}
    return {"name": layer.name, "elements": layer.elements, **plain}


def _layer_of_record(record: Mapping[str, Any]) -> LayerSensitivity:
    losses = ({int(bits): float(loss) for bits, loss in record[name].items()} for name in ("weight", "activation"))
    return LayerSensitivity(str(record["name"]), int(record["elements"]), *losses)


@shows_progress
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
    """Measure how much the embedding changes when one tensor at a time is quantized, for each layer that multiplies.

    A student's own ranges count at its own bits. At other bits, and wherever it is not calibrated, ranges are
    chosen by the student's observers: of a weight from its values, of an activation from those that ``images`` give
    rise to. The time is that of about half a forward pass for each layer, tensor and number of bits. Does not change
    ``model``.

    Args:
        model: a float network, or what :func:`qface.quantize` returned: a module, the path of its file, or
            ``package.module:factory``. Of a student that :func:`qface.calibrate` rounded with GPTQ, only activations
            can be measured.
        images: a folder of crops, a tensor, or a loader.
        identities: of a folder, which identities: ``"first-half"``, ``"second-half"`` or a file of names.
        weight_bits: bits to try on weights, 2 to 8.
        activation_bits: bits to try on what layers read, 2 to 8; none leaves activations out.
        num_images: images to look at, spread evenly over a folder or tensor; of a loader the first ones.
        batch_size: images at a time.
        run_dir: folder to keep losses in as they are measured; a call that was stopped goes on there, with the same
            model, images and settings. None keeps nothing.
        progress: show the stages on stderr.

    Raises:
        CheckpointError: the file of the network cannot be read.
        ConfigError: bits are out of range, weights were rounded already, ``run_dir`` is of another model, other images
            or settings, or another run is in it.
        ExportError: ``run_dir`` cannot be made or written to.
        ImagesError: the images cannot be used, or there are none.
        TraceError: torch.export cannot follow the network.
        UnsupportedLayerError: a layer has weights that cannot be quantized; it is named.

    Example:
        >>> result = qface.sensitivity(teacher, "faces/", num_images=8)
        >>> [layer.name for layer in result.layers][-1]
        'fc'
    """
    _check_bit_widths(weight_bits, activation_bits)
    check_whole(1, batch_size=batch_size)
    model = as_network(model)
    if weight_bits and any(step.get("gptq") for step in provenance_of(model) if step["step"] == "calibrate"):
        raise ConfigError(
            "calibration has rounded this student's weights, so that their loss cannot be measured any more: pass the "
            "float network that it came from"
        )
    faces = read_sample(images, identities, num_images)
    network = _switched_off(model)
    device = example_input(network, 1).device
    batches = [normalize(batch.to(device), preprocessing_of(model)) for batch in torch.split(faces, batch_size)]
    if not any(quantizer.calibrated for quantizer in quantizers(network)):
        cross_layer_equalization(network, batches)  # as calibration will
    layers = [node for node in network.graph.nodes if isinstance(layer_of(node), WeightedLayer)]
    changes = [
        *_weight_changes(layers, sorted(set(weight_bits))),
        *_activation_changes(network, layers, sorted(set(activation_bits)), batches),
    ]
    store: AbstractContextManager[Losses] = nullcontext({})
    if run_dir is not None:
        bits = f"weights {sorted(set(weight_bits))}, activations {sorted(set(activation_bits))}"
        store = loss_store(Path(run_dir), _inputs(model, faces, f"{bits}, batches of {batch_size}"))
    with store as kept:
        losses = _mean_losses(network, batches, changes, kept)
    return Sensitivity(len(faces), tuple(_of_layer(node, losses) for node in layers))


def _inputs(model: nn.Module, faces: Tensor, settings: str) -> dict[str, str]:
    """Words for all that the losses depend on."""
    return {
        "layers": digest_of_structure(model),
        "weights": digest_of_values(model),
        "preprocessing": preprocessing_of(model).to_json(),
        "images": hashlib.sha256(bytes_of(faces)).hexdigest()[:16],
        "settings": settings,
    }


def read_sample(images: Images, identities: str | Path | None, num_images: int) -> Tensor:
    """About ``num_images`` of ``images`` as one tensor [N, 3, height, width], uint8 crops or normalized floats.

    Raises:
        ImagesError: the images cannot be used, or there are none.
    """
    return torch.cat(sample_batches(as_image_source(images, identities), num_images, _READ_AT_ONCE))


def _check_bit_widths(weight_bits: Sequence[int], activation_bits: Sequence[int]) -> None:
    for bits in weight_bits:
        QuantizationConfig(weight_bits=bits)
    for bits in activation_bits:
        QuantizationConfig(activation_bits=bits)


def _switched_off(model: nn.Module) -> fx.GraphModule:
    """A student of ``model``, or a copy of it where it is one, that computes in float."""
    student = copy.deepcopy(model) if is_quantized(model) else quantize(model)
    assert isinstance(student, fx.GraphModule)
    return student.eval().apply(disable_observer).apply(disable_fake_quant)


# ---- what is changed


@dataclass(frozen=True)
class _Change:
    """One tensor rounded to ``bits`` bits: ``compute`` makes of the input of ``node`` what it then gives."""

    node: fx.Node
    bits: int
    compute: Callable[[Tensor], Tensor]


_MeanLosses = Mapping[tuple[fx.Node, int], float]
"""By node and bits of a change."""


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
    """The node that rounds what ``node`` reads, in front of those that only move values."""
    source = cast(fx.Node, node.args[0])
    return _source(source) if is_shape_only(source) else source


def _has_configured_bits(source: fx.Node) -> bool:
    """True if ``source`` rounds to the bits of the config; the image has its own."""
    quantizes = isinstance(layer_of(source), LSQFakeQuantize)
    return quantizes and role_of(cast(fx.Node, source.args[0])) is Role.MATMUL_INPUT


def _with_bits(own: LSQFakeQuantize, bits: int) -> LSQFakeQuantize:
    """One that rounds as ``own`` does where it has these bits and a range, else a new one without a range."""
    if own.bits != bits or not own.calibrated:
        return LSQFakeQuantize(bits, own.num_channels, own.observer, own.percentile).to(own.scale.device).eval()
    same = copy.deepcopy(own)
    same.enable_fake_quant()
    return same


def _calibrate(
    network: fx.GraphModule, quantizers: Mapping[fx.Node, Sequence[LSQFakeQuantize]], batches: Sequence[Tensor]
) -> None:
    """Set the ranges that are missing from what ``network`` computes."""
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
    """Shows the observers of each node what it computes."""

    def __init__(self, network: fx.GraphModule, observing: Mapping[fx.Node, Sequence[LSQFakeQuantize]]) -> None:
        super().__init__(network)
        self._observing = observing

    def run_node(self, n: fx.Node) -> Any:
        """Compute the value of ``n``, and show it."""
        value = super().run_node(n)
        for quantizer in self._observing.get(n, ()):
            quantizer.activation_post_process(value)
        return value


# ---- what it costs


def _mean_losses(
    network: fx.GraphModule, batches: Sequence[Tensor], changes: Sequence[_Change], kept: Losses
) -> _MeanLosses:
    """The mean loss of each change; ``kept`` holds the sums of batches that are known, and gets all others."""
    _measure(network, batches, changes, kept)
    images = sum(map(len, batches))
    return {
        (change.node, change.bits): sum(kept[number, change.node.name, change.bits] for number in range(len(batches)))
        / images
        for change in changes
    }


def _measure(network: fx.GraphModule, batches: Sequence[Tensor], changes: Sequence[_Change], kept: Losses) -> None:
    """Add the sum over each batch of 1 - cosine to ``kept``, for each change where it is missing."""
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
    """Run ``network`` once; at each change go on to its end with the changed value, and yield the embeddings."""
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
        for read in trunk.user_to_last_uses.get(node, ()):
            values[read] = None  # not removed, so that a branch does not compute it again


def _of_layer(node: fx.Node, losses: _MeanLosses) -> LayerSensitivity:
    source = _source(node)
    return LayerSensitivity(
        name=str(node.target),
        elements=cast(Any, layer_of(node)).weight.numel(),
        weight={bits: loss for (changed, bits), loss in losses.items() if changed is node},
        activation={bits: loss for (changed, bits), loss in losses.items() if changed is source},
    )
