"""The slow, exact reference: a canonical adapter on a plain Transformers causal LM.

Every adapted module computes `molehill.kernels.reference` in float32, expert by expert, with no
thought of speed. What the engine serves is compared against this.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from molehill.engine.adapter import expert_pairs, expert_sites
from molehill.engine.adapter.errors import UnknownTargetError, UnsupportedError
from molehill.engine.adapter.model import Adapter, TokenAdapters
from molehill.engine.adapter.vocabulary_sites import EMBEDDINGS
from molehill.engine.hf.classified import with_classifier
from molehill.engine.hf.shapes import activation, canonical_name, fused_experts, is_router
from molehill.kernels.activation import SWIGLUOAI
from molehill.kernels.interface import Trace
from molehill.kernels.mixture import (
    Bias,
    ClassifierMixture,
    Experts,
    FfnMixture,
    LinearMixture,
    Mixture,
    Reflection,
    RoutedMixture,
    ScaleMixture,
    VocabularyRows,
)
from molehill.kernels.policy import Routing
from molehill.kernels.reference import (
    decide,
    ffn_mixture,
    linear_mixture,
    moe_experts,
    reflection,
    scale_mixture,
    split_heads,
)

# y, the routing, and what the router read.
_Apply = Callable[[Tensor], tuple[Tensor, Routing, Tensor]]
# y; of a router of the base's, a tuple of tensors.
_Forward = Callable[..., Any]


@contextmanager
def attach(
    model: nn.Module,
    adapter: Adapter,
    trace: dict[str, list[Trace]] | None = None,
    start: int = 0,
    prompt: int | None = None,
) -> Iterator[nn.Module]:
    """The model with the adapter on it, inside the `with` block; as it was afterwards.

    trace: gets, by site, one Trace per forward of each routed site: probabilities and weights
    `[tokens, E]`, entropy `[tokens]`, tokens of all sequences of the batch in a row, with an axis
    of heads after the tokens where a router reads heads. start: the position of each sequence, all
    of them from 0 on in one forward, from which on the adapter acts: an activated one's offset.
    The classifier of an X-LoRA is none of them. prompt: how many tokens of each sequence are the
    prompt; the rest is an answer, of which an X-LoRA may have some with another token's scalings.
    None: all are. Raises UnknownTargetError for a site that the model lacks.
    """
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    if adapter.by_token is not None:
        with _by_token(model, adapter.by_token, modules, start):
            yield model
        return
    if adapter.classifier is not None:
        _check_modules(model, adapter.sites, modules)
        with with_classifier(model, adapter, modules, prompt):
            yield model
        return
    on_experts = _on_fused_experts(adapter, modules)
    sites = {
        site: mixture
        for site, mixture in adapter.sites.items()
        if site not in on_experts and not isinstance(mixture, ClassifierMixture)
    }
    _check_modules(model, (*sites, *adapter.rows, *adapter.biases), modules)
    with ExitStack() as stack:
        for site, table in adapter.rows.items():
            stack.enter_context(_with_rows(modules[site], table))
        for site, mixture in sites.items():
            module = modules[site]
            with _with_bias(module, adapter.biases.get(site)):
                applied = _adapted_forward(site, module, mixture, model, trace)
            module.forward = _from(start, module.forward, applied)
            stack.callback(delattr, module, "forward")
        for site in adapter.biases.keys() - sites.keys():
            module = modules[site]
            with _with_bias(module, adapter.biases[site]):
                module.forward = _from(start, module.forward, _biased(module))
            stack.callback(delattr, module, "forward")
        for block, projections in expert_pairs.group(on_experts).items():
            module = modules[f"{block}.experts"]
            applied = _moe_forward(module, projections, activation(model.config))
            module.forward = _from(start, module.forward, applied)
            stack.callback(delattr, module, "forward")
        yield model


def _check_modules(
    model: nn.Module, sites: Iterable[str], modules: Mapping[str, nn.Module]
) -> None:
    for site in sites:
        if site not in modules:
            raise UnknownTargetError(site, "no such module", f"one of {type(model).__name__}'s")


@contextmanager
def _by_token(
    model: nn.Module, by_token: TokenAdapters, modules: Mapping[str, nn.Module], start: int
) -> Iterator[None]:
    """Every module as each of the adapters has it, and of those the rows of its tokens."""
    ids: list[Tensor] = []
    embedding = next(modules[name] for name in EMBEDDINGS if name in modules)
    hook = embedding.register_forward_pre_hook(lambda _, args: ids.__setitem__(slice(None), args))
    members = list(by_token.adapters.values())
    forwards: dict[str, dict[int, _Forward]] = {}
    for i, member in enumerate(members):
        with attach(model, member):
            for site, module in modules.items():
                if "forward" in vars(module):
                    forwards.setdefault(site, {})[i] = module.forward
    with ExitStack() as stack:
        stack.callback(hook.remove)
        for site, by_member in forwards.items():
            module = modules[site]
            chosen = _chosen(module.forward, by_member, by_token, ids)
            module.forward = _from(start, module.forward, chosen)
            stack.callback(delattr, module, "forward")
        yield


def _chosen(
    base: _Forward, by_member: Mapping[int, _Forward], by_token: TokenAdapters, ids: list[Tensor]
) -> _Forward:
    """The base's rows, but those of tokens whose adapter changes the module."""

    def select(adapters: Tensor, i: int, adapted: Tensor, others: Tensor) -> Tensor:
        return torch.where((adapters == i).view(*others.shape[:-1], 1), adapted, others)

    def forward(x: Tensor, *args: Tensor) -> Any:
        adapters, result = by_token.of(ids[0]), base(x, *args)
        for i, member in by_member.items():
            adapted = member(x, *args)
            if isinstance(result, Tensor):
                result = select(adapters, i, adapted, result)
            else:
                pairs = zip(adapted, result, strict=True)
                result = tuple(select(adapters, i, a, r) for a, r in pairs)
        return result

    return forward


