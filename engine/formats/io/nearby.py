"""What lies in a directory that holds no adapter, for whoever named it to name another."""

from collections.abc import Collection
from itertools import islice
from pathlib import Path

_LOOKED_AT = 1000
_SHOWN = 5
_MODEL_CONFIG = "config.json"


def hint(directory: Path, files: Collection[str]) -> str:
    """Which directories right below have one of the files, or that this is a whole model, as the
    end of a sentence; empty if there is nothing to say."""
    nearby = [name for name in _directories(directory) if _has_one(directory / name, files)]
    if len(nearby) == 1:
        return f"; {nearby[0]} below it has one: name that directory"
    if nearby:
        more = f" and {len(nearby) - _SHOWN} more" if len(nearby) > _SHOWN else ""
        listed = ", ".join(nearby[-_SHOWN:])
        return f"; directories below it have one each: {listed}{more}. Name the one that is meant"
    if (directory / _MODEL_CONFIG).exists():
        return f"; there is a {_MODEL_CONFIG}, as of a whole model, which is served as a base"
    return ""


def _directories(directory: Path) -> list[str]:
    """`checkpoint-900` before `checkpoint-1000`."""
    entries = islice(directory.iterdir(), _LOOKED_AT)
    return sorted((entry.name for entry in entries if entry.is_dir()), key=lambda n: (len(n), n))


def _has_one(directory: Path, files: Collection[str]) -> bool:
    return any((directory / file).exists() for file in files)
