"""``model_card``: a Markdown page that describes an exported file, its origin, and how to run it.

The front matter follows the model cards of the Hugging Face Hub. Except for the caller's figures, everything comes from
the file itself: equal files give equal cards.
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
    "cpu": "integer kernels, with the same result on every processor",
    "cuda": "fp16, for GPUs; activations are not quantized",
    "float32": "float32, fastest in browsers; activations are not quantized",
}


def model_card(file: str | Path, figures: Sequence[str] = ()) -> str:
    """Return a model card for an exported file, with the front matter of the Hugging Face Hub.

    License and source network are left to fill in, since the file does not contain them. The card is dated only if the
    environment variable ``SOURCE_DATE_EPOCH`` is set. Does not change ``file``.

    Args:
        file: an ONNX file written by :func:`qface.export`.
        figures: sentences with measured figures to add.

    Returns:
        The card as Markdown text.

    Raises:
        CheckpointError: the file is missing or damaged, or was not written by :func:`qface.export`.
        ConfigError: ``SOURCE_DATE_EPOCH`` is not a valid time.

    Example:
        >>> "SHA-256 of the source network's values" in qface.model_card("student.onnx")
        True
    """
    contents = ExportedFile.read(file)
    sections = {
        "File": _file(contents),
        "How it was made": [*steps_in_words(contents.steps), *_origin(contents)],
        "Data": data_in_words(contents.steps) or ["The file does not record which images were used."],
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
    """Return the path of the card of ``file``: the same path with the extension ``.md``."""
    return Path(file).with_suffix(".md")


def write_model_card(file: str | Path, figures: Sequence[str] = ()) -> Path:
    """Write the card of ``file`` to :func:`card_path`, replacing an existing one, and return the path.

    Args:
        file: as in :func:`model_card`.
        figures: as in :func:`model_card`.

    Raises:
        CheckpointError, ConfigError: as in :func:`model_card`.
        ExportError: the card cannot be written.
    """
    text = model_card(file, figures)
    with replacing(card_path(file)) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return card_path(file)


def _listed(sentences: Sequence[str]) -> list[str]:
    """Format sentences as list items, each on one line even if a name has line breaks."""
    return [f"- {' '.join(sentence.split())}" for sentence in sentences]


def _front_matter(contents: ExportedFile) -> list[str]:
    quantized = contents.quantized is not None
    return [
        "---",
        "license: # fill in: the license of the source network's weights, which also applies to this file",
        "library_name: qface",
        "base_model: # fill in: the source network as owner/name",
        *(["base_model_relation: quantized"] if quantized else []),
        "tags:",
        *(f"- {tag}" for tag in ("face-recognition", "onnx", *(["quantized"] if quantized else []))),
        "---",
    ]


def _introduction(contents: ExportedFile) -> list[str]:
    written = f"Written by qface {contents.metadata['qface']}"
    return [
        f"A face-recognition network that computes an embedding of {contents.dimensions} numbers from the image of a "
        "face. Two faces are compared by the cosine of their embeddings.",
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
            f"SOURCE_DATE_EPOCH must be the number of seconds since 1970, got {seconds!r}: correct or unset it"
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
        words.append(f"cropped to rows {top} to {bottom} and columns {left} to {right}")
    if (bottom - top, right - left) != preprocessing.size:
        words.append("resized")
    if contents.reads_bytes:
        return ", ".join([*words, "as RGB pixels, which the file normalizes itself"])
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    return ", ".join([*words, f"color order {preprocessing.color}, minus the mean ({mean}), divided by ({std})"])


def _precision(contents: ExportedFile) -> list[str]:
    step, target = contents.quantized, contents.target
    if step is None:
        return ["It computes in float32 on any processor."]
    bits = f"Bits: {step.get('weight_bits')} for weights, {step.get('activation_bits')} for activations."
    return [f"Target: `{target}`, {_TARGETS.get(target, 'unknown to this version of qface')}.", bits]


def _origin(contents: ExportedFile) -> list[str]:
    made = [] if contents.steps else ["Exported without changes after loading."]
    digest = (contents.quantized or {}).get("source_sha256")
    return [*made, f"SHA-256 of the source network's values: `{digest}`."] if digest else made


def _figures(contents: ExportedFile, figures: Sequence[str]) -> list[str]:
    thresholds = [] if contents.thresholds is None else [f"Thresholds: {contents.thresholds}."]
    known = [*figures, *thresholds]
    return known or [
        "None were measured with this file. `qface evaluate` measures them, and `qface thresholds --write` writes "
        "thresholds into the file: use faces like those that the device will see."
    ]


def _code(contents: ExportedFile) -> list[str]:
    """Return about ten lines of Python that compare two aligned faces with onnxruntime alone."""
    providers = ["CPUExecutionProvider"]
    if contents.target == "cuda":
        providers.insert(0, "CUDAExecutionProvider")
    exact = contents.metadata.get(WEIGHT_BITS) == "8"
    options = [
        "options = ort.SessionOptions()",
        'options.add_session_config_entry("session.x64quantprecision", "1")  # only without VNNI',
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
    demand = "must be bit-identical" if golden.tolerance == EQUAL else f"need a cosine >= {golden.tolerance}"
    return [
        f"At export, the file was compared with its source network on {contents.metadata['verified']}.",
        f"`qface selftest {contents.name}` checks on any machine, from the file alone, that the runtime computes the "
        f"same as the trained network: the embeddings of {golden.images} test images {demand}.",
    ]


_RESPONSIBLE_USE = [
    "A face embedding is biometric data: it identifies a person, who cannot change it. In many countries you need the "
    "person's consent, or a law that allows its use.",
    "The false-positive rate of a threshold holds for the people it was measured on; for others it may differ. Measure "
    "on faces like those that the device will see, and let a human decide where a wrong match does harm.",
    'See "Responsible use" in the documentation of qface (`docs/responsible_use.md`).',
]
