"""Face images, their identities, and verification pairs."""

from qface.data.alignment import ARCFACE_LANDMARKS, similarity_transform
from qface.data.cfp import CfpSplit
from qface.data.crops import AlignmentReport, align
from qface.data.detector_files import load_detector
from qface.data.folders import ImageFolder
from qface.data.identities import select_identities
from qface.data.images import Images, ImageSource, IndexedImages, LoaderImages, TensorImages, normalize
from qface.data.landmarks import FaceLandmarks, read_landmarks
from qface.data.pairs import PairedImages, PairList, ResolvedPairs, read_lfw_pairs, read_pairs, resolve_pairs
from qface.data.records import RecordImages
from qface.data.relabeled import Relabeled
from qface.data.sources import as_image_source
from qface.data.subset import Subset, nested_subset
from qface.data.template_galleries import TemplateGalleries, read_galleries
from qface.data.templates import LooseCrops, TemplateSet, read_templates
from qface.data.verification_bin import VerificationBin

__all__ = [
    "ARCFACE_LANDMARKS",
    "AlignmentReport",
    "CfpSplit",
    "FaceLandmarks",
    "ImageFolder",
    "ImageSource",
    "Images",
    "IndexedImages",
    "LoaderImages",
    "LooseCrops",
    "PairList",
    "PairedImages",
    "RecordImages",
    "Relabeled",
    "ResolvedPairs",
    "Subset",
    "TemplateGalleries",
    "TemplateSet",
    "TensorImages",
    "VerificationBin",
    "align",
    "as_image_source",
    "load_detector",
    "nested_subset",
    "normalize",
    "read_galleries",
    "read_landmarks",
    "read_lfw_pairs",
    "read_pairs",
    "read_templates",
    "resolve_pairs",
    "select_identities",
    "similarity_transform",
]
