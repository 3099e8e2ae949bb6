"""Linears as PEFT's tuners other than LoRA save them, and their way into low-rank pairs.

A linear's tensors are called `base_model.model.model.layers.{i}.{block}.{proj}.{part}`, where the
tuner says which parts there are.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from molehill.engine.adapter.base_model import BaseModel, Limits
from molehill.engine.adapter.errors import LimitError, UnknownTargetError, UnsupportedError
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import (
    biases,
    known,
    linears,
    patterns,
    saved_modules,
    targets,
)
from molehill.engine.formats.readers.reader import AdapterFiles
from molehill.engine.formats.readers.targeting import Targeting
from molehill.kernels.mixture import Bias, Experts, LinearMixture
from molehill.kernels.policy import Constant

_MODEL = "base_model.model."


@dataclass(frozen=True)
class TunedLinears:
    """stems: what precedes the parts' names, by canonical module name. warnings, biases: see
    `Adapter`."""

    stems: Mapping[str, str]
    warnings: tuple[str, ...]
    biases: Mapping[str, Bias]

    def name_in_model(self, site: str) -> str:
        """What PEFT calls the module, and patterns are about."""
        return self.stems[site].removeprefix(_MODEL)


def find(config: Fields, weights: Weights, kind: str, parts: Iterable[str]) -> TunedLinears:
    """Every linear that the file has tensors for, held against the config.

    kind: of `known.FIELDS`. parts: what a linear's tensors may be called. Raises ConfigError,
    CorruptFileError, MissingTensorError, UnsupportedError.
    """
    parts = tuple(parts)
    key = re.compile(rf"{linears.STEM}\.(?:{'|'.join(map(re.escape, parts))})")
    notes = saved_modules.check(config, weights)
    weights, trained, of_biases = biases.split(config, weights)
    stems = linears.find_stems(weights, key, f"{' or '.join(parts)} of a layer's linear")
    target_modules, targeting = targets.read_targets(config), Targeting(config)
    modules = [stem.removeprefix(_MODEL) for stem in stems.values()]
    targeting.check(weights.file, modules)
    if target_modules and not any("." in target for target in target_modules):
        targets.check_siblings(weights.file, modules, targeting, None)
    notes += targets.unused(target_modules, modules) + targeting.warnings()
    notes += of_biases + known.warnings(config, known.FIELDS[kind])
    return TunedLinears(stems, notes, trained)


def plain(pairs: Iterable[tuple[str, Tensor, Tensor]], limits: Limits) -> dict[str, LinearMixture]:
    """(site, A `[r, in]`, B `[out, r]`) as mixtures of one pair, which every token gets.

    Few bytes of a file may stand for many of A and B: raises LimitError as soon as there are more
    than an adapter may have.
    """
    mixtures: dict[str, LinearMixture] = {}
    total = 0
    for site, a, b in pairs:
        total += a.nbytes + b.nbytes
        if total > limits.adapter_bytes:
            expected = f"at most {limits.adapter_bytes} bytes"
            raise LimitError(site, f"{total} bytes of low-rank pairs up to here", expected)
        experts = Experts(a.contiguous(), b.contiguous(), (a.shape[0],))
        mixtures[site] = LinearMixture(experts, Constant((1.0,)))
    return mixtures


def check_rank(where: str, rank: int, why: str, limits: Limits) -> None:
    """Before a pair of that rank is made. why: where it comes from. Raises LimitError."""
    if rank > limits.rank:
        raise LimitError(where, f"rank {rank}, {why}", f"at most {limits.rank}")


def scalings(config: Fields, linears: TunedLinears) -> dict[str, tuple[int, float]]:
    """(r, alpha / r) by site, for tuners of LyCORIS, with their exceptions by module name."""
    rank_of, alpha_of = patterns.read_ranks(config), patterns.read_alphas(config)
    usual = config.integer("r", 8), config.number("alpha", 8)
    result = {}
    for site in linears.stems:
        module = linears.name_in_model(site)
        rank, alpha = rank_of.get(module, usual[0]), alpha_of.get(module, usual[1])
        result[site] = (rank, alpha / rank)
    return result


def base_shape(files: AdapterFiles, site: str, missing: str) -> tuple[int, int]:
    """(in, out) of the base's linear. missing: what the file leaves out, in words.

    Raises UnsupportedError where nobody named the base, UnknownTargetError.
    """
    base: BaseModel | None = files.base
    if base is None:
        found = f"{files.config.values['peft_type']}, whose files leave out {missing}"
        expected = (
            "the base model beside it: --model of molehill inspect and merge, --base of molehill "
            "convert (a server knows its own)"
        )
        raise UnsupportedError(f"{files.config.where}: peft_type", found, expected)
    shape = base.linear(site)
    if shape is None:
        expected = f"one of the linears of {base.name}"
        raise UnknownTargetError(site, "no such linear in the base model", expected)
    return shape
