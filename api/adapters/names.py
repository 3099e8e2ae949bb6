"""Which names an adapter may be served under."""

import re
from collections.abc import Collection

from molehill.api.adapters.errors import BadNameError

MAX_LENGTH = 128

# What comes below an adapter's own route, so that the name of another must not end like it.
ROUTES = ("pin", "routing")

# As in `organisation/model-8b:v2`. No path can be spelled with `..` or an outer or doubled slash.
PATTERN = re.compile(r"[\w.:@+-]+(/[\w.:@+-]+)*")


def check(name: str, base_models: Collection[str]) -> None:
    """Raises BadNameError unless `name` can stand for an adapter beside `base_models`."""
    shown = ascii(name[:MAX_LENGTH])
    if not name or len(name) > MAX_LENGTH:
        raise BadNameError(
            f"adapter name: found {len(name)} characters, expected between 1 and {MAX_LENGTH}"
        )
    if not PATTERN.fullmatch(name) or any(set(part) == {"."} for part in name.split("/")):
        raise BadNameError(
            f"adapter name: found {shown}, expected letters, digits and any of . _ : @ + -, "
            "in parts joined by single slashes"
        )
    parent, _, last = name.rpartition("/")
    if parent and last in ROUTES:
        raise BadNameError(f"adapter name: found {shown}, which is a route of adapter {parent!a}")
    if name in base_models:
        raise BadNameError(f"adapter name: found {shown}, which is the name of the base model")
