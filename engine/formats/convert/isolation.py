"""Reads an adapter in a process that does nothing else.

Pickles are read with `weights_only=True` everywhere. Should that ever not be enough, whatever a
file does happens in a process that ends right away, and only JSON and safetensors come back.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molehill.engine.adapter.base_model import BaseModel, Limits, Moe
from molehill.engine.adapter.errors import AdapterError, CorruptFileError
from molehill.engine.adapter.layout import Layout
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import DEFAULT_LIMITS, native, read
from molehill.engine.formats.registry import pickle_files
from molehill.engine.system.out_of_memory import is_out_of_memory

_MODULE = "molehill.engine.formats.convert.isolation"
_ERRORS = {error.kind: error for error in AdapterError.__subclasses__()}
_NO_MEMORY = "out_of_memory"


def is_pickled(path: Path) -> bool:
    """Whether reading this directory may mean reading a pickle, here or up to two levels below."""
    places = (where for name in pickle_files() for where in (name, f"*/{name}", f"*/*/{name}"))
    return any(next(path.glob(place), None) for place in places)


def read_isolated(
    path: Path,
    limits: Limits = DEFAULT_LIMITS,
    lora_b_layout: Layout | None = None,
    base: BaseModel | None = None,
    base_is_residual: bool = False,
    task: int | None = None,
) -> Adapter:
    """What `formats.read` gives. Raises what it raises, MemoryError too; CorruptFileError if the
    process dies."""
    with tempfile.TemporaryDirectory(prefix="molehill-") as scratch:
        copy = Path(scratch) / "adapter"
        shapes = None if base is None else dataclasses.asdict(base)
        how = json.dumps(
            [dataclasses.asdict(limits), lora_b_layout, base_is_residual, task, shapes],
            default=list,
        )
        child = subprocess.run(
            [sys.executable, "-m", _MODULE, str(path.absolute()), str(copy)],
            input=how,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode == 0:
            return native.read(copy, limits)
    raise _error(path, child)


def _error(path: Path, child: subprocess.CompletedProcess[str]) -> AdapterError | MemoryError:
    try:
        kind, *details = json.loads(child.stdout)
        if kind == _NO_MEMORY:
            return MemoryError(*details)
        return _ERRORS[kind](*map(str, details))
    except (ValueError, KeyError, TypeError):
        last = (child.stderr.strip().splitlines() or ["nothing said"])[-1]
        found = f"a reader that ended with status {child.returncode} ({last})"
        return CorruptFileError(path, found, "a readable adapter")


def main(arguments: Sequence[str]) -> int:
    """Reads arguments[0] and writes it to arguments[1] in the native format; 1 and the error as
    JSON on stdout if it cannot be read. How it is read comes by stdin: a base has many linears."""
    source, target = arguments
    limits, lora_b_layout, base_is_residual, task, shapes = json.load(sys.stdin)
    base = None if shapes is None else _base(shapes)
    try:
        adapter = read(Path(source), Limits(**limits), lora_b_layout, base, base_is_residual, task)
        native.write(adapter, Path(target))
    except AdapterError as error:
        print(json.dumps([error.kind, error.where, error.found, error.expected]))
        return 1
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(json.dumps([_NO_MEMORY, str(error)]))
        return 1
    return 0


def _base(shapes: dict[str, Any]) -> BaseModel:
    linears = {name: (shape[0], shape[1]) for name, shape in shapes["linears"].items()}
    moes = {name: Moe(**sizes) for name, sizes in shapes["moes"].items()}
    vocabulary = {name: (shape[0], shape[1]) for name, shape in shapes["vocabulary"].items()}
    mappings = {"linears": linears, "moes": moes, "vocabulary": vocabulary}
    return BaseModel(**{**shapes, **mappings, "biased": frozenset(shapes["biased"])})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
