"""The network that a search quantizes: the teacher, pruned as little as makes one image take no longer than ``max_ms``.

Bits do not change the time of a network, so it is measured once, on a draft with 8 bits. Weights of 8 bits take the
longest where a processor adds products of integers in 16 bits (:mod:`qface.deployment.int8_saturation`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qface.compression.compress_config import CompressConfig, CompressionTarget
from qface.data.images import Images
from qface.deployment.latency import compare, open_file
from qface.distillation import distill
from qface.errors import CheckpointError, ConfigError
from qface.files import replacing
from qface.limits import MALFORMED, read_json
from qface.mixed_precision import draft_file
from qface.models import load, save
from qface.progress import track
from qface.pruning import PruningConfig, prune
from qface.quantization import QuantizationConfig
from qface.quantization.quantization_config import MAX_BITS

__all__ = ["TimedNetwork", "network_within"]

_PRUNING = PruningConfig(global_pruning=True, round_to=16)
"""Other numbers of channels are slower, and a compact network loses less by global pruning (``docs/pruning.md``)."""
_MAX_RATIO = 0.7
"""Maximum ratio of removed channels; beyond it hardly anything of a network is left."""
_PROBES = 5
"""Ratios that the bisection measures."""
_REPEATS = 3
"""Measurements of which the smallest median counts: other processes only make a network slower."""
_RECORD, _PRUNED = "time.json", "pruned.safetensors"


@dataclass(frozen=True)
class TimedNetwork:
    """A float network and the time of its quantized file.

    Args:
        network: the network.
        ms: median time per image on one thread, in ms; None if there is no limit.
    """

    network: nn.Module
    ms: float | None


def network_within(
    teacher: nn.Module, images: Images, target: CompressionTarget, config: CompressConfig, folder: Path
) -> TimedNetwork:
    """Return the teacher, or the teacher pruned and trained until it is fast enough; measured once for a run folder.

    Args:
        teacher: the float network.
        images: people to tune on.
        target: its ``max_ms`` is used.
        config: its ``prune``, ``distill``, ``training`` and ``activation_bits`` are used.
        folder: the run folder.

    Raises:
        CheckpointError: the record in the folder is damaged.
        ConfigError: no network meets ``max_ms``.
        ExportError: the folder cannot be written to.
    """
    if target.max_ms is None:
        return TimedNetwork(teacher, None)
    record = folder / _RECORD
    if not record.exists():  # written before training: a second measurement may choose another ratio
        ratio, milliseconds = _ratio_within(target.max_ms, teacher, images, config)
        with replacing(record) as temporary:
            temporary.write_text(json.dumps({"ratio": ratio, "ms": milliseconds}) + "\n", encoding="utf-8")
    ratio, milliseconds = _read(record)
    network = teacher if ratio == 0 else _pruned(ratio, teacher, images, config, folder)
    return TimedNetwork(network, milliseconds)


def _read(record: Path) -> tuple[float, float]:
    try:
        values = read_json(record, "the time")
        return float(values["ratio"]), float(values["ms"])
    except (OSError, *MALFORMED) as error:
        raise CheckpointError(f"{record} is damaged: choose another run folder") from error


def _pruned(ratio: float, teacher: nn.Module, images: Images, config: CompressConfig, folder: Path) -> nn.Module:
    kept = folder / _PRUNED
    if kept.exists():
        return load(kept)
    network = prune(teacher, ratio, images, _PRUNING)
    if config.distill != "never":
        distill(network, teacher, images, config.training, folder / "pruned", resume=True)
    save(network, kept)
    return network


def _ratio_within(max_ms: float, teacher: nn.Module, images: Images, config: CompressConfig) -> tuple[float, float]:
    """Return the ratio of channels to remove, 0 for a network that is fast enough as it is, and the time."""
    milliseconds = _milliseconds(teacher, images, config)
    if milliseconds <= max_ms:
        return 0.0, milliseconds
    if not config.prune:
        raise ConfigError(_too_slow(milliseconds) + "raise max_ms, or allow pruning")
    return _smallest_ratio(max_ms, teacher, images, config)


def _smallest_ratio(max_ms: float, teacher: nn.Module, images: Images, config: CompressConfig) -> tuple[float, float]:
    """Return the smallest ratio of channels to remove that is fast enough, and its time."""
    milliseconds = _milliseconds(prune(teacher, _MAX_RATIO, config=_PRUNING), images, config)
    if milliseconds > max_ms:
        raise ConfigError(_too_slow(milliseconds) + f"raise max_ms, which removing {_MAX_RATIO:.0%} of channels misses")
    slow, fast = 0.0, _MAX_RATIO
    for _ in track(range(_PROBES), "choose channels"):
        ratio = (slow + fast) / 2
        try:
            measured = _milliseconds(prune(teacher, ratio, config=_PRUNING), images, config)
        except ConfigError:  # fewer than 16 channels of each layer
            measured = float("inf")
        if measured <= max_ms:
            fast, milliseconds = ratio, measured
        else:
            slow = ratio
    return fast, milliseconds


def _too_slow(milliseconds: float) -> str:
    return f"one image takes {milliseconds:.2f} ms here with 8 bits, and fewer bits take as long: "


def _milliseconds(network: nn.Module, images: Images, config: CompressConfig) -> float:
    """Return the time of one image on one thread in onnxruntime, in ms."""
    with draft_file(network, QuantizationConfig(MAX_BITS, config.activation_bits), images) as file:
        opened = open_file(file)
        return min(compare([opened])[0].median for _ in range(_REPEATS))
