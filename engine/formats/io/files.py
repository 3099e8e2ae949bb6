"""The files of an adapter directory: a JSON config and a file of tensors.

Each file is read once, whole and within a bound, so that what was checked is what is used. Pickles
go through `torch.load(weights_only=True)` only.
"""

import io
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import safetensors.torch
import torch
from torch import Tensor

from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import (
    AdapterNotFoundError,
    ConfigError,
    CorruptFileError,
    LimitError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.adapter.validation import is_finite
from molehill.engine.formats.io import nearby, pickles, shards
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.shards import INDEX
from molehill.engine.system.out_of_memory import raise_if_out_of_memory

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

_CONFIG_BYTES = 16 << 20
_CHUNK = 1 << 20
_NAME_CHARACTERS = 512
_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_UNGATHERED = (
    "{} dimensions, none of them empty. A LoRA tensor that is empty or flat is what one process of "
    "DeepSpeed ZeRO-3 or FSDP holds of it: the trainer saved without gathering the others' parts. "
    "Save again with `stage3_gather_16bit_weights_on_model_save` (ZeRO-3) or "
    "`fsdp_state_dict_type: FULL_STATE_DICT` (FSDP), or gather a checkpoint of all processes with "
    "`zero_to_fp32.py` or `accelerate merge-weights`"
)


@dataclass(frozen=True)
class Weights:
    """The tensors of one file by name: finite, dense, on the CPU, float32.

    spellings: the file's names, of those that go by others here. notes: warnings of how it is read.
    """

    file: str
    tensors: Mapping[str, Tensor]
    spellings: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def where(self, name: str) -> str:
        return f"{self.file}: {self.spellings.get(name, name)}"

    def tensor(self, name: str, dimensions: int) -> Tensor:
        """Raises MissingTensorError, ShapeError."""
        if name not in self.tensors:
            raise MissingTensorError(self.where(name), "no such tensor", "one")
        tensor = self.tensors[name]
        if tensor.ndim != dimensions or 0 in tensor.shape:
            expected = f"{dimensions} dimensions, none of them empty"
            if "lora_" in name and (tensor.ndim < dimensions or 0 in tensor.shape):
                expected = _UNGATHERED.format(dimensions)
            raise ShapeError(self.where(name), list(tensor.shape), expected)
        return tensor


def read_config(directory: Path, name: str = CONFIG) -> Fields:
    """The JSON object in `directory / name`. Raises ConfigError, LimitError."""
    try:
        values = json.loads(_read(directory / name, _CONFIG_BYTES))
    except FileNotFoundError:
        raise ConfigError(name, "no such file", "a JSON object") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, LimitError | CorruptFileError):
            raise
        raise ConfigError(name, f"malformed JSON ({error})", "a JSON object") from None
    if not isinstance(values, dict):
        raise ConfigError(name, type(values).__name__, "a JSON object")
    return Fields(name, values)


def read_text(directory: Path, name: str, limit: int) -> str:
    """A text file. limit: in bytes. Raises CorruptFileError, LimitError."""
    try:
        return _read(directory / name, limit).decode()
    except FileNotFoundError:
        raise CorruptFileError(name, "no such file", "a text file") from None
    except UnicodeDecodeError as error:
        raise CorruptFileError(name, error, "a text file in UTF-8") from None


def read_weights(
    directory: Path, limits: Limits, names: Sequence[str] = (SAFETENSORS, INDEX, PICKLE)
) -> Weights:
    """The weights of an adapter: the first of these files that there is, by default PEFT's.

    INDEX names files that hold them together.

    Raises CorruptFileError, LimitError, MissingTensorError, NonFiniteError, UnsupportedError.
    """
    for name in names:
        if not (directory / name).exists():
            continue
        if name == INDEX:
            return _read_shards(directory, limits)
        return read_tensors(directory / name, limits)
    expected = " or ".join(names) + nearby.hint(directory, names)
    raise MissingTensorError(directory.name, "no weights", expected)


def _read_shards(directory: Path, limits: Limits) -> Weights:
    index = shards.parse(read_config(directory, INDEX))
    tensors: dict[str, Tensor] = {}
    left = limits.adapter_bytes
    for file in index.files:
        if not (directory / file).exists():
            raise MissingTensorError(file, "no such file", f"one, as {INDEX} names it")
        shard = read_tensors(directory / file, replace(limits, adapter_bytes=left)).tensors
        left -= sum(tensor.nbytes for tensor in shard.values())
        listed = {name for name, listed_file in index.weight_map.items() if listed_file == file}
        if shard.keys() != listed:
            name = min(shard.keys() ^ listed)
            where, what = f"{file}: {name[:_NAME_CHARACTERS]}", "a tensor that the index"
            if name in shard:
                raise CorruptFileError(where, f"{what} does not have there", f"those of {INDEX}")
            raise MissingTensorError(where, f"no such tensor, {what} has there", "it")
        tensors |= shard
    return Weights(INDEX, tensors)


