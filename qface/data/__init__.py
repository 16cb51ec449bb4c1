"""Face images, the people in them, and pairs to verify."""

from qface.data.folders import ImageFolder
from qface.data.images import (
    Images,
    ImageSource,
    IndexedImages,
    LoaderImages,
    TensorImages,
    as_image_source,
    normalise,
)
from qface.data.pairs import PairList, ResolvedPairs, read_lfw_pairs, read_pairs, resolve_pairs
from qface.data.people import select_people
from qface.data.records import RecordImages
from qface.data.relabelled import Relabelled
from qface.data.subset import Subset, nested_subset
from qface.data.verification_bin import VerificationBin

__all__ = [
    "ImageFolder",
    "ImageSource",
    "Images",
    "IndexedImages",
    "LoaderImages",
    "PairList",
    "RecordImages",
    "Relabelled",
    "ResolvedPairs",
    "Subset",
    "TensorImages",
    "VerificationBin",
    "as_image_source",
    "nested_subset",
    "normalise",
    "read_lfw_pairs",
    "read_pairs",
    "resolve_pairs",
    "select_people",
]
