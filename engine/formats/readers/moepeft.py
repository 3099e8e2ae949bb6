"""MixLoRA, MoLA, LoRAMoE and DynMoLE as MoE-PEFT and the official DynMoLE code write them.

Keys: `{method}.layers.{i}.{block}.{proj}.` with `lora_A.weight`, `lora_B.weight` (plain LoRA) or
`experts.{e}.lora_A.weight`, `.lora_B.weight`, and `moe_gate.weight` `[E, in]` on the linear
(on `mlp` for MixLoRA).

These codes train DoRA but never save its magnitudes. molehill reads them where PEFT would put them,
`lora_magnitude_vector` `[out]` beside a plain LoRA's `lora_A` or that of an expert inside an FFN.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from molehill.engine.adapter.errors import MissingTensorError, ShapeError, UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.io.fields import Fields
from molehill.engine.formats.io.files import Weights
from molehill.engine.formats.readers import known, saved_modules, targets
from molehill.engine.formats.readers.lowrank import (
    PairNames,
    Scaling,
    build_experts,
    read_router,
    read_scaling,
)
from molehill.engine.formats.readers.policies import STRATEGIES
from molehill.engine.formats.readers.reader import PEFT_FILES, AdapterFiles, Reader
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture, Mixture
from molehill.kernels.policy import Constant, Policy

_KEY = re.compile(
    r"(?P<module>layers\.(?:0|[1-9]\d{0,4})\.\w+(?:\.\w+)?)\."
    r"(?:(?P<gate>moe_gate)\.weight|(?:experts\.(?P<expert>0|[1-9]\d{0,5})\.)?"
    r"(?:lora_(?P<half>[AB])\.weight|(?P<magnitude>lora_magnitude_vector)))"
)
_FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_FUSED = "gate_up_proj"


@dataclass
class _Module:
    """The names, in the file, of one module's tensors; a plain LoRA's pair has no expert."""

    gate: str | None = None
    halves: dict[tuple[int | None, str], str] = field(default_factory=dict)
    magnitudes: dict[int | None, str] = field(default_factory=dict)

    @property
    def experts(self) -> list[int]:
        return sorted({expert for expert, _ in self.halves if expert is not None})

    @property
    def plain(self) -> bool:
        return any(expert is None for expert, _ in self.halves)


@dataclass(frozen=True)
class _Source:
    """What building a site needs: the file, its prefix and what the config says.

    plain_dora, expert_dora: whether a plain LoRA or an expert may have a magnitude.
    """

    weights: Weights
    prefix: str
    plain: Scaling
    expert: Scaling
    policy: Policy
    num_experts: int | None
    plain_dora: bool
    expert_dora: bool


def read(files: AdapterFiles) -> Adapter:
    """Raises an AdapterError for whatever cannot be served exactly."""
    config = files.config
    method = str(config.values["peft_type"]).lower()
    strategy = _strategy(config, method)
    policy = STRATEGIES[strategy](config)
    scaling = read_scaling(config)
    expert_scaling = _expert_scaling(config, scaling)
    target_modules = targets.read_targets(config)
    weights = files.weights
    modules = _group(weights, f"{method}.")
    num_experts = config.integer("num_experts") if config.has("num_experts") else None
    dora = config.flag("use_dora")
    expert_dora = (
        config.object("expert_lora").flag("use_dora") if config.has("expert_lora") else dora
    )
    source = _Source(
        weights, f"{method}.", scaling, expert_scaling, policy, num_experts, dora, expert_dora
    )
    adapted = [name for name, module in modules.items() if module.halves]
    targets.check_targeted(weights.file, adapted, target_modules)
    targets.check_every_layer(weights.file, adapted, files.base)
    warnings = targets.unused(target_modules, adapted) + _dora_warnings(source, modules)
    warnings += saved_modules.check(config, weights)
    warnings += known.warnings(config, known.FIELDS[strategy])
    warnings += known.warnings(config.object("expert_lora"), known.EXPERT_LORA)
    if method == "mixlora":
        sites, ffn_warnings = _mixlora_sites(source, modules, config.text("act_fn"))
        warnings += ffn_warnings
    else:
        sites = {name: _linear(source, name, module) for name, module in modules.items()}
    return Adapter(method, sites, config.text("base_model_name_or_path"), warnings)


READER = Reader(PEFT_FILES, read, peft_types=("MIXLORA", "MOLA", "LORAMOE", "DYNMOLE"))


def _strategy(config: Fields, method: str) -> str:
    if not config.has("routing_strategy") and method != "mixlora":
        return method
    known = [name for name in STRATEGIES if name.split("-")[0] == method]
    strategy = config.text("routing_strategy")
    if strategy is None:
        raise config.error("routing_strategy", f"one of {', '.join(known)}")
    if strategy not in known:
        expected = f"one of {', '.join(known)} for peft_type {method.upper()}"
        raise UnsupportedError(f"{config.where}: routing_strategy", strategy, expected)
    return strategy


def _expert_scaling(config: Fields, scaling: Scaling) -> Scaling:
    """MixLoRA's `expert_lora` is a LoRA config of its own, for the experts only."""
    return read_scaling(config.object("expert_lora")) if config.has("expert_lora") else scaling