def read_start(path: Path, most: int) -> bytes:
    """The first bytes of a file that may be there; none of one that cannot be read."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            return file.read(most) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
    except OSError:
        return b""


def read_tensors(path: Path, limits: Limits) -> Weights:
    """Every tensor of one file. Raises as `read_weights` does."""
    load = _load_safetensors if path.suffix == ".safetensors" else _load_pickle
    tensors = load(path, limits)
    _check_size(path.name, tensors, limits)
    return Weights(path.name, {name: _float32(path.name, name, t) for name, t in tensors.items()})


def read_floats(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file of ours, as views of one buffer: float32, not checked.

    Few calls read it, without the interpreter's lock. Raises CorruptFileError for a file that is
    shorter than it says, OSError, and whatever else a damaged file leads to.
    """
    data = _read_whole(path)
    start = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
    _check_length(path, len(data), start)
    header = json.loads(data[8:start].numpy().tobytes())
    places = {name: header[name]["data_offsets"] for name in header.keys() - {"__metadata__"}}
    last = max((end for _, end in places.values()), default=0)
    _check_length(path, len(data), start + last)
    floats = data[start:].view(torch.float32)
    return {
        name: floats[begin // 4 : end // 4].view(header[name]["shape"])
        for name, (begin, end) in places.items()
    }


def _read_whole(path: Path) -> Tensor:
    """uint8 `[bytes]`. One call reads at most 2 GiB, and may read less than it was asked for."""
    data = torch.empty(path.stat().st_size, dtype=torch.uint8)
    buffer, read = data.numpy().data, 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer[read:]):
            read += count
    _check_length(path, read, len(data))
    return data


def _check_length(path: Path, size: int, expected: int) -> None:
    if size < expected:
        raise CorruptFileError(path.name, f"{size} bytes", f"at least {expected}")


def _read(path: Path, limit: int) -> bytes:
    data = io.BytesIO()
    _copy(path, data, limit)
    return data.getvalue()


def _copy(path: Path, target: IO[bytes], limit: int) -> None:
    """An OSError of `target` is not about the adapter, and stays one."""
    with _reading(path):
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CorruptFileError(path.name, "something else", "a regular file")
        size, copied = status.st_size, 0
        while max(size, copied) <= limit:
            with _reading(path):
                chunk = file.read(_CHUNK)
            if not chunk:
                return
            copied += len(chunk)
            target.write(chunk)
    raise LimitError(path.name, f"{max(size, copied)} bytes", f"at most {limit} bytes")


def _without_waiting(path: str, flags: int) -> int:
    """Opening a pipe would wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise_if_out_of_memory(error)
        raise CorruptFileError(path.name, error.strerror or error, "a readable file") from None


def _load_safetensors(path: Path, limits: Limits) -> dict[str, Tensor]:
    """From a private copy, mapped into memory: nobody can change it any more, and other threads go
    on, which parsing bytes would hold up for as long as it takes to copy them."""
    with tempfile.NamedTemporaryFile(prefix="molehill-") as copy:
        _copy(path, copy, limits.adapter_bytes)
        copy.flush()
        try:
            return safetensors.torch.load_file(copy.name)
        except Exception as error:
            raise_if_out_of_memory(error)
            raise CorruptFileError(path.name, error, "a complete safetensors file") from None


def _load_pickle(path: Path, limits: Limits) -> dict[str, Tensor]:
    if not limits.pickles:
        expected = f"{SAFETENSORS}, for pickles are not taken here; `molehill convert` writes it"
        raise UnsupportedError(path.name, "a pickle", expected)
    return pickles.load(path.name, _read(path, limits.adapter_bytes), limits)


def _check_size(file: str, tensors: Mapping[str, Tensor], limits: Limits) -> None:
    """A pickled tensor's strides may repeat few bytes many times: count elements, not bytes."""
    if not tensors:
        raise MissingTensorError(file, "no tensors", "an adapter's")
    total = 4 * sum(tensor.numel() for tensor in tensors.values())
    if total > limits.adapter_bytes:
        expected = f"at most {limits.adapter_bytes} bytes"
        raise LimitError(file, f"{total} bytes in float32", expected)


def _float32(file: str, name: str, tensor: Tensor) -> Tensor:
    where = f"{file}: {name[:_NAME_CHARACTERS]}"
    if len(name) > _NAME_CHARACTERS:
        raise CorruptFileError(where, f"a name of {len(name)} characters", f"{_NAME_CHARACTERS}")
    if tensor.dtype not in _DTYPES:
        expected = ", ".join(str(dtype) for dtype in _DTYPES)
        raise UnsupportedError(where, tensor.dtype, f"one of {expected}")
    converted = tensor.detach().to(torch.float32).contiguous()
    if not is_finite(converted):
        bad = int((~torch.isfinite(converted)).sum())
        raise NonFiniteError(where, f"{bad} of {converted.numel()} values NaN or Inf", "finite")
    return converted


def check_directory(path: Path) -> None:
    """Raises AdapterNotFoundError."""
    if not path.exists():
        raise AdapterNotFoundError(path, "nothing", "an adapter directory")
    if not path.is_dir():
        raise AdapterNotFoundError(path, "a file", "an adapter directory")
