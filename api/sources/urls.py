"""Which URLs adapters may be fetched from."""

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

URL_SCHEMES = ("https", "http", "s3", "gs")


def allowed(url: str, prefixes: Sequence[str]) -> bool:
    """Whether a URL lies below a prefix, however it is written. No `..`, no escapes, no query, no
    user: what is compared is what is asked for."""
    if re.fullmatch(r"[a-z0-9]+://[\w.:-]+(/[\w.@+=-]+)*/?", url, re.ASCII) is None:
        return False
    parts = urlsplit(url)
    steps = [step for step in parts.path.split("/") if set(step) == {"."}]
    if parts.scheme not in URL_SCHEMES or steps:
        return False
    return any(
        url.startswith(prefix if prefix.endswith("/") else f"{prefix}/") for prefix in prefixes
    )
