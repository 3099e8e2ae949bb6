"""Every format that can be read, and the names of their files.

Whoever looks for adapters, fetches them or reads pickles apart asks here: a new format is one
reader, and one line in READERS.
"""

from collections.abc import Sequence
from pathlib import Path

from molehill.engine.adapter.errors import AdapterError
from molehill.engine.formats import native
from molehill.engine.formats.io import files
from molehill.engine.formats.io.shards import INDEX
from molehill.engine.formats.readers import (
    adalora,
    adamole,
    flylora,
    forks,
    goat,
    hra,
    ia3,
    ldmole,
    loha,
    lokr,
    miss,
    mixes,
    moelora,
    moepeft,
    mov,
    peft,
    vera,
    xlora,
    xlora_package,
)
from molehill.engine.formats.readers.reader import PEFT_FILES, Reader

_SAFETENSORS = ".safetensors"

# In the order in which they are asked. `peft` takes any LORA that the three before it do not know.
READERS: tuple[Reader, ...] = (
    mixes.READER,
    native.READER,
    ldmole.READER,
    forks.READER,
    flylora.READER,
    peft.READER,
    moepeft.READER,
    adamole.READER,
    goat.READER,
    moelora.READER,
    mov.READER,
    adalora.READER,
    vera.READER,
    loha.READER,
    lokr.READER,
    hra.READER,
    miss.READER,
    ia3.READER,
    xlora.READER,
    xlora_package.READER,
)


def config_files() -> tuple[str, ...]:
    """A directory without one of them is no adapter."""
    return tuple(dict.fromkeys(reader.files.config for reader in READERS))


def safetensors_files() -> tuple[tuple[str, str], ...]:
    """(config, tensors) of every format that has its tensors in one file of this kind."""
    pairs = [(reader.files.config, name) for reader in READERS for name in reader.files.weights]
    return tuple(dict.fromkeys(pair for pair in pairs if pair[1].endswith(_SAFETENSORS)))


def sharded_files() -> tuple[tuple[str, str], ...]:
    """(config, index) of every format whose tensors may be in several files that an index names."""
    configs = [reader.files.config for reader in READERS if INDEX in reader.files.weights]
    return tuple((config, INDEX) for config in dict.fromkeys(configs))


def pickle_files() -> tuple[str, ...]:
    names = [name for reader in READERS for name in reader.files.weights]
    return tuple(dict.fromkeys(filter(_is_pickle, names)))


def expands(directory: Path) -> bool:
    """Whether an adapter here may take many times the bytes of its files once it is read. False
    where the config cannot be read, which reading the adapter then says."""
    readers = of_directory(directory)
    try:
        kind = files.read_config(directory, readers[0].files.config).text("peft_type")
    except AdapterError:
        return False
    return any(reader.expands and kind in reader.peft_types for reader in readers)


def members(directory: Path) -> list[Sequence[str]]:
    """The adapters that lie below the one in a directory, whose config alone is read: of each the
    directories where it may be, the best first. Raises an AdapterError."""
    readers = of_directory(directory)
    config = files.read_config(directory, readers[0].files.config)
    kind = config.text("peft_type")
    found = (reader.members(config) for reader in readers if kind in (reader.peft_types or (kind,)))
    return [places for by_name in found for places in by_name.values()]


def peft_types() -> tuple[str, ...]:
    """All values of `peft_type` that have a reader."""
    return tuple(dict.fromkeys(name for reader in READERS for name in reader.peft_types))


def of_directory(directory: Path) -> Sequence[Reader]:
    """The readers of a directory's config file; PEFT's where there is none."""
    names = (name for name in config_files() if (directory / name).exists())
    config = next(names, PEFT_FILES.config)
    return [reader for reader in READERS if reader.files.config == config]


def _is_pickle(name: str) -> bool:
    """As `files.read_tensors` takes it."""
    return not name.endswith((_SAFETENSORS, INDEX))
