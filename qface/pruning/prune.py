"""The verb ``prune``: remove channels with torch-pruning's dependency graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qface.data.images import Images, ImageSource, normalize
from qface.data.sample import sample_batches
from qface.data.sources import as_image_source, source_record
from qface.errors import ConfigError, ImagesError, UnsupportedLayerError, one_line
from qface.graph.queries import is_quantized
from qface.models.resolve import NetworkLike, as_network
from qface.preprocessing import example_input, preprocessing_of
from qface.progress import shows_progress
from qface.provenance import carry, record_step
from qface.pruning.batch_norm import reestimate_batch_norms
from qface.pruning.budget import Budget, count_parameters
from qface.pruning.importance import Gradients, estimator, gradients
from qface.pruning.pruning_config import PruningConfig
from qface.pruning.repair import Kept, repair
from qface.pruning.structure import WEIGHTED, Structure, is_depthwise, structure_of
from qface.training_mode import eval_mode

__all__ = ["prune"]

_HALVINGS = 12  # bisection steps when searching the ratio for a budget

OnStepEnd = Callable[[nn.Module, int], object]


@shows_progress
def prune(
    model: NetworkLike,
    ratio: float | Budget = 0.2,
    images: Images | None = None,
    config: PruningConfig | None = None,
    identities: str | Path | None = None,
    on_step_end: OnStepEnd | None = None,
    progress: bool = False,
) -> nn.Module:
    """Remove channels from a float network and return the smaller network. Does not change ``model``.

    Args:
        model: a float network from images [N, 3, H, W] to embeddings [N, D] that torch.export can trace: a module, the
            path of a file, or ``package.module:factory``.
        ratio: fraction of channels to remove, in (0, 1); or a :class:`Budget`, for which the smallest such fraction is
            searched.
        images: calibration images for importance, repair and BatchNorm statistics, as for :func:`qface.calibrate`;
            None skips repair.
        config: the settings; None for the defaults.
        identities: identities to use from a folder; see :func:`qface.data.select_identities`.
        on_step_end: called with the network and the step number (starting at 1) after each step but the last, for
            example to train the network in place.
        progress: True to show progress on stderr.

    Returns:
        The pruned network in eval mode, a module of the same class as ``model``.

    Raises:
        CheckpointError: the file of the network cannot be read.
        ConfigError: the network is quantized, a setting is out of range, the budget cannot be met, or no channel was
            removed.
        ImagesError: the images cannot be used, or the importance needs images and none are given.
        TraceError: torch.export cannot trace the network.
        UnsupportedLayerError: a layer cannot be pruned.

    Example:
        >>> pruned = qface.prune(teacher, 0.3)
        >>> sum(each.numel() for each in pruned.parameters()) < sum(each.numel() for each in teacher.parameters())
        True
    """
    config, model = config or PruningConfig(), as_network(model)
    _check(model, ratio, images, config)
    source = None if images is None else as_image_source(images, identities)
    sample = None if source is None else _sample(source, model, config)
    structure = structure_of(model)
    _check_shared_slopes(model)
    share = _share_for(model, ratio, sample, config, structure) if isinstance(ratio, Budget) else float(ratio)
    pruned = copy.deepcopy(model).eval()
    rounds = _Rounds(pruned, share, config, structure)
    for step in range(1, config.iterative_steps + 1):
        _remove_and_mend(rounds, sample)
        if on_step_end is not None and step < config.iterative_steps:
            on_step_end(pruned, step)
    if isinstance(ratio, Budget) and ratio.cost(pruned) > ratio.limit:
        # Repair and training between the steps changed which channels are least important since the search.
        once = replace(config, iterative_steps=1)
        share_left = _share_for(pruned, ratio, sample, once, structure)
        _remove_and_mend(_Rounds(pruned, share_left, once, structure), sample)
    if count_parameters(pruned) == count_parameters(model):
        raise ConfigError(
            f"no channel was removed: importance {config.importance!r} selected none, or a ratio of {share:.3g} is "
            f"less than {config.round_to} channels of each layer; increase the ratio, or change importance, round_to "
            "or ignored_layers"
        )
    seen = {} if source is None else source_record(source)
    settings = {**asdict(config), "share": share, "images": 0 if sample is None else len(sample), **seen}
    return record_step(carry(model, pruned.eval()), "prune", settings)


def _check(model: nn.Module, ratio: float | Budget, images: Images | None, config: PruningConfig) -> None:
    if is_quantized(model):
        raise ConfigError("the network is quantized: prune the float network first, then quantize the result")
    if not isinstance(ratio, Budget) and not (isinstance(ratio, (int, float)) and 0 < ratio < 1):
        raise ConfigError(f"ratio must be > 0 and < 1, got {ratio!r}")
    if config.needs_images and images is None:
        raise ImagesError(f"importance {config.importance!r} needs images: pass images")
    layers = dict(model.named_modules())
    unknown = [name for name in config.ignored_layers if name not in layers]
    if unknown:
        weighted = [name for name, layer in layers.items() if isinstance(layer, WEIGHTED)]
        raise ConfigError(
            f"ignored_layers names {unknown[0]!r}, which is not a layer; use names like {', '.join(weighted[:5])}"
        )


def _check_shared_slopes(model: nn.Module) -> None:
    """Refuse a PReLU that is called with different numbers of channels: torch-pruning supports only one."""
    widths: dict[str, set[int]] = {}

    def count(layer: nn.Module, inputs: Any, output: Any) -> None:
        widths.setdefault(names[layer], set()).add(output.shape[1])

    names: dict[nn.Module, str] = {layer: name for name, layer in model.named_modules() if isinstance(layer, nn.PReLU)}
    hooks = [layer.register_forward_hook(count) for layer in names]
    try:
        _check_runs(model)
    finally:
        for hook in hooks:
            hook.remove()
    shared = [name for name, found in widths.items() if len(found) > 1]
    if shared:
        raise UnsupportedLayerError(
            f"{type(model).__name__} cannot be pruned: the PReLU {shared[0]!r} is called on "
            f"{' and '.join(map(str, sorted(widths[shared[0]])))} channels; use a separate PReLU for each call"
        )


def _sample(source: ImageSource, model: nn.Module, config: PruningConfig) -> Tensor:
    """Return up to ``config.num_images`` evenly spaced, normalized images of ``source``."""
    found = torch.cat(sample_batches(source, config.num_images, config.num_images))
    if config.reestimate and len(found) < 2:
        raise ImagesError("BatchNorm statistics need at least 2 images, got 1: pass more, or set reestimate=False")
    return normalize(found, preprocessing_of(model)).to(example_input(model, 1))


def _share_for(
    model: nn.Module, budget: Budget, sample: Tensor | None, config: PruningConfig, structure: Structure
) -> float:
    """Return the smallest pruning ratio that meets ``budget``, to within 1/4096."""
    if budget.cost(model) <= budget.limit:
        raise ConfigError(
            f"the network already meets the budget with {budget.cost(model):g} {budget.unit}: lower the budget"
        )
    of_model = _measured(model, sample, config)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        if budget.cost(_without_share(model, share, of_model, sample, config, structure)) <= budget.limit:
            high = share
        else:
            low = share
    if high == 1.0:
        smallest = budget.cost(_without_share(model, low, of_model, sample, config, structure))
        raise ConfigError(f"pruning cannot reduce the network below {smallest:g} {budget.unit}: increase the budget")
    return high


def _without_share(
    model: nn.Module,
    share: float,
    of_model: Gradients,
    sample: Tensor | None,
    config: PruningConfig,
    structure: Structure,
) -> nn.Module:
    """Return a pruned copy of ``model`` without repair; ``of_model`` are the gradients of its first step."""
    candidate = copy.deepcopy(model).eval()
    rounds = _Rounds(candidate, share, config, structure)
    for step in range(1, config.iterative_steps + 1):
        rounds.remove(of_model if step == 1 else _measured(candidate, sample, config))
    return candidate


def _measured(model: nn.Module, sample: Tensor | None, config: PruningConfig) -> Gradients:
    """Return the gradients of ``model`` if the importance needs them; otherwise an empty list."""
    return gradients(model, sample, config) if config.needs_images and sample is not None else []


def _remove_and_mend(rounds: _Rounds, sample: Tensor | None) -> None:
    """Run one pruning step, then repair and re-estimate BatchNorm statistics on ``sample``."""
    pruned, config = rounds.model, rounds.config
    before = copy.deepcopy(pruned)
    kept = rounds.remove(_measured(pruned, sample, config))
    if config.repair and sample is not None:
        repair(pruned, before, kept, sample, config.seed)
    if config.reestimate and sample is not None:
        reestimate_batch_norms(pruned, sample)


class _Rounds:
    """Pruning steps that remove ``share`` of the channels of ``model`` in place.

    All steps share one pruner, which knows the original channel counts: several steps then end with the same counts as
    a single one.
    """

    def __init__(self, model: nn.Module, share: float, config: PruningConfig, structure: Structure) -> None:
        self.model = model
        self.config = config
        self._structure = structure
        with self._followed():
            self._pruner = _pruner(model, share, config, structure)

    def remove(self, read: Gradients) -> dict[str, Kept]:
        """Remove the channels of the next step and return the channels left in each layer.

        ``read`` holds the gradients for the importance, or is empty.
        """
        kept = _Channels(self.model, self._structure)
        with self._followed():
            for parameter, gradient in zip(self.model.parameters(), read, strict=bool(read)):
                parameter.grad = None if gradient is None else gradient.clone()
            for group in self._pruner.step(interactive=True):
                kept.remove(group)
                group.prune()
            _check_runs(self.model)
        return kept.left

    @contextmanager
    def _followed(self) -> Iterator[None]:
        """Enable gradients, by which torch-pruning traces the network; restore ``requires_grad`` afterwards."""
        trained = [parameter.requires_grad for parameter in self.model.parameters()]
        self.model.requires_grad_(True)
        try:
            with torch.enable_grad():
                yield
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedLayerError(f"{type(self.model).__name__} cannot be pruned: {one_line(error)}") from error
        for parameter, trains in zip(self.model.parameters(), trained, strict=True):
            parameter.requires_grad_(trains)
        self.model.zero_grad(set_to_none=True)


def _check_runs(model: nn.Module) -> None:
    """Run ``model`` once, so that an inconsistency left by torch-pruning fails here."""
    with eval_mode(model), torch.no_grad():
        model(example_input(model, 1))


def _pruner(model: nn.Module, share: float, config: PruningConfig, structure: Structure) -> Any:
    names = (*config.ignored_layers, *structure.reordered)
    if config.keep_embedding:
        names += structure.embedding
    pruner = import_module("torch_pruning").pruner.algorithms.BasePruner(
        model,
        example_input(model, 1),
        importance=estimator(config),
        global_pruning=config.global_pruning,
        pruning_ratio=share,
        max_pruning_ratio=config.max_pruning_ratio if config.global_pruning else 1.0,
        ignored_layers=[model.get_submodule(name) for name in dict.fromkeys(names)],
        round_to=config.round_to if config.round_to > 1 else None,
        pruning_ratio_dict=None if config.global_pruning else _max_pruning_ratios(model, share, config),
        iterative_steps=config.iterative_steps,
    )
    # torch-pruning starts a group at its first layer, and does not follow a flatten after a depthwise convolution.
    nodes = pruner.DG.module2node
    pruner.DG.module2node = dict(sorted(nodes.items(), key=lambda item: is_depthwise(item[0])))
    return pruner


def _max_pruning_ratios(model: nn.Module, share: float, config: PruningConfig) -> dict[nn.Module, float]:
    """Limit the ratio of layers that would lose all channels, since torch-pruning does not prune these."""
    found: dict[nn.Module, float] = {}
    for layer in model.modules():
        if isinstance(layer, WEIGHTED):
            channels = len(layer.weight) // getattr(layer, "groups", 1)
            if config.round_to < channels and int(channels * (1 - share)) < config.round_to:
                # Half a channel more than must stay, since torch-pruning rounds down.
                found[layer] = 1 - (config.round_to + 0.5) / channels
    return found


class _Channels:
    """Remaining channels of each convolution and linear layer of ``model``."""

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        weighted = {name: cast("nn.Conv2d | nn.Linear", model.get_submodule(name)) for name in structure.weighted}
        self._names = {layer: name for name, layer in weighted.items()}
        self.left = {name: Kept(*map(torch.arange, _sizes(layer))) for name, layer in weighted.items()}

    def remove(self, group: Any) -> None:
        """Record the channels of ``group``; call it before the group is pruned."""
        function = import_module("torch_pruning.pruner.function")
        outputs = (function.prune_conv_out_channels, function.prune_linear_out_channels)
        inputs = (function.prune_conv_in_channels, function.prune_linear_in_channels)
        depthwise = (function.prune_depthwise_conv_out_channels, function.prune_depthwise_conv_in_channels)
        for dependency, indices in group:
            name = self._names.get(dependency.target.module)
            if name is None:
                continue
            left = self.left[name]
            if dependency.handler in outputs + depthwise[:1]:
                self.left[name] = Kept(left.inputs, _without(left.outputs, indices))
            elif dependency.handler in inputs:
                self.left[name] = Kept(_without(left.inputs, indices), left.outputs)


def _sizes(layer: nn.Conv2d | nn.Linear) -> tuple[int, int]:
    """Return the number of input channels (over all groups) and of output channels."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def _without(channels: Tensor, positions: list[int]) -> Tensor:
    remaining = torch.ones(len(channels), dtype=torch.bool)
    remaining[positions] = False
    return channels[remaining]
