"""Tensors saved by `torch.save`, from a file that may mean harm.

`torch.load(weights_only=True)` runs no code of the file's own. But some of what it does run takes
memory or time without end: `bytearray(2**40)` is a few bytes long. So the pickle is looked through
first, and nothing is loaded that says more than names and dense tensors need. Not by a scanner of
pickles: those judge what code a file names, not what the harmless opcodes take.
"""

import io
import pickletools
import re
import zipfile
from typing import Any

import torch
from torch import Tensor

from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import CorruptFileError, LimitError
from molehill.engine.system.out_of_memory import raise_if_out_of_memory

# Names of tensors and their shapes; a mixture-of-experts model has some ten thousand.
_PICKLE_BYTES = 64 << 20

# What torch.save writes for a dict of dense tensors and parameters: modules and names.
_GLOBALS = re.compile(
    r"collections OrderedDict"
    r"|torch [A-Za-z0-9]+Storage"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)"
)
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_GETS = ("GET", "BINGET", "LONG_BINGET")


def load(file: str, data: bytes, limits: Limits) -> dict[str, Tensor]:
    """The dict of tensors in `data`; `file` is its name in errors.

    Raises CorruptFileError, LimitError, MemoryError.
    """
    _check_pickle(file, _pickle(file, data, limits))
    try:
        values: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise_if_out_of_memory(error)
        first = str(error).strip().split("\n", 1)[0]
        raise CorruptFileError(file, first, "tensors saved by torch.save") from None
    if not isinstance(values, dict):
        raise CorruptFileError(file, type(values).__name__, "a dict of tensors")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            found = f"{type(name).__name__} to {type(value).__name__}"
            raise CorruptFileError(f"{file}: {str(name)[:80]}", found, "a name to a tensor")
    return values


def _pickle(file: str, data: bytes, limits: Limits) -> bytes:
    """The archive's only pickle. A compressed record could be far larger than the file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
            unpacked = sum(record.file_size for record in records)
            if unpacked > limits.adapter_bytes:
                expected = f"at most {limits.adapter_bytes}"
                raise LimitError(file, f"{unpacked} bytes unpacked", expected)
            pickles = [record for record in records if record.filename.endswith(".pkl")]
            packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
            if len(pickles) != 1 or packed:
                found = f"{len(pickles)} pickles{', compressed' if packed else ''}"
                raise CorruptFileError(file, found, "an archive of torch.save, with one")
            if pickles[0].file_size > _PICKLE_BYTES:
                found = f"a pickle of {pickles[0].file_size} bytes"
                raise LimitError(file, found, f"at most {_PICKLE_BYTES}")
            return archive.read(pickles[0])
    except (LimitError, CorruptFileError):
        raise
    except Exception as error:
        raise_if_out_of_memory(error)
        raise CorruptFileError(file, error, "a zip archive of torch.save") from None


def _check_pickle(file: str, data: bytes) -> None:
    """Raises CorruptFileError for a global that no dense tensor needs, and for a tuple that is used
    again: to hash nested ones takes twice as long for each level."""
    tuples: set[Any] = set()
    top = ""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument)):
                found = f"a pickled {str(argument)[:80].replace(' ', '.')}"
                raise CorruptFileError(file, found, "dense tensors by name")
            if opcode.name in _GETS and argument in tuples:
                raise CorruptFileError(file, "a tuple used twice", "dense tensors by name")
            if opcode.name in _PUTS and top in _TUPLES:
                tuples.add(argument)
            elif opcode.name not in (*_PUTS, "PROTO"):
                top = opcode.name
    except CorruptFileError:
        raise
    except Exception as error:
        raise CorruptFileError(file, error, "a pickle of torch.save") from None
