"""A report on one compression: measured (``measure``), kept as plain values (``data``), and drawn as a page."""
