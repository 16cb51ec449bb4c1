import pytest

from qface.checks import check_whole
from qface.errors import ConfigError


def test_whole_numbers_from_the_least_on_pass() -> None:
    check_whole(1, steps=1, images=10**6)


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", True, None, float("nan")])
def test_all_else_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match="steps must be an integer >= 1, got "):
        check_whole(1, images=2, steps=value)
