"""Closed-form repair of pruned layers by ridge regression to their original outputs.

Layers are repaired in execution order. For each layer with removed inputs, the weights are fitted at sampled output
positions so that its inputs in the pruned network give its outputs in the original network. The regression is on the
residual, so few images change the weights little. Later BatchNorm layers then get the inputs that their statistics
describe. No labels are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qface.kept_memory import memory_kept
from qface.models.patches import Layer, Positions, output_size, outputs_at, patches
from qface.progress import track
from qface.training_mode import preserve_training_mode

__all__ = ["Kept", "repair"]

_POSITIONS = 16_384  # maximum number of output positions per layer
_RIDGE = 1e-2  # regularization, relative to the mean squared input of the layer
_BATCH = 64


@dataclass(frozen=True)
class Kept:
    """Remaining channels of a layer, as indices in the original network.

    Args:
        inputs: input channels, over all groups.
        outputs: output channels.
    """

    inputs: Tensor
    outputs: Tensor


def repair(
    pruned: nn.Module,
    original: nn.Module,
    kept: Mapping[str, Kept],
    images: Tensor,
    seed: int = 0,
) -> None:
    """Fit the weights of ``pruned`` in place so that its layers give the outputs of ``original``.

    Args:
        pruned: the pruned network, with the layer names of ``original``.
        original: the network before pruning; both are run in eval mode.
        kept: remaining channels of each convolution and linear layer, by name, in execution order.
        images: normalized images, float [N, 3, H, W].
        seed: random seed of the sampled positions.
    """
    names = [name for name in kept if _lost_inputs(original.get_submodule(name), kept[name])]
    generator = torch.Generator().manual_seed(seed)
    with memory_kept(), preserve_training_mode(pruned), preserve_training_mode(original), torch.no_grad():
        pruned.eval()
        original.eval()
        sizes = _output_sizes(original, names, images[:1])
        names = list(sizes)
        positions = {name: Positions.drawn(len(images), *sizes[name], _POSITIONS, generator) for name in names}
        made = _outputs(original, names, positions, images)
        for name in track(names, "repair"):
            layer = cast(Layer, pruned.get_submodule(name))
            _solve(layer, _inputs(pruned, layer, positions[name], images), made[name][:, kept[name].outputs])


def _lost_inputs(layer: nn.Module, kept: Kept) -> bool:
    """True if input channels of the ungrouped ``layer`` were removed."""
    grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
    return not grouped and len(kept.inputs) < cast(Tensor, layer.weight).shape[1]


def _run(model: nn.Module, hooks: Mapping[nn.Module, Callable[[Tensor, Tensor], None]], images: Tensor) -> None:
    """Run ``model`` and call the hook of each layer with its input and output."""

    def calling(hook: Callable[[Tensor, Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, output: hook(inputs[0], output)

    handles = [layer.register_forward_hook(calling(hook)) for layer, hook in hooks.items()]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()


def _output_sizes(model: nn.Module, names: Sequence[str], image: Tensor) -> dict[str, tuple[int, int]]:
    """Return the output height and width of each layer; 1 x 1 for linear layers.

    Layers that are called more than once, and linear layers with inputs of more than two dimensions, are left out.
    """
    shapes: dict[str, list[torch.Size]] = {name: [] for name in names}

    def note(name: str) -> Callable[[Tensor, Tensor], None]:
        return lambda _, output: shapes[name].append(output.shape)

    layers = {name: cast(Layer, model.get_submodule(name)) for name in names}
    _run(model, {layer: note(name) for name, layer in layers.items()}, image)
    dimensions = {name: 2 if isinstance(layer, nn.Linear) else 4 for name, layer in layers.items()}
    once = {name: made[0] for name, made in shapes.items() if len(made) == 1 and len(made[0]) == dimensions[name]}
    return {name: output_size(layers[name], shape) for name, shape in once.items()}


def _outputs(
    model: nn.Module, names: Sequence[str], positions: Mapping[str, Positions], images: Tensor
) -> dict[str, Tensor]:
    """Return the outputs of each layer at its positions, [M, channels]."""
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    layers = {name: cast(Layer, model.get_submodule(name)) for name in names}
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]

        def note(name: str, start: int = start, count: int = len(batch)) -> Callable[[Tensor, Tensor], None]:
            at = positions[name].within(start, count)
            return lambda _, output: parts[name].append(outputs_at(layers[name], output, at))

        _run(model, {layer: note(name) for name, layer in layers.items()}, batch)
    return {name: torch.cat(of) for name, of in parts.items()}


class _StopForward(Exception):  # noqa: N818 - as StopIteration
    """Ends a forward pass after the last layer that is needed."""


def _inputs(model: nn.Module, layer: Layer, positions: Positions, images: Tensor) -> Tensor:
    """Return the input patches of ``layer`` at ``positions``, [M, weights per output channel]."""
    parts: list[Tensor] = []
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]

        def note(given: Tensor, _: Tensor, start: int = start, count: int = len(batch)) -> None:
            parts.append(patches(layer, given, positions.within(start, count)))
            raise _StopForward

        try:
            _run(model, {layer: note}, batch)
        except _StopForward:
            continue
    return torch.cat(parts)


def _solve(layer: Layer, x: Tensor, wanted: Tensor) -> None:
    """Fit weight and bias of ``layer`` in place to map ``x`` [M, inputs] to ``wanted`` [M, outputs]."""
    x, weight = x.double(), layer.weight.double().flatten(1)
    missing = wanted.double() - F.linear(x, weight, None if layer.bias is None else layer.bias.double())
    if layer.bias is None:
        change = _ridge(x, missing)
    else:
        mean, shift = x.mean(0), missing.mean(0)
        change = _ridge(x - mean, missing - shift)
        layer.bias += (shift - change @ mean).to(layer.bias)
    layer.weight += change.view_as(layer.weight).to(layer.weight)


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """Return the ridge regression [outputs, inputs] from ``x`` [M, inputs] to ``y`` [M, outputs]."""
    ridge = _RIDGE * float(x.square().sum()) / x.shape[1]
    if ridge == 0:  # all inputs are zero, so the weights have no effect
        return x.new_zeros(y.shape[1], x.shape[1])
    if x.shape[0] >= x.shape[1]:
        found: Tensor = torch.linalg.solve(_with_ridge(x.T @ x, ridge), x.T @ y).T
    else:  # the dual form: M equations instead of one per input
        found = torch.linalg.solve(_with_ridge(x @ x.T, ridge), y).T @ x
    return found


def _with_ridge(products: Tensor, ridge: float) -> Tensor:
    products.diagonal().add_(ridge)
    return products
