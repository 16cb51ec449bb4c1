"""Printed figures of Ef-QuantFace's tables 1 to 5, and remarks on contradictions in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["FLOAT", "SETS", "TABLES", "Kind", "Method", "PaperTable", "Row"]

Kind = Literal["float", "ours", "pruned", "quantface", "published", "distilled"]

SETS = {
    "lfw": "LFW",
    "calfw": "CALFW",
    "sllfw": "SLLFW",
    "cplfw": "CPLFW",
    "ijbc-1e-5": "IJB-C 1e-5",
    "ijbc-1e-4": "IJB-C 1e-4",
}
"""The paper's columns: accuracy in percent of four sets of pairs, and TPR at two FPRs."""


@dataclass(frozen=True)
class Method:
    """Method that makes the model of a row.

    Args:
        kind: ``"float"``, the unchanged network; ``"ours"``, quantized and distilled with the --recipe; ``"pruned"``,
            20 % of the channels removed, then distilled; ``"quantface"``, QuantFace's quantization and training;
            ``"published"``, a checkpoint published by QuantFace; ``"distilled"``, a randomly initialized network
            distilled from a larger one.
        bits: bits of weights and activations, if quantized.
        share: fraction of the images used.
        labeled: True to train with identity labels.
        class_head: True to train a class head with the student.
    """

    kind: Kind
    bits: int | None = None
    share: float = 1.0
    labeled: bool = True
    class_head: bool = False

    @property
    def name(self) -> str:
        """Name for tables and file names."""
        words = [self.kind, f"w{self.bits}a{self.bits}" if self.bits else ""]
        words += ["" if self.share == 1 else f"{self.share:.0%} of images", "" if self.labeled else "unlabeled"]
        return " ".join([word for word in (*words, "class head" if self.class_head else "") if word])


