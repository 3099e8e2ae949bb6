"""The slow, exact reference: a canonical adapter on a plain Transformers causal LM.

Every adapted module computes `molehill.kernels.reference` in float32, expert by expert, with no
thought of speed. What the engine serves is compared against this.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molehill.engine.adapter import expert_pairs, expert_sites
from molehill.engine.adapter.errors import UnknownTargetError
from molehill.engine.adapter.model import Adapter
from molehill.engine.hf.shapes import activation, canonical_name, fused_experts
from molehill.kernels.interface import Trace
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture, Mixture, ScaleMixture
from molehill.kernels.policy import Routing
from molehill.kernels.reference import (
    decide,
    ffn_mixture,
    linear_mixture,
    moe_experts,
    scale_mixture,
    split_heads,
)

# y, the routing, and what the router read.
_Apply = Callable[[Tensor], tuple[Tensor, Routing, Tensor]]
_Forward = Callable[..., Tensor]


@contextmanager
def attach(
    model: nn.Module,
    adapter: Adapter,
    trace: dict[str, list[Trace]] | None = None,
    start: int = 0,
) -> Iterator[nn.Module]:
    """The model with the adapter on it, inside the `with` block; as it was afterwards.

    trace: gets, by site, one Trace per forward of each routed site: probabilities and weights
    `[tokens, E]`, entropy `[tokens]`, tokens of all sequences of the batch in a row, with an axis
    of heads after the tokens where a router reads heads. start: the position of each sequence, all
    of them from 0 on in one forward, from which on the adapter acts: an activated one's offset.
    Raises UnknownTargetError for a site that the model lacks.
    """
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    on_experts = _on_fused_experts(adapter, modules)
    sites = {site: m for site, m in adapter.sites.items() if site not in on_experts}
    for site in sites:
        if site not in modules:
            raise UnknownTargetError(site, "no such module", f"one of {type(model).__name__}'s")
    bound: list[nn.Module] = []
    try:
        for site, mixture in sites.items():
            module = modules[site]
            applied: _Forward = _forward(site, mixture, _apply(module, mixture, model), trace)
            module.forward = _from(start, module.forward, applied)
            bound.append(module)
        for block, projections in expert_pairs.group(on_experts).items():
            module = modules[f"{block}.experts"]
            applied = _moe_forward(module, projections, activation(model.config))
            module.forward = _from(start, module.forward, applied)
            bound.append(module)
        yield model
    finally:
        for module in bound:
            del module.forward


def _from(start: int, base: _Forward, adapted: _Forward) -> _Forward:
    """`adapted` from position `start` on, `base` before it."""

    def forward(x: Tensor, *args: Tensor) -> Tensor:
        y = adapted(x, *args)
        # Of `[..., positions, width]`; experts get the positions of one sequence.
        return torch.cat([base(x, *args)[..., :start, :], y[..., start:, :]], dim=-2)

    return forward if start else adapted


def _on_fused_experts(adapter: Adapter, modules: dict[str, nn.Module]) -> dict[str, Mixture]:
    """The sites on experts that the model holds in fused parameters, and not as linears."""
    found = {}
    for name, mixture in adapter.sites.items():
        site = expert_sites.split(name)
        block = modules.get(f"{site.block}.experts") if site else None
        sizes = fused_experts(block) if block else None
        if site and sizes and site.expert < sizes.experts:
            found[name] = mixture
    return found


def _moe_forward(
    module: nn.Module, projections: dict[str, dict[int, Experts]], activation: str
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    gate_up, down = module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")
    deltas = {name: expert_pairs.stack(pairs, len(down)) for name, pairs in projections.items()}

    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = moe_experts(x, weights, chosen, gate_up, down, activation, deltas)
        return y.to(x.dtype)

    return forward


def _forward(
    site: str, mixture: Mixture, apply: _Apply, trace: dict[str, list[Trace]] | None
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, routing, read = apply(rows)
        if trace is not None and mixture.router is not None:
            decided, _ = decide(read, mixture.router, mixture.policy, mixture.parameters)
            entry = Trace(site, decided, routing.weights, routing.entropy)
            trace.setdefault(site, []).append(entry)
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    return forward


def _apply(module: nn.Module, mixture: Mixture, model: nn.Module) -> _Apply:
    if isinstance(mixture, LinearMixture):
        return _apply_linear(module, mixture)
    if isinstance(mixture, ScaleMixture):
        return (
            _apply_output(module, mixture)
            if mixture.of == "output"
            else _apply_input(module, mixture)
        )
    return _apply_ffn(module, mixture, activation(model.config))


def _apply_linear(module: nn.Module, mixture: LinearMixture) -> _Apply:
    assert isinstance(module, nn.Linear)
    return lambda x: (*linear_mixture(x, module.weight, module.bias, mixture), x)


def _apply_output(module: nn.Module, mixture: ScaleMixture) -> _Apply:
    def apply(x: Tensor) -> tuple[Tensor, Routing, Tensor]:
        u = _linear(module, x)
        return *scale_mixture(u, mixture), split_heads(u, mixture.num_heads)

    return apply


def _apply_input(module: nn.Module, mixture: ScaleMixture) -> _Apply:
    def apply(x: Tensor) -> tuple[Tensor, Routing, Tensor]:
        scaled, routing = scale_mixture(x, mixture)
        return _linear(module, scaled), Routing(*(figure.squeeze(1) for figure in routing)), x

    return apply


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.Linear)
    bias = None if module.bias is None else module.bias.float()
    return F.linear(x.float(), module.weight.float(), bias)


def _apply_ffn(module: nn.Module, mixture: FfnMixture, activation: str) -> _Apply:
    weights, biases = _ffn_parameters(module)
    return lambda x: (*ffn_mixture(x, weights, biases, activation, mixture), x)


def _ffn_parameters(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Weights and biases by projection; a fused gate_up_proj (Phi-3) is taken apart."""
    linears: dict[str, Any] = dict(module.named_children())
    weights = {n: m.weight for n, m in linears.items() if isinstance(m, nn.Linear)}
    biases = {name: linears[name].bias for name in weights}
    if "gate_up_proj" in weights:
        fused, bias = weights.pop("gate_up_proj"), biases.pop("gate_up_proj")
        weights["gate_proj"], weights["up_proj"] = fused.chunk(2)
        halves = (None, None) if bias is None else bias.chunk(2)
        biases["gate_proj"], biases["up_proj"] = halves
    return weights, biases
