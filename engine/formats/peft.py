"""LoRA, rsLoRA and DoRA as Hugging Face PEFT writes them (and MoE-PEFT its plain LoRA).

Keys: `base_model.model.model.layers.{i}.{block}.{proj}.lora_A.weight`, `.lora_B.weight`,
`.lora_magnitude_vector` (with `.weight` from some versions).
"""

import re
from dataclasses import dataclass, field
from typing import Any

from molehill.engine.adapter import Adapter
from molehill.engine.errors import (
    ConfigError,
    CorruptFileError,
    MissingTensorError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.formats import targets
from molehill.engine.formats.fields import Fields
from molehill.engine.formats.files import Weights
from molehill.engine.formats.lowrank import Pair, Scaling, build_experts
from molehill.kernels.mixture import LinearMixture
from molehill.kernels.policy import Constant

_KEY = re.compile(
    r"base_model\.model\.(?P<module>(?:model\.)?layers\.(?:0|[1-9]\d{0,4})\.[\w.]+?)"
    r"\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)(?:(?<=vector)\.weight)?"
)
_PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}

# Fields that change the forward pass or the base weights; serving without them would be wrong.
UNSERVED = {
    "fan_in_fan_out": "transposed weights",
    "modules_to_save": "whole modules",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapted parameters that are no linear's weight",
    "lora_bias": "a bias in lora_B",
    "alora_invocation_tokens": "an activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing, which a molehill_mix.json sets up",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
_FORKS = {
    "lora_nums": "a mixture (LoRAMoE, HydraLoRA or LD-MoLE) without its tensors",
    "sparsegen": "LD-MoLE's router",
}
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass
class _Module:
    """The names, in the file, of one linear's tensors."""

    a: str | None = None
    b: str | None = None
    magnitude: str | None = None


@dataclass(frozen=True)
class _Scalings:
    """`r` and `lora_alpha` with their exceptions by module name."""

    rank: int
    alpha: float
    rslora: bool
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def of(self, module: str) -> Scaling:
        """PEFT's rule: the first pattern that matches the end of the module's name."""
        rank = next((r for p, r in self.ranks.items() if _matches(p, module)), self.rank)
        alpha = next((a for p, a in self.alphas.items() if _matches(p, module)), self.alpha)
        return Scaling(alpha, rank, self.rslora)


def read(config: Fields, weights: Weights) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    _refuse(config)
    scalings = _read_scalings(config)
    wanted = targets.read_targets(config)
    modules = _group(weights)
    names = [name.removeprefix("model.") for name in modules]
    targets.check_targeted(weights.file, names, wanted)
    if not config.has("layers_to_transform") and wanted and not any("." in t for t in wanted):
        targets.check_siblings(weights.file, names)
    dora = config.flag("use_dora")
    if dora:
        _check_magnitudes(weights, modules)
    sites = {
        name.removeprefix("model."): _mixture(weights, name, module, scalings.of(name), dora)
        for name, module in modules.items()
    }
    magnitudes = any(mixture.magnitude is not None for mixture in sites.values())
    return Adapter(
        kind="dora" if magnitudes else "lora",
        sites=sites,
        base_model=config.text("base_model_name_or_path"),
        warnings=_warnings(wanted, names, lost_magnitudes=dora and not magnitudes),
    )


def factors(config: Fields, weights: Weights) -> dict[str, float]:
    """What `read` multiplies B by, alpha / r for a LoRA, by canonical module name."""
    scalings = _read_scalings(config)
    return {name.removeprefix("model."): scalings.of(name).factor for name in _group(weights)}


def _refuse(config: Fields) -> None:
    config.refuse({**UNSERVED, **_FORKS})
    initialisation = config.values.get("init_lora_weights")
    if initialisation not in _INITIALISATIONS:
        raise UnsupportedError(
            f"{config.where}: init_lora_weights",
            f"{initialisation}, which changes the base weights",
            "an initialisation that leaves them alone",
        )


def _read_scalings(config: Fields) -> _Scalings:
    ranks, alphas = config.object("rank_pattern"), config.object("alpha_pattern")
    for pattern in [*ranks.values, *alphas.values]:
        _check_pattern(config, pattern)
    return _Scalings(
        rank=config.integer("r"),
        alpha=config.number("lora_alpha", above=0),
        rslora=config.flag("use_rslora"),
        ranks={pattern: ranks.integer(pattern) for pattern in ranks.values},
        alphas={pattern: alphas.number(pattern, above=0) for pattern in alphas.values},
    )


def _check_pattern(config: Fields, pattern: str) -> None:
    """Two repetitions, or many alternatives, can take a regular expression forever."""
    if len(re.findall(r"[*+?{]", pattern)) > 1 or pattern.count("|") > 8:
        expected = "at most one repetition and 8 alternatives"
        raise UnsupportedError(
            f"{config.where}: pattern {pattern[:80]!r}", "a complex one", expected
        )
    try:
        re.compile(pattern)
    except re.error as error:
        where = f"{config.where}: pattern {pattern[:80]!r}"
        raise ConfigError(where, error, "a regular expression") from None


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _group(weights: Weights) -> dict[str, _Module]:
    modules: dict[str, _Module] = {}
    for key in weights.tensors:
        match = _KEY.fullmatch(key)
        if match is None:
            expected = "lora_A.weight, lora_B.weight or lora_magnitude_vector of a layer's linear"
            raise UnsupportedError(weights.where(key), "an unknown tensor", expected)
        module, part = match["module"], _PARTS[match["part"]]
        names = modules.setdefault(module, _Module())
        if getattr(names, part) is not None:
            raise CorruptFileError(weights.where(key), "a second tensor of this part", "one")
        setattr(names, part, key)
    for name in modules:
        if f"model.{name}" in modules:
            raise CorruptFileError(weights.where(name), "two spellings of one module", "one")
    return modules


def _check_magnitudes(weights: Weights, modules: dict[str, _Module]) -> None:
    """MoE-PEFT saves no magnitude at all; PEFT saves one for every module."""
    without = [name for name, module in modules.items() if module.magnitude is None]
    if without and len(without) < len(modules):
        where = weights.where(f"base_model.model.{without[0]}.lora_magnitude_vector")
        raise MissingTensorError(where, "no such tensor", "one, as other modules have")


def _mixture(
    weights: Weights, name: str, module: _Module, scaling: Scaling, dora: bool
) -> LinearMixture:
    stem = f"base_model.model.{name}"
    pair = Pair(module.a or f"{stem}.lora_A.weight", module.b or f"{stem}.lora_B.weight")
    experts = build_experts(weights, [pair], scaling)
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
    wanted: list[str] | None, names: list[str], *, lost_magnitudes: bool
) -> tuple[str, ...]:
    warnings = targets.unused(wanted, names)
    if lost_magnitudes:
        warnings += ("use_dora is set but no magnitudes are saved: served as plain LoRA",)
    return warnings
