"""Mixtures on single linears in PEFT's naming: what the authors' forks of PEFT have in common.

A linear's tensors begin with `base_model.model.model.layers.{i}.{block}.{proj}.`, the stem.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import CorruptFileError, ShapeError, UnsupportedError
from molehill.engine.adapter.module_names import AROUND_LAYERS, LAYER
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import targets
from molehill.engine.formats.readers.lowrank import PairNames
from molehill.engine.formats.readers.targeting import Targeting

STEM = rf"(?P<stem>base_model\.model\.{AROUND_LAYERS}(?P<module>{LAYER}(?:\w+\.)*?\w+))"
EXPERT = r"(?:0|[1-9]\d{0,5})"

_MODEL = "base_model.model."


@dataclass(frozen=True)
class PartNames:
    """What a method calls the parts of a linear; `{e}` is the expert. extra: beside these."""

    method: str
    router: str
    a: str
    b: str
    extra: tuple[str, ...] = ()

    def pairs(self, stem: str, experts: int) -> list[PairNames]:
        """Names of each expert's A and B."""
        return [
            PairNames(f"{stem}.{self.a.format(e=e)}", f"{stem}.{self.b.format(e=e)}")
            for e in range(experts)
        ]

    def names(self, stem: str, experts: int) -> set[str]:
        """All names of a linear's parts."""
        parts = {f"{stem}.{name}" for name in (self.router, *self.extra)}
        return parts.union(*((pair.a, pair.b) for pair in self.pairs(stem, experts)))


def find_stems(weights: Weights, key: re.Pattern[str], expected: str) -> dict[str, str]:
    """The stem of each module by its canonical name.

    key: matches every name, with the groups of STEM. expected: what it matches, in words. Raises
    UnsupportedError, CorruptFileError.
    """
    stems: dict[str, str] = {}
    for name in weights.tensors:
        match = key.fullmatch(name)
        if match is None:
            raise UnsupportedError(weights.where(name), "an unknown tensor", expected)
        if stems.setdefault(match["module"], match["stem"]) != match["stem"]:
            raise CorruptFileError(weights.where(name), "two spellings of one module", "one")
    return stems


def check_targets(
    config: Fields, weights: Weights, stems: Mapping[str, str], base: BaseModel | None
) -> tuple[str, ...]:
    """Every target is there in every layer that has it, and nothing else. stems: as `find_stems`
    gives them. base: None where nobody named one. Warnings, or MissingTensorError,
    UnsupportedError."""
    target_modules, targeting = targets.read_targets(config), Targeting(config)
    targeting.check(weights.file, [stem.removeprefix(_MODEL) for stem in stems.values()])
    chosen = any(config.values.get(field) for field in ("layers_to_transform", "exclude_modules"))
    if not chosen and target_modules and not any("." in target for target in target_modules):
        targets.check_every_layer(weights.file, stems, base)
    return targets.unused(target_modules, stems) + targeting.warnings()


def count_experts(config: Fields, field: str, weights: Weights, router: str) -> int:
    """Rows of a router, which `field` must agree with. Raises MissingTensorError, ShapeError."""
    rows = weights.tensor(router, 2).shape[0]
    if config.has(field) and config.integer(field) != rows:
        expected = f"{field} {config.integer(field)}"
        raise ShapeError(weights.where(router), f"{rows} experts", expected)
    return rows


def check_all_used(weights: Weights, layout: PartNames, experts: Mapping[str, int]) -> None:
    """experts: of each stem. Raises UnsupportedError for a tensor that is no part of any."""
    known = {name for stem, count in experts.items() for name in layout.names(stem, count)}
    for name in weights.tensors:
        if name not in known:
            expected = f"{layout.method}'s router, and lora_A and lora_B of as many experts"
            raise UnsupportedError(weights.where(name), "an unknown tensor", expected)
