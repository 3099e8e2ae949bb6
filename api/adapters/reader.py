"""Reads an adapter for the base model that is served."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from molehill.engine import formats
from molehill.engine.adapter import validation
from molehill.engine.adapter.base_model import BaseModel, Limits
from molehill.engine.adapter.layout import Layout
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.readers import non_granular
from molehill.engine.transform.weighted_sum import Part, mix

logger = logging.getLogger("vllm.molehill")


@dataclass(frozen=True)
class AdapterReader:
    """names: under which the base model is known: its own, those that it is served as."""

    base: BaseModel
    limits: Limits
    names: Collection[str]

    def __call__(
        self,
        directory: Path,
        lora_b_layout: Layout | None = None,
        base_is_residual: bool = False,
        non_granular_after: int | None = None,
    ) -> Adapter:
        """Parses and validates. Raises AdapterError."""
        adapter = formats.read(directory, self.limits, lora_b_layout, self.base, base_is_residual)
        adapter = non_granular.with_given(adapter, non_granular_after)
        validation.validate(adapter, self.base, self.limits)
        warning = doubt(adapter.base_model, self.names)
        if warning is None or warning in adapter.warnings:
            return adapter
        logger.warning("%s: %s", directory.name, warning)
        return replace(adapter, warnings=(*adapter.warnings, warning))

    def combine(self, parts: Sequence[Part]) -> Adapter:
        """The weighted sum of adapters that were read before, validated. Raises AdapterError."""
        adapter = mix(parts)
        validation.validate(adapter, self.base, self.limits)
        return adapter


def doubt(trained_on: str | None, names: Collection[str]) -> str | None:
    """What to say of an adapter whose base model is not called as ours, or None.

    Only said: a base model may well have been renamed, and one of another shape is refused.
    """
    if trained_on is None or last_part(trained_on) in set(map(last_part, names)):
        return None
    expected = " or ".join(sorted(set(map(last_part, names))))
    return f"base model: trained on {trained_on[:200]!a}, served on {expected}"


def last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
