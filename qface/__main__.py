"""``python -m qface``."""

from qface.cli import main

main(prog_name="qface")
