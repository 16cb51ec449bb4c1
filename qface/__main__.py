"""``python -m qface``, and the commands ``qface`` and ``qface-export``."""

from qface.signals import ended_by_signals

__all__ = ["export", "main"]


def main() -> None:
    """Run the command ``qface``."""
    with ended_by_signals():
        from qface.cli import main as command

        command(prog_name="qface")


def export() -> None:
    """Run the command ``qface-export``."""
    with ended_by_signals():
        from qface.cli import export_alias

        export_alias(prog_name="qface-export")


if __name__ == "__main__":
    main()
