"""Sentences about the provenance of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["data_in_words", "steps_in_words"]


def steps_in_words(steps: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return one sentence per step of :func:`qface.provenance.provenance_of`.

    Example:
        >>> steps_in_words([{"step": "quantize", "weight_bits": 4, "activation_bits": 8}])
        ('Quantized to 4-bit weights and 8-bit activations.',)
    """
    return tuple(_SENTENCES.get(str(step["step"]), _any)(step) for step in steps)


def data_in_words(steps: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return one sentence per step that used images: their number, folder and identities.

    Example:
        >>> seen = {"images": 512, "folder": "lfw", "people": 2875, "identities": "first-half"}
        >>> data_in_words([{"step": "calibrate", **seen}])
        ('Calibrate: 512 images of the folder lfw, 2,875 people (first-half).',)
    """
    return tuple(f"{str(step['step']).capitalize()}: {_images(step)}." for step in steps if step.get("images"))


def _images(step: Mapping[str, Any]) -> str:
    folder = f" of the folder {step['folder']}" if step.get("folder") else ""
    people = f", {step['people']:,} people" if step.get("people") else ""
    selection = f" ({step['identities']})" if step.get("identities") else ""
    return f"{step['images']:,} images{folder}{people}{selection}"


def _quantize(step: Mapping[str, Any]) -> str:
    text = f"Quantized to {step.get('weight_bits')}-bit weights and {step.get('activation_bits')}-bit activations"
    others = [f"{len(step['overrides'])} layers have bits of their own"] if step.get("overrides") else []
    others += [f"{', '.join(step['ignored_layers'])} stay in float"] if step.get("ignored_layers") else []
    return ", ".join([text, *others]) + "."


def _calibrate(step: Mapping[str, Any]) -> str:
    parts = {"equalize": "channels equalized", "gptq": "weights rounded by GPTQ", "correct_biases": "biases corrected"}
    done = [words for name, words in parts.items() if step.get(name)]
    mirrored = f" and {step['mirror_images']} mirror images" if step.get("mirror_images") else ""
    return ", ".join([f"Calibrated on {step.get('images')} images{mirrored}", *done]) + "."


def _distill(step: Mapping[str, Any]) -> str:
    length = f"{step['max_steps']} steps" if step.get("max_steps") else f"{step.get('epochs')} epochs"
    return f"Distilled from the float network for {length} in batches of {step.get('batch_size')}."


def _any(step: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in step.items() if name not in ("step", "qface"))
    return f"{step['step'].capitalize()}: {settings}." if settings else f"{step['step'].capitalize()}."


_SENTENCES = {"quantize": _quantize, "calibrate": _calibrate, "distill": _distill}
