"""GOAT (arXiv 2502.16894) as its authors' code writes it.

Keys: `base_model.model.model.layers.{i}.{block}.{proj}.` with

    lora_gating.weight                                    [E, in]
    lora_A.{e}.weight, lora_B.{e}.weight                  [r // E, in], [out, r // E]
    moe_layer.experts.{e}.lora_A.weight, .lora_B.weight   the same tensors by another name

The config's `r` is the rank of all experts together. Most values of `init_type` begin with a part
of the base weight's SVD in the experts, which training takes out of the base weight first and saves
nowhere: `molehill.engine.formats.convert.goat_base` makes it anew.
"""

import math
import re
from collections.abc import Callable

from molehill.engine.adapter.errors import ConfigError, UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.fields import Fields, shortened
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import (
    adamole,
    changed_base,
    known,
    linears,
    peft,
    saved_modules,
)
from molehill.engine.formats.readers.linears import EXPERT, STEM, PartNames
from molehill.engine.formats.readers.lowrank import Scaling, build_experts, read_router
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.kernels.mixture import LinearMixture
from molehill.kernels.policy import TopK

# The field that says whether training changed the base weights.
CHANGED_BY = "init_type"

_KEY = re.compile(rf"{STEM}\.(?:lora_gating|lora_[AB]\.{EXPERT})\.weight")
_LAYOUT = PartNames("goat", "lora_gating.weight", "lora_A.{e}.weight", "lora_B.{e}.weight")

