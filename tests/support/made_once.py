"""What several of pytest-xdist's processes need, and one of them makes."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from filelock import FileLock

Made = TypeVar("Made")


def shared_folder(factory: pytest.TempPathFactory) -> Path | None:
    """Of all processes that run these tests; None where there is one."""
    return factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else None


def made_once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[pytest.TempPathFactory], Made]
) -> Made:
    """What `make` returned in the first process that came here, unpickled in all others.

    Its files must stay where they are made, and nobody may change them."""
    folder = shared_folder(factory)
    if folder is None:
        return make(factory)
    path = folder / f"{name}.pickle"
    with FileLock(f"{path}.lock"):
        if path.exists():
            made: Made = pickle.loads(path.read_bytes())
            return made
        made = make(factory)
        path.write_bytes(pickle.dumps(made))
        return made