@contextmanager
def _with_rows(module: nn.Module, table: VocabularyRows) -> Iterator[None]:
    """The embedding or the head with rows of the adapter's, of added tokens too; what is tied to it
    stays as it is."""
    before = module.get_parameter("weight")
    added = max(0, int(table.ids.max()) + 1 - len(before))
    after = F.pad(before.detach(), (0, 0, 0, added)).clone()
    after[table.ids] = table.rows.to(before.dtype)
    module.weight = nn.Parameter(after, requires_grad=False)
    try:
        yield
    finally:
        module.weight = before


def _adapted_forward(
    site: str,
    module: nn.Module,
    mixture: RoutedMixture,
    model: nn.Module,
    trace: dict[str, list[Trace]] | None,
) -> _Forward:
    if is_router(module):
        return _router_forward(site, module, mixture)
    if isinstance(module, nn.Embedding):
        return _embedding_forward(site, module, mixture)
    return _forward(site, mixture, _apply(module, mixture, model), trace)


def _embedding_forward(site: str, module: nn.Embedding, mixture: RoutedMixture) -> _Forward:
    """W + (B A)^T looked up; by some models times a scale."""
    weights = mixture.policy.constant_weights
    if not isinstance(mixture, LinearMixture) or weights is None or mixture.magnitude is not None:
        raise UnsupportedError(site, "a mixture or DoRA on the embedding", "plain LoRA")
    base, scale = module.forward, getattr(module, "embed_scale", None)
    pairs = list(zip(weights, mixture.experts.split(), strict=True))

    def forward(ids: Tensor) -> Tensor:
        y: Tensor = base(ids)
        delta = torch.zeros(y.shape, dtype=torch.float32)
        for weight, (a, b) in pairs:
            delta += weight * (F.embedding(ids, a.T) @ b.T)
        return (y.float() + (delta if scale is None else delta * scale.float())).to(y.dtype)

    return forward


@contextmanager
def _with_bias(module: nn.Module, bias: Bias | None) -> Iterator[None]:
    """The module with the adapter's bias while what is to take its place is made."""
    if bias is None:
        yield
        return
    if not isinstance(module, nn.Linear | Conv1D):
        found = f"a bias on a {type(module).__name__} of Transformers"
        raise UnsupportedError("bias", found, "one on a linear")
    before = module.bias
    whole = bias.whole(before)
    assert whole is not None
    module.bias = nn.Parameter(whole, requires_grad=False)
    try:
        yield
    finally:
        module.bias = before


def _biased(module: nn.Module) -> _Forward:
    linear = _linear(module)
    return lambda x: linear(x).to(x.dtype)


def _router_forward(site: str, module: nn.Module, mixture: RoutedMixture) -> _Forward:
    """That of a router of the base's, which does more than multiply, with W + B A inside."""
    weights = mixture.policy.constant_weights
    if not isinstance(mixture, LinearMixture) or weights is None or mixture.magnitude is not None:
        raise UnsupportedError(site, "a mixture or DoRA on the base's router", "plain LoRA")
    base, before = module.forward, module.get_parameter("weight")
    pairs = zip(weights, mixture.experts.split(), strict=True)
    delta = sum(weight * (b @ a) for weight, (a, b) in pairs)
    after = nn.Parameter((before.float() + delta).to(before.dtype), requires_grad=False)

    def forward(x: Tensor) -> Any:
        module.weight = after
        try:
            return base(x)
        finally:
            module.weight = before

    return forward