def _dora_warnings(source: _Source, modules: dict[str, _Module]) -> tuple[str, ...]:
    """Without saved magnitudes the trainer starts from the adapted weight's norm: a factor of 1."""
    lost = [
        name
        for name, module in modules.items()
        if module.halves and (source.plain_dora if module.plain else source.expert_dora)
        if not module.magnitudes
    ]
    if not lost:
        return ()
    some = any(module.magnitudes for module in modules.values())
    where = f" for {min(lost)} and {len(lost) - 1} more" if some else ""
    return (f"use_dora is set but no magnitudes are saved{where}: served as plain LoRA",)


def _group(weights: Weights, prefix: str) -> dict[str, _Module]:
    modules: dict[str, _Module] = {}
    for key in weights.tensors:
        if key == "classifier":
            expected = "a causal language model's adapter"
            raise UnsupportedError(weights.where(key), "a classification head", expected)
        match = _KEY.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if match is None:
            expected = f"{prefix}layers.N... moe_gate, or lora_A, lora_B of experts.E"
            raise UnsupportedError(weights.where(key), "an unknown tensor", expected)
        module = modules.setdefault(match["module"], _Module())
        if match["gate"]:
            module.gate = key
        else:
            expert = None if match["expert"] is None else int(match["expert"])
            if match["magnitude"]:
                module.magnitudes[expert] = key
            else:
                module.halves[expert, match["half"]] = key
    return modules


def _linear(source: _Source, name: str, module: _Module) -> LinearMixture:
    if module.plain and module.gate is None and not module.experts:
        return _plain(source, name, module)
    gate = f"{source.prefix}{name}.moe_gate.weight"
    for key in module.magnitudes.values():
        where = source.weights.where(key)
        raise UnsupportedError(where, "a magnitude beside a router", "experts inside an FFN")
    if module.plain:
        where = source.weights.where(f"{source.prefix}{name}")
        raise UnsupportedError(where, "a plain LoRA beside experts", "one of the two")
    experts = _experts(source, name, module, gate)
    return LinearMixture(
        experts, source.policy, read_router(source.weights, gate, experts.a.shape[1])
    )


