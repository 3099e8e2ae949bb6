"""The slow, exact reference: a canonical adapter on a plain Transformers causal LM.

Every adapted module computes `molehill.kernels.definition` in float32, expert by expert, with no
thought of speed. What the engine serves is compared against this.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F

from molehill.engine.adapter import Adapter
from molehill.engine.errors import UnknownTargetError
from molehill.engine.huggingface import canonical_name
from molehill.kernels.backend import Trace
from molehill.kernels.definition import (
    decide,
    ffn_mixture,
    linear_mixture,
    scale_mixture,
    split_heads,
)
from molehill.kernels.mixture import FfnMixture, LinearMixture, Mixture, ScaleMixture
from molehill.kernels.policy import Routing

_FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# y, the routing, and what the router read.
_Apply = Callable[[Tensor], tuple[Tensor, Routing, Tensor]]


@contextmanager
def attach(
    model: nn.Module, adapter: Adapter, trace: dict[str, list[Trace]] | None = None
) -> Iterator[nn.Module]:
    """The model with the adapter on it, inside the `with` block; as it was afterwards.

    trace: gets, by site, one Trace per forward of each routed site: probabilities and weights
    `[tokens, E]`, entropy `[tokens]`, tokens of all sequences of the batch in a row, with an axis
    of heads after the tokens where a router reads heads. Raises
    UnknownTargetError for a site that the model lacks.
    """
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    for site in adapter.sites:
        if site not in modules:
            raise UnknownTargetError(site, "no such module", f"one of {type(model).__name__}'s")
    bound: list[nn.Module] = []
    try:
        for site, mixture in adapter.sites.items():
            module = modules[site]
            module.forward = _forward(site, mixture, _apply(module, mixture, model), trace)
            bound.append(module)
        yield model
    finally:
        for module in bound:
            del module.forward


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
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    return _apply_ffn(module, mixture, activation)


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
    linears = {name: module.get_submodule(name) for name in _FFN_PROJECTIONS}
    weights = {name: linear.weight for name, linear in linears.items()}
    biases = {name: linear.bias for name, linear in linears.items()}
    return lambda x: (
        *ffn_mixture(x, weights, biases, activation, mixture),  # type: ignore[arg-type]
        x,
    )
