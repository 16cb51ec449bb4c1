"""The import of onnxruntime, which several packages provide."""

from __future__ import annotations

import functools
import logging
from importlib import import_module, metadata
from typing import Any

from qface.errors import DependencyError, one_line

__all__ = ["import_onnxruntime"]

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
_LOGGER = logging.getLogger("qface")


def import_onnxruntime() -> Any:
    """Import onnxruntime, and warn once if two packages provide it.

    It is imported at the first use because the import takes half a second, and by name because it has no types.

    Raises:
        DependencyError: onnxruntime is not installed, or cannot be imported.
    """
    try:
        runtime = import_module("onnxruntime")
        runtime.InferenceSession  # noqa: B018  # missing after one of two packages was uninstalled
    except (ImportError, AttributeError) as error:
        raise DependencyError(
            f"onnxruntime is missing or broken ({one_line(error)}): pip install --force-reinstall onnxruntime "
            "(or onnxruntime-gpu), and only one of the two, since they share their files"
        ) from error
    _warn_of_two_packages()
    return runtime


@functools.cache  # one warning per process
def _warn_of_two_packages() -> None:
    installed = [name for name in _PACKAGES if _is_installed(name)]
    if len(installed) > 1:
        _LOGGER.warning(
            "%s are installed together and overwrite each other's files: pip uninstall %s, then install one of them",
            " and ".join(installed),
            " ".join(installed),
        )


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True
