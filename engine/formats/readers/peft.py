"""LoRA, rsLoRA and DoRA as Hugging Face PEFT writes them (and MoE-PEFT its plain LoRA).

Keys: `base_model.model.model.layers.{i}.{block}.{proj}.lora_A.weight`, `.lora_B.weight`,
`.lora_magnitude_vector` (with `.weight` from some versions), `.lora_B.bias` where `lora_bias` is
set, which the scaling multiplies too (PEFT's lora/layer.py), and as LyCORIS and kohya write it a
scalar `.alpha` of one module beside them. `keys` knows what else they are called, `biases` the
base's biases beside them.

`fan_in_fan_out` is how the base stores W (GPT-2's Conv1D): A and B are the same whatever it says.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import (
    CorruptFileError,
    MissingTensorError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.module_names import AROUND_LAYERS, LAYER, OUTSIDE_LAYERS, canonical
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import (
    biases,
    changed_base,
    known,
    patterns,
    peft_parameters,
    saved_modules,
    targets,
    vocabulary,
    vocabulary_rows,
    vocabulary_tensors,
)
from molehill.engine.formats.readers.lowrank import PairNames, Scaling, build_experts
from molehill.engine.formats.readers.patterns import Patterns
from molehill.engine.formats.readers.reader import PEFT_FILES, Reader
from molehill.engine.formats.readers.targeting import Targeting
from molehill.kernels.mixture import LinearMixture
from molehill.kernels.policy import Constant

_KEY = re.compile(
    rf"base_model\.model\.(?P<module>{AROUND_LAYERS}(?:{LAYER}[\w.]+?|{'|'.join(OUTSIDE_LAYERS)}))"
    r"\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector|alpha)"
    r"(?:(?<=vector)\.weight)?"
)
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "alpha": "alpha",
}

# Fields that change the forward pass or the base weights; serving without them would be wrong.
UNSERVED = {
    "enable_lora": "a LoRA on parts of a fused linear",
    "layer_replication": "replicated layers",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing, which a molehill_mix.json sets up",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
_REMEDIES = {
    "layer_replication": "the model with its layers replicated, served as the base",
    "arrow_config": "the LoRAs in directories of their own below a molehill_mix.json",
    "kasa_config": biases.MERGED,
}
# What PEFT's forks have, and nobody has seen used in them.
FORKS_UNSERVED = {
    **UNSERVED,
    "trainable_token_indices": "trained token embeddings",
    "fan_in_fan_out": "transposed weights",
    "lora_bias": "a bias in lora_B",
}
_FORKS = {
    "lora_nums": "a mixture (LoRAMoE, HydraLoRA or LD-MoLE) without its tensors",
    "sparsegen": "LD-MoLE's router",
    "bias_u": "FlyLoRA, which has a router",
    "top_k": "a router (FlyLoRA or MoLA) without its tensors",
}


@dataclass
class _Module:
    """The names, in the file, of one linear's tensors."""

    a: str | None = None
    b: str | None = None
    bias: str | None = None
    magnitude: str | None = None
    alpha: str | None = None


@dataclass(frozen=True)
class _Scalings:
    """`r` and `lora_alpha` with their exceptions by module name."""

    rank: int
    alpha: float
    rslora: bool
    ranks: Patterns[int]
    alphas: Patterns[float]

    def of(self, module: str) -> Scaling:
        rank, alpha = self.ranks.get(module, self.rank), self.alphas.get(module, self.alpha)
        return Scaling(alpha, rank, self.rslora)


