"""What a reader of one on-disk format is; `molehill.engine.formats.registry` lists them all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from molehill.engine.adapter.base_model import BaseModel, Limits
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io import files
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.io.shards import INDEX
from molehill.engine.formats.readers import changed_base, keys


@dataclass(frozen=True)
class FileNames:
    """config: a JSON object; the file by which a directory is of this format. weights: what may
    hold its tensors, the best first; none where they are in the directories below."""

    config: str
    weights: tuple[str, ...] = ()


PEFT_FILES = FileNames(files.CONFIG, (files.SAFETENSORS, INDEX, files.PICKLE))


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as a reader gets it. config: its config file, with `peft_type` where the format
    has one. read_member: reads an adapter in a directory below, which has tensors of its own.
    base: the shapes of the base model that it is read for, for formats whose files leave out
    widths; None where nobody named one. task: of adapters whose gate weights go by task."""

    directory: Path
    names: FileNames
    config: Fields
    limits: Limits
    read_member: Callable[[Path], Adapter]
    base: BaseModel | None = None
    task: int | None = None

    @cached_property
    def weights(self) -> Weights:
        """Read once, when first asked for. Raises as `read_weights` does."""
        return read_weights(self.directory, self.names, self.limits)


def read_weights(directory: Path, names: FileNames, limits: Limits) -> Weights:
    """The tensors in a directory; PEFT's by its own names. Raises as `files.read_weights` and
    `keys.canonical` do."""
    weights = files.read_weights(directory, limits, names.weights)
    return keys.canonical(weights) if names == PEFT_FILES else weights


def with_notes(adapter: Adapter, weights: Weights) -> Adapter:
    """The adapter with a warning for all that was read as something else."""
    return replace(adapter, warnings=(*adapter.warnings, *weights.notes))


def _none(config: Fields) -> Mapping[str, Sequence[str]]:
    return {}


def _always(config: Fields, weights: Weights) -> bool:
    return True


@dataclass(frozen=True)
class Reader:
    """One on-disk format.

    files: how it is found. peft_types: the values of `peft_type` in a PEFT_FILES.config that are
    its own. recognises: whether an adapter is its own where several readers have files and
    `peft_type` in common; the first that says so reads it. read: parses, and raises an
    AdapterError that names the file and the tensor or field.
    no_layout: why a `lora_b_layout` means nothing to it; None if it reads LoRA on fused experts.
    by_task: whether it takes a task. expands: whether few bytes of its files may stand for many of
    A and B, which it makes as it reads them. changes_base: whether a config of its own says that
    training took something out of the base weights. members: by name, the adapters that lie in
    directories below and in which, the best first; raises ConfigError.
    """

    files: FileNames
    read: Callable[[AdapterFiles], Adapter]
    peft_types: tuple[str, ...] = ()
    recognises: Callable[[Fields, Weights], bool] = _always
    no_layout: str | None = "{peft_type} has no LoRA on fused experts"
    by_task: bool = False
    expands: bool = False
    changes_base: Callable[[Fields], bool] = changed_base.changes_base
    members: Callable[[Fields], Mapping[str, Sequence[str]]] = _none
