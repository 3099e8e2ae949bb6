"""Adapters in directories right below that of the adapter that they are parts of."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molehill.engine.adapter.errors import AdapterError, ConfigError, UnsupportedError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


def check_directory(parent: Path, name: Any, where: str) -> None:
    """Raises ConfigError, UnsupportedError unless `name` is that of a directory right below."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (".", ".."):
        expected = "a directory beside this file, by letters, digits, `.`, `_` and `-`"
        raise UnsupportedError(where, ascii(name)[:80], expected)
    if (parent / name).is_symlink():
        raise UnsupportedError(where, f"{name}, a link", "a directory")
    if not (parent / name).is_dir():
        expected = "a directory beside this file"
        raise ConfigError(where, f"{name}, no directory", expected)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Errors inside say which adapter they are about."""
    try:
        yield
    except AdapterError as error:
        raise type(error)(f"{name}/{error.where}", error.found, error.expected) from None
