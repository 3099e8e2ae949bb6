"""What several of pytest-xdist's processes need, and one of them makes."""

import os
import pickle
from collections.abc import Callable
from typing import TypeVar

import pytest
from filelock import FileLock

Made = TypeVar("Made")


def made_once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[pytest.TempPathFactory], Made]
) -> Made:
    """What `make` returned in the first process that came here, unpickled in all others.

    Its files must stay where they are made, and nobody may change them."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make(factory)
    path = folder.parent / f"{name}.pickle"
    with FileLock(f"{path}.lock"):
        if path.exists():
            made: Made = pickle.loads(path.read_bytes())
            return made
        made = make(factory)
        path.write_bytes(pickle.dumps(made))
        return made
