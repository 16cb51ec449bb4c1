"""Report on one compression: ``measure`` its figures, keep them as ``data``, draw the ``page``."""
