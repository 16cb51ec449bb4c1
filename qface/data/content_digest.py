"""Digest of the images of a run, to resume it only with the same images."""

from __future__ import annotations

import hashlib

from qface.data.images import ImageSource, IndexedImages, LoaderImages, bytes_of, length_of

__all__ = ["digest_of_images"]


def digest_of_images(source: ImageSource) -> str:
    """Return a digest of the images and labels of ``source``.

    For a loader, it covers only the number of batches, the batch size and the number of images.
    """
    if isinstance(source, IndexedImages):
        labels = b"" if source.labels is None else bytes_of(source.labels)
        digest = hashlib.sha256(hashlib.sha256(labels).digest())
        for index in range(len(source)):
            digest.update(hashlib.sha256(source.content(index)).digest())
        return f"{len(source)} images, {digest.hexdigest()[:16]}"
    loader = source.loader if isinstance(source, LoaderImages) else ()
    images, size = length_of(getattr(loader, "dataset", ())), getattr(loader, "batch_size", None)
    return f"a loader of {length_of(loader)} batches of {size}, of {images} images"
