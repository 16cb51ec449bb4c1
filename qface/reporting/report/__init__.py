"""Report on one compression: measurement (``measure``), plain values (``data``) and HTML page (``page``)."""
