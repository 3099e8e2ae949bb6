"""Adapter files into canonical adapters: finds out the format and hands over to its reader."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from molehill.engine.adapter.base_model import BaseModel, Limits
from molehill.engine.adapter.errors import ConfigError, UnsupportedError
from molehill.engine.adapter.layout import Layout
from molehill.engine.adapter.model import Adapter, natural_key
from molehill.engine.adapter.validation import check
from molehill.engine.formats import registry
from molehill.engine.formats.io import files, nearby
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.readers import (
    changed_base,
    expert_layout,
    invocation,
    non_granular,
    peft_parameters,
    unserved,
)
from molehill.engine.formats.readers.policies import STRATEGIES
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, with_notes

DEFAULT_LIMITS = Limits()

# What serving them would take.
_NOT_SERVED = {
    **unserved.REASONS,
    "LILY": "LILY, whose router averages over all tokens of a batch: an answer would depend on who "
    "shares the step",
    "POLY": "POLY, whose mixture goes by a task that no request names",
}


def read(
    path: Path,
    limits: Limits = DEFAULT_LIMITS,
    lora_b_layout: Layout | None = None,
    base: BaseModel | None = None,
    base_is_residual: bool = False,
    task: int | None = None,
) -> Adapter:
    """The adapter in a directory, self-consistent and within the limits.

    lora_b_layout: of LoRA on fused experts whose config does not say it. base: what it is read for;
    a few formats (VeRA, MiSS) leave out widths that only the base knows. Whether it fits is not
    checked. base_is_residual: the base is the one that PiSSA, GOAT and the like trained beside, see
    `readers.changed_base`. task: of adapters whose gate weights go by task. Raises an AdapterError
    that names the file and the tensor or field.
    """
    files.check_directory(path)
    adapter = _read(path, limits, lora_b_layout, base, base_is_residual, task)
    if base is not None:
        adapter = _without_ignored(adapter, base)
    check(adapter, limits)
    return adapter


def _read(
    path: Path,
    limits: Limits,
    lora_b_layout: Layout | None = None,
    base: BaseModel | None = None,
    base_is_residual: bool = False,
    task: int | None = None,
) -> Adapter:
    """By the config's name, then its `peft_type`, then, where both are shared, the tensors."""
    readers = registry.of_directory(path)
    if not (path / readers[0].files.config).exists():
        expected = f"a JSON object{nearby.hint(path, registry.config_files())}"
        raise ConfigError(readers[0].files.config, "no such file", expected)
    config = files.read_config(path, readers[0].files.config)
    kind = ""
    if any(reader.peft_types for reader in readers):
        kind = peft_type(config)
        readers = [reader for reader in readers if kind in reader.peft_types]
        config = Fields(config.where, {**config.values, "peft_type": kind})
    no_layout = [reader.no_layout for reader in readers]
    if None in no_layout:
        config = peft_parameters.with_layout(path, config, lora_b_layout)
    else:
        expert_layout.refuse(lora_b_layout, f"as {no_layout[0]}".format(peft_type=kind))
    if base_is_residual:
        changes = any(reader.changes_base(config) for reader in readers)
        config = changed_base.with_residual(config, changes)
    if task is not None and not any(reader.by_task for reader in readers):
        raise UnsupportedError("task", task, "none: these gate weights do not go by task")
    read_member = partial(_read, limits=limits, base=base)
    adapter = AdapterFiles(path, readers[0].files, config, limits, read_member, base, task)
    # A reader by itself refuses some configs before any weights are read.
    reader = readers[0]
    if len(readers) > 1:
        reader = next(reader for reader in readers if reader.recognises(config, adapter.weights))
    result = reader.read(adapter)
    if reader.files == PEFT_FILES:
        result = with_notes(result, adapter.weights)
    return invocation.activated(result, config)


def _without_ignored(adapter: Adapter, base: BaseModel) -> Adapter:
    """Less what the base has no use for, with a warning: PEFT drops those tensors as it loads."""
    dropped = adapter.sites.keys() & base.ignored
    if not dropped:
        return adapter
    sites = {site: mixture for site, mixture in adapter.sites.items() if site not in dropped}
    first = min(dropped, key=natural_key)
    warning = (
        f"{first}: left out, and {len(dropped) - 1} more: these layers take k and v from another's "
        "KV cache"
    )
    return replace(adapter, sites=sites, warnings=(*adapter.warnings, warning))


def invocation_tokens(path: Path) -> tuple[int, ...]:
    """Those of the adapter in a directory, of whose files the config alone is read; empty of one
    that acts on every token. Raises an AdapterError."""
    return invocation.read(_config(path))


def non_granular_after(path: Path) -> int | None:
    """That of the X-LoRA in a directory, of whose files the config alone is read; None of one that
    says none, and of other adapters. Raises an AdapterError."""
    return non_granular.of_config(_config(path))


def _config(path: Path) -> Fields:
    return files.read_config(path, registry.of_directory(path)[0].files.config)


def peft_type(config: Fields) -> str:
    """By `peft_type`, else by `routing_strategy`, else LORA, as MoE-PEFT chooses.

    Raises ConfigError, UnsupportedError.
    """
    kind = config.text("peft_type")
    strategy = config.text("routing_strategy")
    if kind is None and strategy is not None:
        if strategy not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            where = f"{config.where}: routing_strategy"
            raise UnsupportedError(where, strategy, f"one of {known}")
        kind = strategy.split("-")[0].upper()
    kind = kind or "LORA"
    if kind not in registry.peft_types():
        known = ", ".join(registry.peft_types())
        found = _NOT_SERVED.get(kind, kind)
        raise UnsupportedError(f"{config.where}: peft_type", found, f"one of {known}")
    return kind