@dataclass(frozen=True)
class Row:
    """One row as printed.

    Args:
        network: the paper's name of the network.
        label: the paper's name of the model.
        method: the corresponding method.
        printed: figures in percent, by the keys of :data:`SETS`.
        mb: printed MB.
        images: printed number of images, in millions.
        remark: error in the printed row, if any.
    """

    network: str
    label: str
    method: Method
    printed: dict[str, float] = field(default_factory=dict)
    mb: float | None = None
    images: float | None = None
    remark: str = ""


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Args:
        number: number of the table.
        title: title of the table.
        rows: rows as printed.
        remarks: errors in the whole table.
        teacher_of: teacher network by name of a distilled network.
    """

    number: int
    title: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...] = ()
    teacher_of: dict[str, str] = field(default_factory=dict)

    def methods(self) -> list[Method]:
        """Return the distinct methods, in order."""
        return list(dict.fromkeys(row.method for row in self.rows))


def _figures(*values: float | None) -> dict[str, float]:
    """Return figures by column; None stands for a dash in the paper."""
    return {name: value for name, value in zip(SETS, values, strict=True) if value is not None}


def _ijbc(low: float | None, high: float) -> dict[str, float]:
    return _figures(None, None, None, None, low, high)


FLOAT = Method("float")
"""The unchanged network."""
_W6, _W8 = Method("ours", 6), Method("ours", 8)
_REAL6, _REAL8 = Method("quantface", 6), Method("quantface", 8)
_SYNTHETIC6, _SYNTHETIC8 = Method("quantface", 6, labeled=False), Method("quantface", 8, labeled=False)
_PRUNED = Method("pruned")

_TEACHERS = (
    "The teachers of the paper's own rows are InsightFace's Glint360K-CosFace networks, QuantFace's are MS1MV2's: "
    "absolute figures do not compare, losses against each one's teacher do."
)
_LFW_TWICE = "The paper trains and tests on LFW."
_IJBB = "this is QuantFace's IJB-B figure; its IJB-C figure is {}"
_NOT_PRINTED: tuple[tuple[Kind, str], ...] = (("ours", "Ours"), ("published", "QuantFace's file"))
_MEBIBYTES = "MB are MiB; R18's and R50's are decimal"
_FORMULA = "MB of low-bit models are float MB x bits / 32, a formula; files were not written."

TABLES = {
    1: PaperTable(
        1,
        "Quantized and pruned networks",
        (
            Row("R18", "teacher", FLOAT, _figures(99.88, 95.75, 99.53, 90.80, 93.16, 95.33), 96.22, 17.091),
            Row("R18", "RealQuantFace", _REAL6, _figures(99.52, 95.58, None, 88.37, None, 93.03), 18.10, 5.811),
            Row(
                "R18",
                "SynQuantFace",
                _SYNTHETIC6,
                _figures(99.55, 95.32, None, 89.05, None, 90.38),
                18.10,
                0.500,
                _IJBB.format("92.36"),
            ),
            Row("R18", "Ours (w6a6)", _W6, _figures(99.86, 95.31, 99.45, 89.85, 90.46, 93.79), 18.10, 0.013),
            Row(
                "R18",
                "Ours, pruned",
                _PRUNED,
                _figures(99.11, 91.94, 80.73, 80.63, 54.19, 76.66),
                61.39,
                0.013,
                "MB belong to a model with the embedding cut to 409 too",
            ),
            Row(
                "R34",
                "teacher",
                FLOAT,
                _figures(99.95, 96.00, 99.76, 93.33, 95.16, 96.56),
                130.44,
                17.091,
                _MEBIBYTES,
            ),
            Row(
                "R34",
                "Ours (w6a6)",
                _W6,
                _figures(99.95, 95.96, 99.69, 92.35, 93.81, 95.56),
                24.45,
                0.013,
                _MEBIBYTES,
            ),
            Row(
                "R34",
                "Ours, pruned",
                _PRUNED,
                _figures(99.58, 93.40, 84.43, 83.65, 81.05, 89.11),
                87.22,
                0.013,
                "MB belong to a model with the embedding cut to 409 too",
            ),
            Row("R50", "teacher", FLOAT, _figures(99.95, 96.06, 99.76, 94.40, 95.61, 96.97), 174.68, 17.091),
            Row("R50", "RealQuantFace", _REAL6, _figures(99.70, 95.87, None, 92.08, None, 91.74), 32.77, 5.811),
            Row("R50", "SynQuantFace", _SYNTHETIC6, _figures(99.68, 95.70, None, 90.38, None, 90.72), 32.77, 0.500),
            Row("R50", "Ours (w6a6)", _W6, _figures(99.95, 95.95, 99.69, 93.65, 94.13, 96.15), 32.77, 0.013),
            Row(
                "R50",
                "Ours, pruned",
                _PRUNED,
                _figures(99.73, 94.08, 86.98, 85.43, 83.24, 91.08),
                111.32,
                0.013,
                "MB belong to a model with the embedding cut to 409 too",
            ),
        ),
        (
            _TEACHERS,
            _LFW_TWICE,
            _FORMULA,
            'The text says "0.132M" images; 13,233 are 0.0132 M.',
            "What it calls accuracy on IJB-C is TPR at an FPR.",
        ),
    ),
    2: PaperTable(
        2,
        "QuantFace's method against ours, identical settings",
        (
            Row(
                "R34", "Ours (w8a8)", _W8, _figures(99.95, 95.93, 99.76, 93.23, 94.78, 96.38), 32.61, 0.013, _MEBIBYTES
            ),
            Row(
                "R34", "Ours (w6a6)", _W6, _figures(99.95, 95.96, 99.69, 92.35, 93.81, 95.56), 24.45, 0.013, _MEBIBYTES
            ),
            Row("R50", "RealQuantFace (w8a8)", _REAL8, _figures(99.78, 96.00, None, 92.17, None, 95.66), 43.67, 5.811),
            Row(
                "R50",
                "SynQuantFace (w8a8)",
                _SYNTHETIC8,
                _figures(99.78, 95.87, None, 92.08, None, 93.67),
                43.67,
                0.500,
                _IJBB.format("95.18"),
            ),
            Row("R50", "RealQuantFace (w6a6)", _REAL6, _figures(99.70, 95.87, None, 92.08, None, 91.74), 32.77, 5.811),
            Row(
                "R50",
                "SynQuantFace (w6a6)",
                _SYNTHETIC6,
                _figures(99.68, 95.70, None, 90.38, None, 90.72),
                32.77,
                0.500,
            ),
            Row("R100", "RealQuantFace (w8a8)", _REAL8, _figures(99.80, 96.05, None, 92.92, None, 96.38), 65.31, 5.811),
            Row(
                "R100",
                "SynQuantFace (w8a8)",
                _SYNTHETIC8,
                _figures(99.80, 96.02, None, 92.90, None, 96.09),
                65.31,
                0.500,
            ),
            Row("R100", "RealQuantFace (w6a6)", _REAL6, _figures(99.55, 95.42, None, 85.63, None, 85.80), 49.01, 5.811),
            Row(
                "R100",
                "SynQuantFace (w6a6)",
                _SYNTHETIC6,
                _figures(99.45, 95.58, None, 86.60, None, 87.00),
                49.01,
                0.500,
            ),
            *(
                Row(network, f"{label} (w{bits}a{bits})", Method(kind, bits))
                for network in ("R18", "R50", "R100")
                for bits in (8, 6)
                for kind, label in _NOT_PRINTED
            ),
        ),
        (
            _TEACHERS,
            '"7.32 MB smaller" is 8.32 by its own figures, and mixes MiB with MB.',
            "Here both methods see the same images; the paper sets 13,233 against 5.8 million.",
        ),
    ),
    3: PaperTable(
        3,
        "With and without the class head",
        (
            Row("R18", "Ours (w6a6)", _W6, _ijbc(90.46, 93.79), images=0.013),
            Row("R18", "with CE", Method("ours", 6, class_head=True), _ijbc(90.56, 93.81), images=0.013),
            Row("R34", "Ours (w6a6)", _W6, _ijbc(93.81, 95.56), images=0.013),
            Row("R34", "with CE", Method("ours", 6, class_head=True), _ijbc(92.91, 95.57), images=0.013),
            Row("R50", "Ours (w6a6)", _W6, _ijbc(94.13, 96.15), images=0.013),
            Row("R50", "with CE", Method("ours", 6, class_head=True), _ijbc(94.09, 96.06), images=0.013),
        ),
        ("The text swaps 1e-4 and 1e-5.",),
    ),
    4: PaperTable(
        4,
        "Part of the images",
        tuple(
            Row("R34", f"Ours (w6a6), {share:.0%}", Method("ours", 6, share=share), _figures(*values), images=images)
            for share, images, values in (
                (1.0, 0.013233, (99.95, 95.96, 99.69, 92.35, 93.81, 95.56)),
                (0.75, 0.009924, (99.95, 95.98, 99.68, 92.36, 92.37, 95.35)),
                (0.5, 0.006616, (99.95, 95.91, 99.73, 92.11, 93.02, 95.79)),
                (0.25, 0.003308, (99.93, 95.86, 99.70, 92.01, 91.91, 95.58)),
            )
        ),
        (_LFW_TWICE,),
    ),
    5: PaperTable(
        5,
        "Distillation into a smaller network beside quantization",
        (
            Row(
                "R50",
                "teacher of EKD",
                FLOAT,
                _ijbc(95.61, 92.66),
                174.68,
                5.811,
                "95.61 is InsightFace's network at 1e-5, 92.66 is EKD's own teacher",
            ),
            Row(
                "R18",
                "teacher of the quantized",
                FLOAT,
                _ijbc(93.16, 95.33),
                96.22,
                17.091,
                'it prints "96.22M" images, its MB',
            ),
            Row("R18", "EKD", Method("distilled", class_head=True), _ijbc(88.84, 92.74), 96.22, 5.811),
            Row("R18", "QuantFace (w6a6)", _REAL6, _ijbc(None, 93.03), 18.10, 5.811),
            Row("R18", "Ours (w6a6)", _W6, _ijbc(90.46, 93.79), 18.10, 0.013, 'it prints "0.132M" images'),
        ),
        (_TEACHERS,),
        {"R18": "R50", "mobilefacenet": "iresnet18"},
    ),
}