def _from(start: int, base: _Forward, adapted: _Forward) -> _Forward:
    """`adapted` from position `start` on, `base` before it."""

    # Of `[..., positions, width]`; experts and their router get the positions of one sequence.
    def joined(before: Tensor, after: Tensor) -> Tensor:
        return torch.cat([before[..., :start, :], after[..., start:, :]], dim=-2)

    def forward(x: Tensor, *args: Tensor) -> Any:
        before, after = base(x, *args), adapted(x, *args)
        if isinstance(after, Tensor):
            return joined(before, after)
        return tuple(map(joined, before, after))

    return forward if start else adapted


def _on_fused_experts(adapter: Adapter, modules: dict[str, nn.Module]) -> dict[str, Mixture]:
    """The sites on experts that the model holds in fused parameters, and not as linears."""
    result = {}
    for name, mixture in adapter.sites.items():
        site = expert_sites.split(name)
        block = modules.get(f"{site.block}.experts") if site else None
        sizes = fused_experts(block) if block else None
        if site and sizes and site.expert < sizes.experts:
            result[name] = mixture
    return result


def _moe_forward(
    module: nn.Module, projections: dict[str, dict[int, Experts]], activation: str
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    gate_up: Tensor = module.get_parameter("gate_up_proj")
    down: Tensor = module.get_parameter("down_proj")
    sizes = fused_experts(module)
    assert sizes is not None
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    if sizes.interleaved:
        activation = SWIGLUOAI
        gate_up, down = _gates_first(gate_up).transpose(1, 2), down.transpose(1, 2)
        bias = _gates_first(module.get_parameter("gate_up_proj_bias"))
        biases = (bias, module.get_parameter("down_proj_bias"))
    deltas = {name: expert_pairs.stack(pairs, len(down)) for name, pairs in projections.items()}

    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = moe_experts(x, weights, chosen, gate_up, down, activation, deltas, *biases)
        return y.to(x.dtype)

    return forward


def _gates_first(gate_up: Tensor) -> Tensor:
    """`[..., 2 I]`, gate and up in turn, with all gates before all ups."""
    return torch.cat([gate_up[..., ::2], gate_up[..., 1::2]], dim=-1)


def _forward(
    site: str, mixture: RoutedMixture, apply: _Apply, trace: dict[str, list[Trace]] | None
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


def _apply(module: nn.Module, mixture: RoutedMixture, model: nn.Module) -> _Apply:
    if isinstance(mixture, LinearMixture):
        return _apply_linear(module, mixture)
    if isinstance(mixture, Reflection):
        return _apply_reflection(module, mixture)
    if isinstance(mixture, ScaleMixture):
        return (
            _apply_output(module, mixture)
            if mixture.of == "output"
            else _apply_input(module, mixture)
        )
    return _apply_ffn(module, mixture, activation(model.config))


def _apply_linear(module: nn.Module, mixture: LinearMixture) -> _Apply:
    weight, bias = _weight(module)
    return lambda x: (*linear_mixture(x, weight, bias, mixture), x)


def _apply_reflection(module: nn.Module, mixture: Reflection) -> _Apply:
    weight, bias = _weight(module)
    return lambda x: (*reflection(x, weight, bias, mixture), x)


def _apply_output(module: nn.Module, mixture: ScaleMixture) -> _Apply:
    linear = _linear(module)

    def apply(x: Tensor) -> tuple[Tensor, Routing, Tensor]:
        u = linear(x)
        return *scale_mixture(u, mixture), split_heads(u, mixture.num_heads)

    return apply


def _apply_input(module: nn.Module, mixture: ScaleMixture) -> _Apply:
    linear = _linear(module)

    def apply(x: Tensor) -> tuple[Tensor, Routing, Tensor]:
        scaled, routing = scale_mixture(x, mixture)
        return linear(scaled), Routing(*(tensor.squeeze(1) for tensor in routing)), x

    return apply


def _linear(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module as it is now, in float32."""
    weight, bias = _weight(module)
    return lambda x: F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def _weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """W `[out, in]` and the bias of a linear; GPT-2's Conv1D keeps W^T."""
    assert isinstance(module, nn.Linear | Conv1D)
    return module.weight.T if isinstance(module, Conv1D) else module.weight, module.bias


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