# Which singular values, of n in falling order, are in the experts of a total rank r.
_TAKEN: dict[str, Callable[[int, int, int], list[int]]] = {
    "goat": lambda r, experts, n: _segments(r, experts, n, last=False),
    "goat_mini": lambda r, experts, n: _segments(r, experts, n, last=True),
    "pissa": lambda r, experts, n: [*range(r)],
    "pissa_scale": lambda r, experts, n: [*range(r)],
    "milora": lambda r, experts, n: [*range(n - r, n)],
    "pissa_milora": lambda r, experts, n: [*range(r // 2), *range(n - (r - r // 2), n)],
}
# Of names that leave the base weight as it is, one is there and none of the others.
_PLAIN, _OTHERS = ("lora", "mole"), ("goat", "pissa", "milora", "svd", "hydralora")
# What is in the experts is divided by rho; init_cof times that leaves the base weight.
_RHO = 10.0

_UNSERVED = {
    **peft.FORKS_UNSERVED,
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA's scaling, which init_type sets",
    "rank_pattern": "ranks by pattern",
    "alpha_pattern": "scalings by pattern",
    "target_parameters": "LoRA on fused experts",
}


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    config = files.config
    config.refuse(_UNSERVED)
    peft.check_initialisation(config)
    kind = _kind(config)
    if kind in _TAKEN and not config.flag(changed_base.FIELD):
        raise UnsupportedError(
            f"{config.where}: init_type",
            f"{kind}, which trains beside the base weights less a part of their SVD that is not "
            "in the file",
            "a copy that has it, `molehill convert --base MODEL SRC DST`; or, where the base that "
            f'is served is the changed one, "{changed_base.FIELD}": true as it is loaded '
            f"({changed_base.OPTION} of molehill's commands)",
        )
    weights = adamole.without_copies(files.weights)
    notes = saved_modules.check(config, weights)
    stems = linears.find_stems(weights, _KEY, "lora_gating, lora_A or lora_B of a layer's linear")
    warnings = linears.check_targets(config, weights, stems, files.base)
    sites = {module: _mixture(config, weights, kind, stem) for module, stem in stems.items()}
    experts = {stems[module]: mixture.num_experts for module, mixture in sites.items()}
    linears.check_all_used(weights, _LAYOUT, experts)
    if kind in _TAKEN:
        notes += (changed_base.warning(CHANGED_BY, kind),)
    notes += (*_scaling_warnings(config, kind), *known.warnings(config, known.FIELDS["goat"]))
    return Adapter("goat", sites, config.text("base_model_name_or_path"), warnings + notes)


def _kind(config: Fields) -> str:
    """Raises ConfigError, UnsupportedError for an `init_type` that the authors' code has not."""
    kind = config.text("init_type")
    if kind is None:
        raise config.error("init_type", "a string")
    plain = any(name in kind for name in _PLAIN) and not any(name in kind for name in _OTHERS)
    if kind not in _TAKEN and not plain:
        expected = f"lora, mole, or one of {', '.join(_TAKEN)}"
        raise UnsupportedError(f"{config.where}: init_type", shortened(kind), expected)
    return kind


def _mixture(config: Fields, weights: Weights, kind: str, stem: str) -> LinearMixture:
    name = f"{stem}.{_LAYOUT.router}"
    count = linears.count_experts(config, "num_experts", weights, name)
    total = config.integer("r")
    if total < count:
        raise config.error("r", f"at least num_experts, {count}: the rank of all together")
    pairs = _LAYOUT.pairs(stem, count)
    inputs = weights.tensor(pairs[0].a, 2).shape[1]
    experts = build_experts(weights, pairs, _scaling(config, kind, total // count, inputs))
    router = read_router(weights, name, inputs)
    return LinearMixture(experts, TopK(config.integer("top_k", 2)), router)


def changes_base(config: Fields) -> bool:
    """Whether training took a part of the base weights out of them."""
    return config.values.get("peft_type") == "GOAT" and _kind(config) in _TAKEN


READER = Reader(PEFT_FILES, read, peft_types=("GOAT",), changes_base=changes_base)


def taken(config: Fields, experts: int, values: int) -> list[int]:
    """Which of a base weight's singular values, in falling order, that part has. Raises ConfigError
    for a rank above their number."""
    rank = config.integer("r")
    if rank > values:
        raise config.error("r", f"at most {values}, as many as there are singular values")
    return _TAKEN[_kind(config)](rank, experts, values)


def share(config: Fields) -> float:
    """What was taken, as a part of what these singular values stand for. Raises ConfigError."""
    return config.number("init_cof", 1.0) / _RHO


def _segments(r: int, experts: int, n: int, *, last: bool) -> list[int]:
    """The first, or last, r // E of each of E segments of n // E singular values."""
    length, rank = n // experts, r // experts
    skipped = length - rank if last else 0
    return [e * length + skipped + i for e in range(experts) for i in range(rank)]


def _scaling(config: Fields, kind: str, rank: int, inputs: int) -> Scaling:
    """What the authors' code has for an init_type, of experts of this rank.

    Raises ConfigError.
    """
    alpha = config.number("lora_alpha", above=0)
    if config.has("molehill_scaling"):
        return Scaling(config.number("molehill_scaling", above=0) * rank, rank)
    if "scale" in kind:
        eta = config.number("molehill_eta", 1.0, above=0)
        return Scaling(math.sqrt(3 * eta * inputs / rank) * rank, rank)
    if config.has("molehill_eta"):
        where = f"{config.where}: molehill_eta"
        raise ConfigError(where, f"a number beside init_type {kind}", "one with scale in it")
    if kind == "pissa":
        return Scaling(2.0 * rank, rank)
    return Scaling(alpha, rank, rslora="rs" in kind)


def _scaling_warnings(config: Fields, kind: str) -> tuple[str, ...]:
    """What decides the answer and is saved nowhere."""
    if config.has("molehill_scaling") or config.has("molehill_eta"):
        return ()
    formula, field = "lora_alpha / (r // num_experts)", "molehill_scaling"
    if "scale" in kind:
        formula, field = "sqrt(3 eta in / (r // num_experts)) with an eta of 1", "molehill_eta"
    elif kind == "pissa":
        formula = "2"
    elif "rs" in kind:
        formula = "lora_alpha / sqrt(r // num_experts)"
    return (
        f"GOAT saves no scaling: {formula} is assumed, that of init_type {kind} where the "
        f'environment sets none; add "{field}": a number, if it was trained otherwise',
    )
