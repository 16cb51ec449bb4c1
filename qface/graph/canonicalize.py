"""``canonicalize``: a network as the layers that quantization knows, and the check that nothing changed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from qface.checks import check_finite
from qface.data.synthetic import synthetic_crops
from qface.errors import TraceError
from qface.graph.capture import capture, unwrapped
from qface.graph.edit import propagate_shapes
from qface.graph.passes.activations import activations_to_products, leaky_relu_to_prelu, scales_before_clamps
from qface.graph.passes.affine_maps import fold_affine_maps
from qface.graph.passes.matrix_products import convolutions_to_linear_layers, tokens_to_rows
from qface.graph.passes.no_operations import remove_no_operations
from qface.graph.passes.normalization import recognize_normalization
from qface.graph.passes.parameters import own_parameters
from qface.graph.passes.prelu_slopes import prepare_prelu_slopes
from qface.network_output import embedding_of
from qface.preprocessing import dtype_of, example_input, preprocessing_of
from qface.provenance import carry
from qface.training_mode import preserve_training_mode

__all__ = ["PASSES", "canonicalize"]

_TOLERANCE = 1e-4
"""Greatest difference to the network in float64, relative to the norm of the embeddings.

Folded weights are rounded to float32; through fifty layers that makes 1e-6.
"""
_GREATEST_ROUNDING = 1e-2
"""The same in a network that amplifies rounding, such as one of many linear layers: its own error in float32, to here.
"""
_TOLERANCE_FLOAT32 = 1e-3  # of a network that computes in no other type

PASSES = (
    own_parameters,
    remove_no_operations,
    recognize_normalization,
    activations_to_products,
    leaky_relu_to_prelu,
    scales_before_clamps,
    fold_affine_maps,
    convolutions_to_linear_layers,
    prepare_prelu_slopes,
    tokens_to_rows,
)
"""In this order: what each one makes, the next one reads."""


def canonicalize(model: nn.Module) -> fx.GraphModule:
    """A new graph of layers that computes what ``model`` computes in eval mode; ``model`` is untouched.

    Args:
        model: a network from images [N, 3, H, W] to embeddings [N, D].

    Raises:
        CheckpointError: a weight is NaN or infinite.
        TraceError: the network cannot be captured, does not run on images of its size, or its canonical form computes
            something else.
        UnsupportedLayerError: it calls an operator that qface does not know; it is named.
    """
    check_finite(model.state_dict(), "this network")
    model = _in_float32(model)
    graph_module = copy.deepcopy(capture(model))
    propagate_shapes(graph_module, example_input(model))
    for step in PASSES:
        step(graph_module)
    graph_module.graph.lint()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    propagate_shapes(graph_module, example_input(model))
    _check_equal(model, graph_module)
    return carry(model, graph_module.train(model.training))


def _in_float32(model: nn.Module) -> nn.Module:
    """``model``, or a copy where it computes in another type: scales and integers are exact in float32."""
    if dtype_of(model) == torch.float32:
        return model
    return copy.deepcopy(model).float()


def _check_equal(model: nn.Module, canonical: fx.GraphModule) -> None:
    """Compare both on images with the colors of faces; in float64, where a difference is no matter of rounding."""
    images = preprocessing_of(model)(synthetic_crops()).to(example_input(model).device)
    model = unwrapped(model)
    with preserve_training_mode(model), preserve_training_mode(canonical), torch.no_grad():
        try:
            wanted, found = _outputs(copy.deepcopy(model).double(), canonical, images.double())
            tolerance = _TOLERANCE
        except RuntimeError:  # a type that is written into its forward
            wanted, found = _outputs(model, canonical, images)
            tolerance = _TOLERANCE_FLOAT32
    if not bool(torch.isfinite(wanted).all()):
        raise TraceError("the network's embeddings are not finite; check its weights and its Preprocessing")
    allowed = tolerance * wanted.norm()
    if not bool((found - wanted).norm() <= allowed) and tolerance == _TOLERANCE:
        allowed = _rounding_of(model, images, wanted)
    if not bool((found - wanted).norm() <= allowed):
        raise TraceError(
            "the network's layers, one by one, compute something else than the network: look for an operation in place "
            "on a value that is still used"
        )


@torch.no_grad()
def _rounding_of(model: nn.Module, images: Tensor, wanted: Tensor) -> Tensor:
    """By how much rounding to float32 changes the embeddings ``wanted``, in a network that amplifies it."""
    with preserve_training_mode(model):
        rounded = embedding_of(model.eval()(images))
    return torch.minimum((rounded - wanted).norm(), _GREATEST_ROUNDING * wanted.norm())


def _outputs(model: nn.Module, canonical: fx.GraphModule, images: Tensor) -> tuple[Tensor, Tensor]:
    return embedding_of(model.eval()(images)), copy.deepcopy(canonical).to(images.dtype).eval()(images)
