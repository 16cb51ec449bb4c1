"""``canonicalize``: convert a network to layers that quantization supports, and check its embeddings."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from qface.checks import check_finite
from qface.data.synthetic import synthetic_crops
from qface.errors import TraceError
from qface.graph.capture import capture, unwrapped
from qface.graph.edit import propagate_shapes
from qface.graph.passes.activations import (
    activations_to_products,
    leaky_relu_to_prelu,
    merge_clamps,
    scales_before_clamps,
)
from qface.graph.passes.affine_maps import fold_affine_maps
from qface.graph.passes.matrix_products import convolutions_to_linear_layers, tokens_to_rows
from qface.graph.passes.no_operations import remove_no_operations
from qface.graph.passes.normalization import recognize_normalization
from qface.graph.passes.padding import fold_padding
from qface.graph.passes.parameters import own_parameters
from qface.graph.passes.permutations import move_permutations
from qface.graph.passes.prelu_slopes import prepare_prelu_slopes
from qface.graph.passes.rectifiers import recognize_rectifiers
from qface.network_output import embedding_of
from qface.preprocessing import dtype_of, example_input, preprocessing_of
from qface.provenance import carry
from qface.training_mode import preserve_training_mode

__all__ = ["PASSES", "canonicalize"]

_TOLERANCE = 1e-4
"""Maximum difference to the original network in float64, relative to the norm of the embeddings.

Folded weights are rounded to float32, which causes 1e-6 in a network of fifty layers.
"""
_MAX_ROUNDING = 1e-2
"""Upper bound of the tolerance for a network that amplifies rounding, whose tolerance is its own float32 error."""
_TOLERANCE_FLOAT32 = 1e-3  # for a network that runs only in float32

PASSES = (
    own_parameters,
    remove_no_operations,
    merge_clamps,
    recognize_rectifiers,
    recognize_normalization,
    activations_to_products,
    leaky_relu_to_prelu,
    scales_before_clamps,
    fold_affine_maps,
    fold_padding,
    convolutions_to_linear_layers,
    prepare_prelu_slopes,
    tokens_to_rows,
)
"""Passes in order; each one may depend on the results of those before it."""


def canonicalize(model: nn.Module) -> fx.GraphModule:
    """Return an equivalent of ``model`` in eval mode, made of layers that quantization supports.

    Does not change ``model``.

    Args:
        model: a network from images [N, 3, H, W] to embeddings [N, D].

    Returns:
        A new graph module with its own parameters, in the same training mode as ``model``.

    Raises:
        CheckpointError: a weight is NaN or infinite.
        TraceError: the network cannot be captured, does not run on images of the size in its Preprocessing, or the
            embeddings of the result differ.
        UnsupportedLayerError: the network calls an operator that qface does not support; the message names it.
    """
    check_finite(model.state_dict(), "this network")
    model = _in_float32(model)
    graph_module = copy.deepcopy(capture(model))
    move_permutations(graph_module)  # before shapes are recorded, since it changes them
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
    """Return ``model`` in float32, since scales and integers are inexact in other dtypes."""
    if dtype_of(model) == torch.float32:
        return model
    return copy.deepcopy(model).float()


def _check_equal(model: nn.Module, canonical: fx.GraphModule) -> None:
    """Compare both on synthetic faces in float64, in which rounding causes no difference."""
    images = preprocessing_of(model)(synthetic_crops()).to(example_input(model).device)
    model = unwrapped(model)
    with preserve_training_mode(model), preserve_training_mode(canonical), torch.no_grad():
        try:
            wanted, found = _outputs(copy.deepcopy(model).double(), canonical, images.double())
            tolerance = _TOLERANCE
        except RuntimeError:  # its forward fixes the dtype
            wanted, found = _outputs(model, canonical, images)
            tolerance = _TOLERANCE_FLOAT32
    if not bool(torch.isfinite(wanted).all()):
        raise TraceError("the network's embeddings contain NaN or infinity; check its weights and its Preprocessing")
    allowed = tolerance * wanted.norm()
    if not bool((found - wanted).norm() <= allowed) and tolerance == _TOLERANCE:
        allowed = _rounding_of(model, images, wanted)
    if not bool((found - wanted).norm() <= allowed):
        raise TraceError(
            "the captured layers compute other embeddings than the network: look for an in-place operation on a tensor "
            "that is used later, and call it out of place"
        )


@torch.no_grad()
def _rounding_of(model: nn.Module, images: Tensor, wanted: Tensor) -> Tensor:
    """Return the error of the network's own embeddings in float32, limited by ``_MAX_ROUNDING``."""
    with preserve_training_mode(model):
        rounded = embedding_of(model.eval()(images))
    return torch.minimum((rounded - wanted).norm(), _MAX_ROUNDING * wanted.norm())


def _outputs(model: nn.Module, canonical: fx.GraphModule, images: Tensor) -> tuple[Tensor, Tensor]:
    return embedding_of(model.eval()(images)), copy.deepcopy(canonical).to(images.dtype).eval()(images)
