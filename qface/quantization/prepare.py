"""``quantize``, which turns a float network into a student with torch.ao's ``prepare_qat_fx``."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.ao.quantization import QConfig, QConfigMapping
from torch.ao.quantization.backend_config import (
    BackendConfig,
    BackendPatternConfig,
    DTypeConfig,
    ObservationType,
)
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import prepare_qat_fx

from qface.errors import ConfigError
from qface.graph.canonicalize import canonicalize
from qface.graph.edit import set_layer
from qface.graph.graph_data import CONVOLUTION_ARGUMENTS, LINEAR_ARGUMENTS, on_rebuild, register_layer
from qface.graph.layers import OWN_LAYERS, ChannelAffine
from qface.graph.queries import SHAPE_ONLY, input_of, is_quantized, layer_of, shape_of
from qface.model_digest import sha256_of_values
from qface.models.resolve import NetworkLike, as_architecture, as_network
from qface.preprocessing import example_input, preprocessing_of
from qface.provenance import carry, record_step
from qface.quantization.binding import bind_quantizers
from qface.quantization.fake_quantize import ImageFakeQuantize, LSQFakeQuantize, SharedScaleFakeQuantize
from qface.quantization.insertion import place_quantizers
from qface.quantization.placement import INTEGER_LAYERS, OTHER_BITS
from qface.quantization.plan import QuantizationPlan, plan_of
from qface.quantization.quantization_config import QuantizationConfig, as_config
from qface.quantization.quantized_layers import (
    QuantizedAffine,
    QuantizedConv2d,
    QuantizedGlobalAveragePool,
    QuantizedLinear,
    QuantizedPReLU,
)
from qface.quantization.residuals import widen_residuals

__all__ = ["inspect", "quantize"]

_WEIGHT_ARGUMENTS = ("weight_bits", "weight_observer", "percentile")
on_rebuild(bind_quantizers)
register_layer(QuantizedConv2d, (*CONVOLUTION_ARGUMENTS, *_WEIGHT_ARGUMENTS))
register_layer(QuantizedLinear, (*LINEAR_ARGUMENTS, *_WEIGHT_ARGUMENTS))
register_layer(QuantizedPReLU, ("num_parameters",))
register_layer(QuantizedGlobalAveragePool, ("num_values",))
register_layer(QuantizedAffine, ("num_channels", "dim"))
register_layer(LSQFakeQuantize, ("bits", "num_channels", "observer", "percentile", "num_zero_points"))
register_layer(SharedScaleFakeQuantize, ())
register_layer(ImageFakeQuantize, ("scale", "zero_point", "offset"))

_INTEGERS = DTypeConfig(
    input_dtype=torch.quint8, output_dtype=torch.quint8, weight_dtype=torch.qint8, bias_dtype=torch.float
)
_SWAPPED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: QuantizedConv2d,
    nn.Linear: QuantizedLinear,
    nn.PReLU: QuantizedPReLU,
}
_OBSERVED = (*_SWAPPED, *INTEGER_LAYERS)  # torch.ao swaps layers first and matches patterns afterwards
_LEAVES = (*OWN_LAYERS, QuantizedAffine, QuantizedGlobalAveragePool)


@torch.random.fork_rng(devices=[])  # torch.ao's layer swap draws random weights
def quantize(model: NetworkLike, bits: int | QuantizationConfig = 6) -> fx.GraphModule:
    """Return a quantized student of a float network. Does not change ``model``.

    The student is an FX graph from torch.ao's ``prepare_qat_fx`` with fake-quant modules and folded BatchNorm, in the
    training or eval mode of ``model``. Call :func:`qface.calibrate` next, to set its scales.

    Args:
        model: a network from images [N, 3, H, W] to embeddings [N, D] that torch.export can trace: a module, the path
            of its file, or ``package.module:factory``.
        bits: bits of weights and activations, 2 to 8 (default 6), or a config. Which tensors get these bits is listed
            in :mod:`qface.quantization.placement`.

    Returns:
        The student, which is not calibrated.

    Raises:
        CheckpointError: a weight is NaN or infinite, or the file cannot be read.
        ConfigError: bits are out of range, an override matches no layer, or the model is already quantized.
        TraceError: the model cannot be traced; the message names the location.
        UnsupportedLayerError: a layer has weights that cannot be quantized; the message names it.

    Example:
        >>> student = qface.quantize(teacher, bits=6)
        >>> student = qface.quantize(teacher, qface.QuantizationConfig(weight_bits=4, activation_bits=8))
    """
    config, model = as_config(bits), as_network(model)
    if is_quantized(model):
        raise ConfigError("this network is already quantized; pass the float network that it was made from")
    floating = canonicalize(model)
    _check_overrides(floating, config)
    if config.wide_residuals:
        widen_residuals(floating, config, OTHER_BITS)
    _swap_leaves(floating)
    student = prepare_qat_fx(
        floating,
        _qconfig_mapping(floating, config),
        (example_input(floating),),
        prepare_custom_config=PrepareCustomConfig().set_non_traceable_module_classes(list(_LEAVES)),
        backend_config=_backend_config(),
    )
    place_quantizers(student, config, preprocessing_of(model))
    student.recompile()
    bind_quantizers(student)
    student.requires_grad_(True)  # a teacher's parameters may be frozen
    student.train(model.training)  # torch.ao leaves new modules in training mode
    settings = {**config.to_dict(), "source_sha256": sha256_of_values(model)}
    return record_step(carry(model, student), "quantize", settings)


def inspect(model: NetworkLike, bits: int | QuantizationConfig = 6) -> QuantizationPlan:
    """Report which layers run on integer kernels and which stay in float. Does not change ``model``.

    Args:
        model: a float network or a student: a module, the path of its file, ``package.module:factory``, or the name of
            an architecture, since weights do not matter here.
        bits: bits of a float network's student, 2 to 8 (default 6), or a config; a student keeps its own.

    Returns:
        A plan with one entry per layer; printed, it is a table by kind of layer.

    Raises:
        CheckpointError: a weight is NaN or infinite, or the file cannot be read.
        ConfigError: bits are out of range, or an override matches no layer.
        TraceError: the model cannot be traced; the message names the location.
        UnsupportedLayerError: a layer has weights that cannot be quantized; the message names it.

    Example:
        >>> import qface
        >>> from qface.models import MobileFaceNet
        >>> qface.inspect(MobileFaceNet()).summary
        '107 of 107 layers and 100.0% of the multiply-adds are integers; in float: nothing'
    """
    model = as_architecture(model)
    student = model if isinstance(model, fx.GraphModule) and is_quantized(model) else quantize(model, bits)
    return plan_of(student)


def _swap_leaves(model: fx.GraphModule) -> None:
    """Swap the leaf modules, which torch.ao skips, since it sets no qconfig on them."""
    for node in model.graph.nodes:
        layer = layer_of(node)
        if isinstance(layer, ChannelAffine) and _has_integer_form(node, layer):
            set_layer(model, str(node.target), QuantizedAffine.from_float(layer))
        elif layer is not None and _is_global_average(node, layer):
            set_layer(model, str(node.target), QuantizedGlobalAveragePool(math.prod(shape_of(input_of(node))[2:])))


def _has_integer_form(node: fx.Node, layer: ChannelAffine) -> bool:
    """Return True for an affine layer along the channels of [N, C] or [N, C, H, W]."""
    return layer.dim == 1 and layer.num_channels > 1 and len(shape_of(node)) in (2, 4)


def _is_global_average(node: fx.Node, layer: nn.Module) -> bool:
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return layer.output_size in (1, (1, 1), [1, 1])
    if not isinstance(layer, nn.AvgPool2d):
        return False
    whole = layer.kernel_size in (shape_of(input_of(node))[2:], list(shape_of(input_of(node))[2:]))
    return whole and layer.padding in (0, (0, 0))


def _check_overrides(model: fx.GraphModule, config: QuantizationConfig) -> None:
    layers = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    unknown = sorted(set(config.overrides) - set(layers))
    if unknown:
        raise ConfigError(
            f"{len(unknown)} overrides match no convolution or linear layer (first: {unknown[0]!r}); "
            f"the first of this network's {len(layers)} is {layers[0] if layers else None!r}"
        )
    for pattern in config.ignored_layers:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ConfigError(
                f"ignored_layers: {pattern!r} matches no convolution or linear layer; "
                f"the first of this network's {len(layers)} is {layers[0] if layers else None!r}"
            )


def _backend_config() -> BackendConfig:
    """Return the layers that torch.ao observes, and those that it swaps for quantized ones."""
    different = ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT
    shared = ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
    backend = BackendConfig("qface")
    for layers, observation in ((_OBSERVED, different), (SHAPE_ONLY, shared)):
        for layer in layers:
            pattern = BackendPatternConfig(layer).set_observation_type(observation).add_dtype_config(_INTEGERS)
            if layer in _SWAPPED:
                pattern.set_root_module(layer).set_qat_module(_SWAPPED[layer])
            backend.set_backend_pattern_config(pattern)
    return backend


def _qconfig_mapping(model: fx.GraphModule, config: QuantizationConfig) -> QConfigMapping:
    """Return the qconfig of each layer: the bits of its weight, and a placeholder for its output."""
    mapping = QConfigMapping().set_global(_qconfig(config.weight_bits, config))
    for name in config.overrides:
        mapping.set_module_name(name, _qconfig(config.weight_bits_of(name), config))
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and config.ignores(name):
            mapping.set_module_name(name, None)
    return mapping


def _qconfig(weight_bits: int, config: QuantizationConfig) -> Any:
    """Return factories of one shared quantizer each.

    torch.ao calls a factory about 20 times per layer, to get the dtype. Neither quantizes anything:
    :func:`place_quantizers` replaces the activation's, and a swapped layer builds its own from the settings of the
    weight's.
    """
    activation = LSQFakeQuantize(OTHER_BITS)
    weight = LSQFakeQuantize(weight_bits, 1, config.weight_observer, config.percentile)
    return QConfig(partial(_itself, activation), partial(_itself, weight))  # type: ignore[no-untyped-call]


def _itself(quantizer: LSQFakeQuantize) -> LSQFakeQuantize:
    # Not a lambda: layers of the student keep their qconfig, and a student must be picklable.
    return quantizer
