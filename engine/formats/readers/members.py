"""Adapters in directories below that of the adapter that they are parts of."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molehill.engine.adapter.errors import AdapterError, ConfigError, UnsupportedError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


def is_below(name: Any, levels: int = 1) -> bool:
    """Whether it can be the path of a directory at most so many levels below."""
    parts = name.split("/") if isinstance(name, str) else [""]
    return len(parts) <= levels and all(
        _NAME.fullmatch(part) and part not in (".", "..") for part in parts
    )


def check_directory(parent: Path, name: Any, where: str, levels: int = 1) -> None:
    """Raises ConfigError, UnsupportedError unless `name` is the path of a directory at most so many
    levels below."""
    if not is_below(name, levels):
        expected = "a directory beside this file, by letters, digits, `.`, `_` and `-`"
        raise UnsupportedError(where, ascii(name)[:80], expected)
    path = parent
    for part in name.split("/"):
        path /= part
        if path.is_symlink():
            raise UnsupportedError(where, f"{name}, a link", "a directory")
    if not path.is_dir():
        expected = "a directory beside this file"
        raise ConfigError(where, f"{name}, no directory", expected)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Errors inside say which adapter they are about."""
    try:
        yield
    except AdapterError as error:
        raise type(error)(f"{name}/{error.where}", error.found, error.expected) from None
