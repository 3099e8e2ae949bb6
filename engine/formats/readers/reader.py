"""What a reader of one on-disk format is; `molehill.engine.formats.registry` lists them all."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io import files
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights


@dataclass(frozen=True)
class FileNames:
    """config: a JSON object; the file by which a directory is of this format. weights: what may
    hold its tensors, the best first; none where they are in the directories below."""

    config: str
    weights: tuple[str, ...] = ()


PEFT_FILES = FileNames(files.CONFIG, (files.SAFETENSORS, files.PICKLE))


@dataclass(frozen=True)
class Told:
    """What an adapter's files leave open and whoever converts it says.

    task: of adapters whose gate weights go by task. base_is_changed: the base is as it was in
    training, less what that took out of it.
    """

    task: int | None = None
    base_is_changed: bool = False


NOTHING_TOLD = Told()


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as a reader gets it. config: its config file, with `peft_type` where the format
    has one. read_member: reads an adapter in a directory below, which has tensors of its own."""

    directory: Path
    names: FileNames
    config: Fields
    limits: Limits
    read_member: Callable[[Path], Adapter]
    told: Told = NOTHING_TOLD

    @cached_property
    def weights(self) -> Weights:
        """Read once, when first asked for. Raises as `files.read_weights` does."""
        return files.read_weights(self.directory, self.limits, self.names.weights)


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
    by_task: whether it takes a task.
    """

    files: FileNames
    read: Callable[[AdapterFiles], Adapter]
    peft_types: tuple[str, ...] = ()
    recognises: Callable[[Fields, Weights], bool] = _always
    no_layout: str | None = "{peft_type} has no LoRA on fused experts"
    by_task: bool = False
