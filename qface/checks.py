"""Settings that users give, held against what they may be."""

from __future__ import annotations

from qface.errors import ConfigError

__all__ = ["check_seed", "check_whole"]

_SEEDS = 2**63


def check_whole(least: int, **settings: object) -> None:
    """Make sure that every setting is a whole number, ``least`` or greater.

    Raises:
        ConfigError: one is not; it is named.
    """
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} is a whole number from {least} on, not {value!r}")


def check_seed(seed: object) -> None:
    """Make sure that ``seed`` is one that torch and numpy take.

    Raises:
        ConfigError: it is not.
    """
    check_whole(0, seed=seed)
    if isinstance(seed, int) and seed >= _SEEDS:
        raise ConfigError(f"seed is a whole number below 2^63, not {seed}")