def read(config: Fields, weights: Weights, base: BaseModel | None = None) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly. base: what it is read for."""
    beside = _refuse(config)
    on_vocabulary, whole = vocabulary_tensors.find(weights), weights
    weights = on_vocabulary.rest
    scalings = _read_scalings(config)
    target_modules, targeting = targets.read_targets(config), Targeting(config)
    notes = saved_modules.check(config, weights, on_vocabulary.keys) + targeting.warnings()
    weights, trained, of_biases = biases.split(config, weights)
    grouped = _group(weights)
    modules = {name: m for name, m in grouped.items() if not peft_parameters.is_stack(name)}
    _check_spellings(weights, modules)
    parameters = peft_parameters.read_targets(config)
    by_weight = {name for name in modules if peft_parameters.is_weight(name, parameters)}
    targeting.check(weights.file, modules.keys() - by_weight)
    if target_modules and not any("." in target for target in target_modules):
        targets.check_siblings(weights.file, modules.keys() - by_weight, targeting, base)
    dora = config.flag("use_dora")
    if dora:
        _check_magnitudes(weights, modules)
    _check_lora_bias(config, weights, modules)
    sites = _fused_experts(config, weights, grouped, scalings, base)
    linears, added = _linears(weights, modules, by_weight, scalings, dora)
    sites |= linears
    rows = vocabulary_rows.read_rows(config, whole, on_vocabulary, base)
    sites |= vocabulary.read(config, whole, on_vocabulary, targeting, scalings.of, base)
    magnitudes = any(mixture.magnitude is not None for mixture in sites.values())
    adapted = [*modules, *on_vocabulary.pairs]
    return Adapter(
        kind="dora" if magnitudes else "lora",
        sites=sites,
        base_model=config.text("base_model_name_or_path"),
        rows=rows,
        warnings=(
            *_warnings(target_modules, adapted, lost_magnitudes=dora and not magnitudes),
            *notes,
            *of_biases,
            *beside,
            *peft_parameters.warnings(config),
            *known.warnings(config, known.FIELDS["lora"]),
        ),
        biases=biases.with_added(trained, added),
    )


def _linears(
    weights: Weights,
    modules: Mapping[str, _Module],
    by_weight: Collection[str],
    scalings: _Scalings,
    dora: bool,
) -> tuple[dict[str, LinearMixture], dict[str, Tensor]]:
    """By site, the pair of each linear, and the bias that its B adds. by_weight: linears that
    `target_parameters` names by their weight."""
    sites, added = {}, {}
    for name, module in modules.items():
        pattern_name = f"{name}.weight" if name in by_weight else name
        scaling = _scaling(weights, pattern_name, module, scalings)
        sites[canonical(name)] = _mixture(weights, name, module, scaling, dora)
        if module.bias is not None:
            added[canonical(name)] = weights.tensor(module.bias, 1) * scaling.factor
    return sites, added


READER = Reader(
    PEFT_FILES,
    lambda files: read(files.config, files.weights, files.base),
    peft_types=("LORA",),
    no_layout=None,
)


def scaling_factors(config: Fields, sites: Iterable[str]) -> dict[str, float]:
    """What `read` multiplies B by at these linears of a Llama-like model. Raises ConfigError."""
    scalings = _read_scalings(config)
    return {site: scalings.of(f"model.{site}").factor for site in sites}


def factors(config: Fields, weights: Weights) -> dict[str, float]:
    """What `read` multiplies B by, alpha / r for a LoRA, by canonical module name."""
    scalings = _read_scalings(config)
    weights, _, _ = biases.split(config, weights)
    names = _group(weights)
    for name in filter(peft_parameters.is_stack, names):
        where, found = weights.where(name), "fused experts of the base model in a mix"
        raise UnsupportedError(where, found, "adapters of linears")
    return {canonical(n): _scaling(weights, n, m, scalings).factor for n, m in names.items()}


def _scaling(weights: Weights, name: str, module: _Module, scalings: _Scalings) -> Scaling:
    """By the module's own alpha, with the rank of its tensors, where the file has one; else by the
    config's patterns, which know it as `name`. Raises MissingTensorError, ShapeError."""
    if module.alpha is None:
        return scalings.of(name)
    alpha = weights.tensors[module.alpha]
    if alpha.numel() != 1 or not float(alpha) > 0:
        found = list(alpha.shape) if alpha.numel() != 1 else float(alpha)
        raise ShapeError(weights.where(module.alpha), found, "one number above 0")
    stem = module.alpha.removesuffix(".alpha")
    return Scaling(float(alpha), weights.tensor(f"{stem}.lora_A.weight", 2).shape[0])


def _fused_experts(
    config: Fields,
    weights: Weights,
    grouped: Mapping[str, _Module],
    scalings: _Scalings,
    base: BaseModel | None,
) -> dict[str, LinearMixture]:
    """What `target_parameters` adapts; nothing without it."""
    stacks = {}
    for name, module in grouped.items():
        if peft_parameters.is_stack(name):
            _check_stack(weights, module)
            stacks[name] = _names(name, module)
    return peft_parameters.read(config, weights, stacks, scalings.of, base)


def _check_stack(weights: Weights, module: _Module) -> None:
    for part in (module.magnitude, module.alpha, module.bias):
        if part is not None:
            expected = "lora_A and lora_B alone"
            raise UnsupportedError(weights.where(part), "one on fused experts", expected)


