"""Readers of pickles that run nothing a pickle asks for, within the limits of :mod:`qface.limits`."""

from qface.pickles.arrays import PickledArray, read_pickle
from qface.pickles.check import check_pickle
from qface.pickles.modules import is_pickled_module, module_tensors, read_pickled_module
from qface.pickles.torch_files import UnknownTensor, read_torch_file

__all__ = [
    "PickledArray",
    "UnknownTensor",
    "check_pickle",
    "is_pickled_module",
    "module_tensors",
    "read_pickle",
    "read_pickled_module",
    "read_torch_file",
]
