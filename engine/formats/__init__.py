"""Adapter files into canonical adapters: finds out the format and hands over to its reader."""

from collections.abc import Callable
from pathlib import Path

from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.adapter.layout import Layout
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import check
from molehill.engine.formats import native
from molehill.engine.formats.io import files
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.readers import (
    adamole,
    expert_layout,
    forks,
    ldmole,
    mixes,
    moepeft,
    mov,
    peft,
    peft_parameters,
)
from molehill.engine.formats.readers.policies import STRATEGIES

DEFAULT_LIMITS = Limits()


def _read_lora(directory: Path, config: Fields, limits: Limits) -> Adapter:
    """PEFT's own files and those of its forks, which only their tensors tell apart."""
    expert_layout.check_said(directory, config, peft_parameters.adapted(config))
    weights = files.read_weights(directory, limits)
    if ldmole.recognises(config, weights):
        return ldmole.read(config, weights)
    reader = forks.read if forks.recognises(weights) else peft.read
    return reader(config, weights)


# By `peft_type`. A reader parses one on-disk format.
READERS: dict[str, Callable[[Path, Fields, Limits], Adapter]] = {
    "LORA": _read_lora,
    "MIXLORA": moepeft.read,
    "MOLA": moepeft.read,
    "LORAMOE": moepeft.read,
    "DYNMOLE": moepeft.read,
    "MOLE": adamole.read,
    "ADAMOLE": adamole.read,
    "MOV": mov.read,
}

# What serving them would take.
_NOT_SERVED = {
    "XLORA": "XLORA, whose scalings come from a pass of their own: every token would run through "
    "the base twice, first without adapters and with a KV cache of its own, then with the scalings",
}


def read(
    path: Path, limits: Limits = DEFAULT_LIMITS, lora_b_layout: Layout | None = None
) -> Adapter:
    """The adapter in a directory, self-consistent and within the limits, for any base model.

    lora_b_layout: of LoRA on fused experts whose config does not say it. Raises an AdapterError
    that names the file and the tensor or field.
    """
    files.check_directory(path)
    if (path / mixes.CONFIG).exists():
        expert_layout.refuse(lora_b_layout, f"as each adapter of a {mixes.CONFIG} says its own")
        adapter = mixes.read(path, limits, _read_one)
    else:
        adapter = _read_one(path, limits, lora_b_layout)
    check(adapter, limits)
    return adapter


def _read_one(path: Path, limits: Limits, lora_b_layout: Layout | None = None) -> Adapter:
    """An adapter with tensors of its own."""
    if (path / native.CONFIG).exists():
        expert_layout.refuse(lora_b_layout, f"as {native.CONFIG} has every expert by itself")
        return native.read(path, limits)
    config = files.read_config(path)
    kind = peft_type(config)
    if kind != "LORA":
        expert_layout.refuse(lora_b_layout, f"as {kind} has no LoRA on fused experts")
    fields = Fields(config.where, {**config.values, "peft_type": kind})
    return READERS[kind](path, expert_layout.with_given(fields, lora_b_layout), limits)


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
    if kind not in READERS:
        known = ", ".join(READERS)
        found = _NOT_SERVED.get(kind, kind)
        raise UnsupportedError(f"{config.where}: peft_type", found, f"one of {known}")
    return kind
