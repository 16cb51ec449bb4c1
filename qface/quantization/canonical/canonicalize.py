"""The steps to canonical form, and the check that they changed nothing."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from qface.errors import TraceError
from qface.models.checkpoints import check_finite
from qface.models.provenance import carry
from qface.models.tracing import example_input, trace
from qface.preprocessing import dtype_of
from qface.quantization.canonical.batch_norms import fold_batch_norms
from qface.quantization.canonical.effects import remove_clones, remove_no_operations, undo_in_place
from qface.quantization.canonical.embeddings import convolutions_to_linear_layers
from qface.quantization.canonical.functions import functions_to_layers
from qface.quantization.canonical.graph_edit import inputs_of, propagate_shapes, shape_of
from qface.quantization.canonical.parameters import (
    copied_with_plain_parameters,
    own_layer_per_call,
    own_parameters,
    refuse_unknown_weights,
)
from qface.quantization.prelu_slopes import fold_steep_prelu_slopes, one_slope_per_channel
from qface.quantization.quantized_layers import layer_of
from qface.training_mode import preserve_training_mode

__all__ = ["canonicalize"]

_SAME = 1e-3  # in parts of the embedding's length: how far its canonical form may be from a network


def canonicalize(model: nn.Module) -> fx.GraphModule:
    """A new GraphModule in canonical form; ``model`` is untouched.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        TraceError: the model cannot be traced or copied, does not run on images of its size, or its canonical form
            computes something else.
        UnsupportedLayerError: a layer with weights is neither convolution, linear, PReLU nor BatchNorm; it is named.
    """
    check_finite(model.state_dict(), "this network")
    model = _in_float32(model)
    copied = copied_with_plain_parameters(trace(model))
    graph_module = fx.GraphModule(copied, copied.graph)  # drops submodules that no node uses
    own_layer_per_call(graph_module)
    own_parameters(graph_module)
    propagate_shapes(graph_module, example_input(model))
    remove_no_operations(graph_module)  # first, or what is overwritten would have two names
    undo_in_place(graph_module)
    remove_clones(graph_module)
    functions_to_layers(graph_module)
    fold_batch_norms(graph_module)
    convolutions_to_linear_layers(graph_module)
    _prepare_slopes(graph_module)
    refuse_unknown_weights(graph_module)
    graph_module.graph.lint()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    _check_equal(model, graph_module)
    return carry(model, graph_module)


def _in_float32(model: nn.Module) -> nn.Module:
    """``model``, or a copy where it computes in another type: scales and integers are exact in float32."""
    if dtype_of(model) == torch.float32:
        return model
    return copy.deepcopy(model).float()


def _prepare_slopes(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        layer = layer_of(node)
        if isinstance(layer, nn.PReLU):
            shape = shape_of(inputs_of(node)[0])
            one_slope_per_channel(layer, shape[1])
            fold_steep_prelu_slopes(node, len(shape))


def _check_equal(model: nn.Module, canonical: fx.GraphModule) -> None:
    """Compare both on noise: an operation in place may have overwritten what another name stood for."""
    zeros = example_input(model)
    images = torch.rand(zeros.shape, generator=torch.Generator().manual_seed(0)).to(zeros) * 2 - 1
    with preserve_training_mode(model), preserve_training_mode(canonical), torch.no_grad():
        wanted, found = model.eval()(images), canonical.eval()(images)
    if isinstance(wanted, Tensor) and (found - wanted).norm() > _SAME * wanted.norm():
        raise TraceError(
            "the network's layers, one by one, compute something else than the network: look for an operation in place "
            "on a value that is still used"
        )