def _names(name: str, module: _Module) -> PairNames:
    stem = f"base_model.model.{name}"
    return PairNames(module.a or f"{stem}.lora_A.weight", module.b or f"{stem}.lora_B.weight")


def _refuse(config: Fields) -> tuple[str, ...]:
    """Warnings, or UnsupportedError."""
    config.refuse({**UNSERVED, **_FORKS}, _REMEDIES)
    return check_initialisation(config)


def check_initialisation(config: Fields) -> tuple[str, ...]:
    """Warnings; raises UnsupportedError for one that trains beside other base weights than those
    that are served."""
    return changed_base.check(config)


def _read_scalings(config: Fields) -> _Scalings:
    return _Scalings(
        rank=config.integer("r"),
        alpha=config.number("lora_alpha", above=0),
        rslora=config.flag("use_rslora"),
        ranks=patterns.read_ranks(config),
        alphas=patterns.read_alphas(config),
    )


def _group(weights: Weights) -> dict[str, _Module]:
    modules: dict[str, _Module] = {}
    for key in weights.tensors:
        match = _KEY.fullmatch(key)
        if match is None:
            expected = (
                "lora_A.weight, lora_B.weight, lora_B.bias, lora_magnitude_vector or alpha of a "
                "layer's linear"
            )
            raise UnsupportedError(weights.where(key), "an unknown tensor", expected)
        module, part = match["module"], _PARTS[match["part"]]
        names = modules.setdefault(module, _Module())
        if getattr(names, part) is not None:
            raise CorruptFileError(weights.where(key), "a second tensor of this part", "one")
        setattr(names, part, key)
    return modules


def _check_spellings(weights: Weights, modules: Iterable[str]) -> None:
    spellings: set[str] = set()
    for name in modules:
        if canonical(name) in spellings:
            raise CorruptFileError(weights.where(name), "two spellings of one module", "one")
        spellings.add(canonical(name))


def _check_lora_bias(config: Fields, weights: Weights, modules: Mapping[str, _Module]) -> None:
    """PEFT saves one for every module where `lora_bias` is set, and drops those that the file has
    beside it unset."""
    wanted = config.flag("lora_bias")
    if wanted and config.flag("use_dora"):
        expected = "none beside use_dora, as PEFT has no such adapter"
        raise UnsupportedError(f"{config.where}: lora_bias", "a bias in lora_B", expected)
    for name, module in modules.items():
        if wanted and module.bias is None:
            where = weights.where(f"base_model.model.{name}.lora_B.bias")
            raise MissingTensorError(where, "no such tensor", "one, as lora_bias is set")
        if module.bias is not None and not wanted:
            expected = "none, as lora_bias is not set"
            raise UnsupportedError(weights.where(module.bias), "a bias in lora_B", expected)


def _check_magnitudes(weights: Weights, modules: dict[str, _Module]) -> None:
    """MoE-PEFT saves no magnitude at all; PEFT saves one for every module."""
    without = [name for name, module in modules.items() if module.magnitude is None]
    if without and len(without) < len(modules):
        where = weights.where(f"base_model.model.{without[0]}.lora_magnitude_vector")
        raise MissingTensorError(where, "no such tensor", "one, as other modules have")


def _mixture(
    weights: Weights, name: str, module: _Module, scaling: Scaling, dora: bool
) -> LinearMixture:
    experts = build_experts(weights, [_names(name, module)], scaling)
    magnitude: Any = None
    if module.magnitude is not None:
        if not dora:
            where = weights.where(module.magnitude)
            raise UnsupportedError(where, "a DoRA magnitude", "none, as use_dora is not set")
        magnitude = weights.tensor(module.magnitude, 1)
        if magnitude.shape[0] != experts.b.shape[0]:
            expected = [experts.b.shape[0]]
            raise ShapeError(weights.where(module.magnitude), list(magnitude.shape), expected)
    return LinearMixture(experts, Constant((1.0,)), magnitude=magnitude)


def _warnings(
    target_modules: list[str] | None, modules: Collection[str], *, lost_magnitudes: bool
) -> tuple[str, ...]:
    warnings = targets.unused(target_modules, modules)
    if lost_magnitudes:
        warnings += ("use_dora is set but no magnitudes are saved: served as plain LoRA",)
    return warnings