def _plain(source: _Source, name: str, module: _Module) -> LinearMixture:
    stem = f"{source.prefix}{name}"
    pair = PairNames(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight")
    experts = build_experts(source.weights, [pair], source.plain)
    magnitude = None
    if module.magnitudes:
        (magnitude,) = _magnitudes(source, module, {None: stem}, experts, dora=source.plain_dora)
    return LinearMixture(experts, Constant((1.0,)), magnitude=magnitude)


def _magnitudes(
    source: _Source,
    module: _Module,
    stems: Mapping[int | None, str],
    experts: Experts,
    *,
    dora: bool,
) -> Tensor:
    """DoRA's, one row for each of `stems`: `[E, out]`. All experts of a projection or none."""
    weights, rows = source.weights, []
    for expert, key in module.magnitudes.items():
        if not dora or expert not in stems:
            expected = "one of an expert that has lora_A" if dora else "none, without use_dora"
            raise UnsupportedError(weights.where(key), "a DoRA magnitude", expected)
    for expert, stem in stems.items():
        name = f"{stem}.lora_magnitude_vector"
        rows.append(weights.tensor(module.magnitudes.get(expert, name), 1))
        if rows[-1].shape[0] != experts.b.shape[0]:
            expected = str([experts.b.shape[0]])
            raise ShapeError(weights.where(name), list(rows[-1].shape), expected)
    return torch.stack(rows)


def _experts(source: _Source, name: str, module: _Module, gate: str) -> Experts:
    """As many experts as the gate has rows, numbered from 0."""
    weights = source.weights
    rows = weights.tensor(gate, 2).shape[0]
    if source.num_experts not in (None, rows):
        raise ShapeError(
            weights.where(gate), f"{rows} experts", f"num_experts {source.num_experts}"
        )
    if module.experts and module.experts[-1] >= rows:
        where = weights.where(f"{source.prefix}{name}.experts.{module.experts[-1]}")
        raise ShapeError(where, f"expert {module.experts[-1]}", f"the gate's {rows} experts")
    pairs = []
    for e in range(rows):
        stem = f"{source.prefix}{name}.experts.{e}"
        if e not in module.experts:
            raise MissingTensorError(weights.where(stem), "no tensors", f"experts 0 to {rows - 1}")
        pairs.append(PairNames(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"))
    return build_experts(weights, pairs, source.expert)


def _mixlora_sites(
    source: _Source, modules: dict[str, _Module], activation: str | None
) -> tuple[dict[str, Mixture], tuple[str, ...]]:
    """FFN experts under one gate each, plain LoRA elsewhere."""
    sites: dict[str, Mixture] = {}
    ffns: dict[str, dict[str, _Module]] = {}
    for name, module in modules.items():
        block, _, projection = name.rpartition(".")
        if module.gate is not None and module.halves:
            where = source.weights.where(module.gate)
            raise UnsupportedError(where, "a gate on a linear", "one gate per FFN (MixLoRA)")
        if module.gate is not None:
            ffns.setdefault(name, {})
        elif module.experts:
            ffns.setdefault(block, {})[projection] = module
        else:
            sites[name] = _plain(source, name, module)
    targeted = [name for name in ffns if ffns[name]]
    if ffns and not targeted:
        return sites, ("gates without experts (no FFN linear is targeted) have no effect",)
    for name in ffns:
        sites[name] = _ffn(source, name, ffns[name], activation)
    return sites, ()


def _ffn(
    source: _Source, name: str, modules: dict[str, _Module], activation: str | None
) -> FfnMixture:
    gate = f"{source.prefix}{name}.moe_gate.weight"
    experts: dict[str, Experts] = {}
    magnitudes: dict[str, Tensor] = {}
    for projection, module in modules.items():
        where = source.weights.where(f"{source.prefix}{name}.{projection}")
        if projection not in (*_FFN_PROJECTIONS, _FUSED):
            expected = f"one of {', '.join(_FFN_PROJECTIONS)}, or {_FUSED} and down_proj"
            raise UnsupportedError(where, "experts in an ungated or unknown FFN", expected)
        if module.plain:
            raise UnsupportedError(where, "a plain LoRA beside experts", "one of the two")
        stack = _experts(source, f"{name}.{projection}", module, gate)
        for part, pair in _halves(where, stack) if projection == _FUSED else [(projection, stack)]:
            if part in experts:
                raise UnsupportedError(where, f"{_FUSED} beside {part}", "one of the two")
            experts[part] = pair
        if module.magnitudes:
            if projection == _FUSED:
                raise UnsupportedError(where, f"magnitudes of {_FUSED}", "separate projections")
            stem = f"{source.prefix}{name}.{projection}.experts"
            stems: dict[int | None, str] = {e: f"{stem}.{e}" for e in range(len(stack.ranks))}
            magnitudes[projection] = _magnitudes(
                source, module, stems, stack, dora=source.expert_dora
            )
    if not experts:
        where = source.weights.where(gate)
        raise MissingTensorError(where, "a gate without experts", "experts, as other layers have")
    inputs = source.weights.tensor(gate, 2).shape[1]
    router = read_router(source.weights, gate, _ffn_inputs(experts, inputs))
    return FfnMixture(experts, source.policy, router, activation, magnitudes=magnitudes)


def _halves(where: str, fused: Experts) -> list[tuple[str, Experts]]:
    """Gate and up of Phi-3's gate_up_proj: all gates before all ups, and one A for both."""
    if fused.b.shape[0] % 2:
        raise ShapeError(where, f"{fused.b.shape[0]} outputs", "as many gates as ups")
    gate, up = fused.b.chunk(2)
    return [
        ("gate_proj", Experts(fused.a, gate.contiguous(), fused.ranks)),
        ("up_proj", Experts(fused.a, up.contiguous(), fused.ranks)),
    ]


def _ffn_inputs(experts: dict[str, Experts], default: int) -> int:
    for projection in ("gate_proj", "up_proj"):
        if projection in experts:
            return experts[projection].a.shape[1]
    return experts["down_proj"].b.shape[0] if "down_proj" in experts else default
