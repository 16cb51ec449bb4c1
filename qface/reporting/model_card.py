"""``model_card``: a page in Markdown that says what an exported file is, how it was made, and how to run it.

The front matter is that of model cards on the Hugging Face Hub. All but the figures that a caller adds comes from the
file itself, so that the same file has the same card.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from qface.deployment.golden import EQUAL
from qface.deployment.runtime import WEIGHT_BITS
from qface.errors import ConfigError
from qface.files import replacing
from qface.preprocessing import CROP_SIZE, Preprocessing
from qface.reporting.exported_file import ExportedFile
from qface.reporting.steps import data_in_words, steps_in_words

__all__ = ["card_path", "model_card", "write_model_card"]

_TARGETS = {
    "cpu": "integers, the same on every processor",
    "cuda": "fp16, on GPUs; activations are not rounded",
    "float32": "float32, fastest in browsers; activations are not rounded",
}


def model_card(file: str | Path, figures: Sequence[str] = ()) -> str:
    """The model card of an exported file, Markdown with the front matter of the Hugging Face Hub.

    License and source network are fields to fill in: no file knows them. The card has a date only where the environment
    sets ``SOURCE_DATE_EPOCH``. Does not change ``file``.

    Args:
        file: an ONNX file that :func:`qface.export` wrote; no network, since the card is of the file.
        figures: sentences with measured figures, which stand beside the thresholds in the file.

    Returns:
        The text.

    Raises:
        CheckpointError: the file is missing or damaged, or lacks what ``export`` writes into the metadata.
        ConfigError: ``SOURCE_DATE_EPOCH`` is no time.

    Example:
        >>> "SHA-256 of the source network's values" in qface.model_card("student.onnx")
        True
    """
    contents = ExportedFile.read(file)
    sections = {
        "File": _file(contents),
        "How it was made": [*steps_in_words(contents.steps), *_origin(contents)],
        "Data": data_in_words(contents.steps) or ["The file does not say on which images it was made."],
        "Figures": _figures(contents, figures),
        "How to run it": ["```python", *_code(contents), "```"],
        "Agreement": _agreement(contents),
        "Responsible use": _RESPONSIBLE_USE,
    }
    body = [f"# {contents.name}", "", *_introduction(contents)]
    for title, lines in sections.items():
        body += ["", f"## {title}", "", *(lines if lines[0].startswith("```") else _listed(lines))]
    return "\n".join([*_front_matter(contents), "", *body, ""])


def card_path(file: str | Path) -> Path:
    """The path of the card of ``file``: beside it, with the ending ``.md``."""
    return Path(file).with_suffix(".md")


def write_model_card(file: str | Path, figures: Sequence[str] = ()) -> Path:
    """Write the card of ``file`` beside it, in place of one that is there, and return its path.

    Args:
        file: as of :func:`model_card`.
        figures: likewise.

    Raises:
        CheckpointError, ConfigError: as of :func:`model_card`.
        ExportError: the card cannot be written.
    """
    text = model_card(file, figures)
    with replacing(card_path(file)) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return card_path(file)


def _listed(sentences: Sequence[str]) -> list[str]:
    """One item of a list for each sentence, in one line whatever names it holds."""
    return [f"- {' '.join(sentence.split())}" for sentence in sentences]


def _front_matter(contents: ExportedFile) -> list[str]:
    quantized = contents.quantized is not None
    return [
        "---",
        "license: # fill in: that of the source network's weights, under which this file stays",
        "library_name: qface",
        "base_model: # fill in: the source network, as owner/name",
        *(["base_model_relation: quantized"] if quantized else []),
        "tags:",
        *(f"- {tag}" for tag in ("face-recognition", "onnx", *(["quantized"] if quantized else []))),
        "---",
    ]


def _introduction(contents: ExportedFile) -> list[str]:
    written = f"Written by qface {contents.metadata['qface']}"
    return [
        f"A face-recognition network: it makes an embedding of {contents.dimensions} numbers of the image of one face. "
        "Two faces are compared by the cosine of their embeddings.",
        f"{written}{_date()}.",
    ]


def _date() -> str:
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    if not seconds:
        return ""
    try:
        return f" on {datetime.fromtimestamp(int(seconds), timezone.utc):%Y-%m-%d}"
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(
            f"SOURCE_DATE_EPOCH is {seconds!r}; it must be a number of seconds since 1970, or not set"
        ) from error


# ---- sections


def _file(contents: ExportedFile) -> list[str]:
    height, width = contents.preprocessing.size
    length = ", of unit length" if contents.has_unit_length else ""
    return [
        f"Input: `images`, {contents.input} [batch, 3, {height}, {width}]: {_preprocessing(contents)}.",
        f"Output: `embedding`, float32 [batch, {contents.dimensions}]{length}.",
        *_precision(contents),
    ]


def _preprocessing(contents: ExportedFile) -> str:
    preprocessing = contents.preprocessing
    top, left, bottom, right = preprocessing.crop
    size = f"{CROP_SIZE}x{CROP_SIZE}"
    words = [f"faces aligned to the ArcFace template of {size} pixels"]
    if (bottom - top, right - left) != (CROP_SIZE, CROP_SIZE):
        words.append(f"rows {top} to {bottom} and columns {left} to {right} of that")
    if (bottom - top, right - left) != preprocessing.size:
        words.append("resized")
    if contents.reads_bytes:
        return ", ".join([*words, "as RGB bytes, which the file normalizes itself"])
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    return ", ".join([*words, f"in the order {preprocessing.color}, less the mean ({mean}) and divided by ({std})"])


def _precision(contents: ExportedFile) -> list[str]:
    step, target = contents.quantized, contents.target
    if step is None:
        return ["It computes in float32 on any processor."]
    bits = f"Bits: {step.get('weight_bits')} of weights, {step.get('activation_bits')} of activations."
    return [f"Target: `{target}`, {_TARGETS.get(target, 'unknown to this version of qface')}.", bits]


def _origin(contents: ExportedFile) -> list[str]:
    made = [] if contents.steps else ["Exported as it was loaded."]
    digest = (contents.quantized or {}).get("source_sha256")
    return [*made, f"SHA-256 of the source network's values: `{digest}`."] if digest else made


def _figures(contents: ExportedFile, figures: Sequence[str]) -> list[str]:
    thresholds = [] if contents.thresholds is None else [f"Thresholds: {contents.thresholds}."]
    known = [*figures, *thresholds]
    return known or [
        "None were measured with this file. `qface evaluate` measures them, and `qface thresholds --write` writes "
        "thresholds into the file: take faces like those that the device will see."
    ]


def _code(contents: ExportedFile) -> list[str]:
    """Python that embeds two aligned faces with onnxruntime alone, in ten lines or few more."""
    providers = ["CPUExecutionProvider"]
    if contents.target == "cuda":
        providers.insert(0, "CUDAExecutionProvider")
    exact = contents.metadata.get(WEIGHT_BITS) == "8"
    options = [
        "options = ort.SessionOptions()",
        'options.add_session_config_entry("session.x64quantprecision", "1")  # else x86 without VNNI is not exact',
    ]
    return [
        "import numpy as np",
        "import onnxruntime as ort",
        "from PIL import Image",
        "",
        *(options if exact else []),
        f"session = ort.InferenceSession({json.dumps(contents.name)}, {'options' if exact else 'None'}, "
        f"providers={json.dumps(providers)})",
        "",
        "def embed(path):",
        f'    face = Image.open(path).convert("RGB"){_cropped(contents.preprocessing)}  # aligned to 112x112 pixels',
        f"    pixels = {_pixels(contents)}",
        '    (embedding,) = session.run(["embedding"], {"images": pixels.transpose(2, 0, 1)[None]})',
        "    return embedding[0]" + ("" if contents.has_unit_length else " / np.linalg.norm(embedding[0])"),
        "",
        'print(embed("one.png") @ embed("another.png"))  # the cosine',
    ]


def _cropped(preprocessing: Preprocessing) -> str:
    top, left, bottom, right = preprocessing.crop
    whole = preprocessing.crop == (0, 0, CROP_SIZE, CROP_SIZE)
    height, width = preprocessing.size
    resized = (bottom - top, right - left) != preprocessing.size
    crop = "" if whole else f".crop(({left}, {top}, {right}, {bottom}))"
    return crop + (f".resize(({width}, {height}), Image.BILINEAR)" if resized else "")


def _pixels(contents: ExportedFile) -> str:
    if contents.reads_bytes:
        return "np.asarray(face)"
    order = "[:, :, ::-1]" if contents.preprocessing.color == "BGR" else ""
    mean, std = (f"np.float32({list(values)})" for values in (contents.preprocessing.mean, contents.preprocessing.std))
    return f"(np.asarray(face){order} - {mean}) / {std}"


def _agreement(contents: ExportedFile) -> list[str]:
    golden = contents.golden
    demand = "must be the same, bit for bit" if golden.tolerance == EQUAL else f"need a cosine of {golden.tolerance}"
    return [
        "When the file was written, it was compared with the network that it is made of, on "
        f"{contents.metadata['verified']}.",
        f"`qface selftest {contents.name}` tells on any machine, from the file alone, whether the runtime computes "
        f"what was trained: the embeddings of {golden.images} test images {demand}.",
    ]


_RESPONSIBLE_USE = [
    "A face embedding is biometric data: it identifies a person, who cannot change it. In many places you need that "
    "person's consent, or a law that allows it.",
    "A threshold has its false-positive rate on the people that it was measured on, and another one on others. Measure "
    "on faces like those that the device will see, and let a person decide where a wrong match does harm.",
    'The page "Responsible use" of qface\'s documentation (`docs/responsible_use.md`) says more.',
]
