"""Install the other runtimes that the tests marked ``runtimes`` use.

    python -m tests.runtimes.setup [PART ...]

A part that is there already stays as it is; to renew it, delete its folder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tests.runtimes.parts import PARTS, PartError, install


def main(names: Sequence[str]) -> int:
    """Install the named parts, or all, and print a line for each."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"there is no part {unknown[0]}: choose from {', '.join(PARTS)}", file=sys.stderr)
        return 2
    for name in names or PARTS:
        start = time.perf_counter()
        try:
            install(name)
            print(f"{name}: ready after {time.perf_counter() - start:.0f} s", flush=True)
        except PartError as error:
            print(f"{name}: left out: {error}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
