"""How many examples a property is tried on."""

import os

LONG = os.environ.get("MOLEHILL_LONG_TESTS") == "1"


def examples(count: int) -> int:
    """`count`, and ten times as many where MOLEHILL_LONG_TESTS=1."""
    return 10 * count if LONG else count
