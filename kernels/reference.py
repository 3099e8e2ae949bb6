"""The formulas, written down plainly: what every backend must compute.

Expert by expert, in float32, with no thought of speed. Tests compare the backends against this, and
`molehill.engine.hf.reference` runs it on a Transformers model.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from molehill.kernels.activation import ACTIVATIONS, gated
from molehill.kernels.mixture import (
    Experts,
    FfnMixture,
    LinearMixture,
    Reflection,
    RoutedMixture,
    ScaleMixture,
)
from molehill.kernels.policy import Policy, Routing


def logits(x: Tensor, router: Tensor) -> Tensor:
    """x G^T in float32. x `[T, in]`, router `[E + extra rows, in]`: `[T, E + extra rows]`."""
    return x.float() @ router.float().T


def probabilities(x: Tensor, router: Tensor) -> Tensor:
    """p = softmax(x G^T) in float32. x `[T, in]`, router `[E, in]`: `[T, E]`."""
    return torch.softmax(logits(x, router), dim=-1)


def decide(
    x: Tensor, router: Tensor, policy: Policy, parameters: Tensor | None = None
) -> tuple[Tensor, Routing]:
    """Probabilities `[T, E]` and the routing of every token."""
    return policy.decide(logits(x, router), parameters)


def route(
    x: Tensor,
    router: Tensor | None,
    policy: Policy,
    experts: int,
    parameters: Tensor | None = None,
) -> Routing:
    """Gate weights of every token; a mixture without a router has a constant policy."""
    if router is None:
        return policy.route(x.new_full((x.shape[0], experts), 1 / experts, dtype=torch.float32))
    return decide(x, router, policy, parameters)[1]


def _route(x: Tensor, mixture: RoutedMixture) -> Routing:
    return route(x, mixture.router, mixture.policy, mixture.num_experts, mixture.parameters)


def linear_mixture(
    x: Tensor, weight: Tensor, bias: Tensor | None, mixture: LinearMixture
) -> tuple[Tensor, Routing]:
    """y and the routing of one projection. x `[T, in]`, weight `[out, in]`: y `[T, out]` float32.

    FORMATS: LoRA, rsLoRA, DoRA (PEFT; the bias is outside the magnitude), MoLA, LoRAMoE, DynMoLE,
    AdaMoLE, LD-MoLE, GOAT, FlyLoRA, Arrow.
    """
    x, weight = x.float(), weight.float()
    routing = _route(x, mixture)
    y = x @ weight.T
    for e, (a, b) in enumerate(mixture.experts.split()):
        y = y + routing.weights[:, e : e + 1] * (x @ a.float().T @ b.float().T)
    if mixture.magnitude is not None:
        adapted = weight + mixture.experts.b.float() @ mixture.experts.a.float()
        y = y * (mixture.magnitude.float() / adapted.norm(dim=1))
    if mixture.shared is not None:
        y = y + x @ mixture.shared.a.float().T @ mixture.shared.b.float().T
    return (y if bias is None else y + bias.float()), routing


def reflection(
    x: Tensor, weight: Tensor, bias: Tensor | None, mixture: Reflection
) -> tuple[Tensor, Routing]:
    """y = W (x - U A x) + bias, and the routing. x `[T, in]`, weight `[out, in]`: y `[T, out]`."""
    x = x.float()
    y = (x - x @ mixture.a.float().T @ mixture.u.float().T) @ weight.float().T
    return (y if bias is None else y + bias.float()), _route(x, mixture)


def ffn_mixture(
    x: Tensor,
    weights: dict[str, Tensor],
    biases: dict[str, Tensor | None],
    activation: str,
    mixture: FfnMixture,
) -> tuple[Tensor, Routing]:
    """y and the routing of one gated FFN, expert by expert, W_down too. x `[T, d]`: y `[T, d]`.

    activation: the base model's, used when the mixture names none.
    """
    x = x.float()
    routing = _route(x, mixture)
    act = ACTIVATIONS[mixture.activation or activation]

    def project(name: str, e: int, value: Tensor) -> Tensor:
        weight, bias = weights[name].float(), biases[name]
        y = F.linear(value, weight)
        if name in mixture.experts:
            a, b = (half.float() for half in mixture.experts[name].split()[e])
            y = y + value @ a.T @ b.T
            if name in mixture.magnitudes:
                y = y * (mixture.magnitudes[name][e].float() / (weight + b @ a).norm(dim=1))
        return y if bias is None else y + bias.float()

    y = torch.zeros_like(x)
    for e in range(mixture.num_experts):
        hidden = act(project("gate_proj", e, x)) * project("up_proj", e, x)
        y = y + routing.weights[:, e : e + 1] * project("down_proj", e, hidden)
    return y, routing


def scale_mixture(u: Tensor, mixture: ScaleMixture) -> tuple[Tensor, Routing]:
    """u times the mixed vectors, and the routing of each head. u `[T, heads * width]`: y the same.

    The routing's leading axes are `[T, heads]`.
    """
    heads = split_heads(u.float(), mixture.num_heads)
    routing = route(heads.flatten(0, 1), mixture.router, mixture.policy, mixture.num_experts)
    routing = Routing(*(tensor.unflatten(0, heads.shape[:2]) for tensor in routing))
    factor = torch.einsum("the,hew->thw", routing.weights, mixture.vectors.float())
    return (heads * factor).flatten(1), routing


def split_heads(u: Tensor, heads: int) -> Tensor:
    """`[T, heads * width]` as `[T, heads, width]`."""
    split: Tensor = u.unflatten(1, (heads, -1))
    return split


def moe_experts(
    x: Tensor,
    gate_weights: Tensor,
    chosen: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    deltas: Mapping[str, Experts],
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """y `[T, d]` float32 of the experts of a base MoE block with LoRA on them, token by token.

    y = sum_k w_k W'_down(act(W'_gate x) * (W'_up x)) with W' = W + B A of the chosen expert; the
    base's router decides (DR-LoRA, arXiv 2601.04823). x `[T, d]`, gate_weights and chosen
    `[T, k]`, gate_up `[E, 2 I, d]`, down `[E, d, I]`. activation: as `activation.gated` takes it,
    which says what stands in the place of act(.) * (.). deltas: by projection (`gate_proj`,
    `up_proj`, `down_proj`), the rank of base expert e in its `ranks[e]`. gate_up_bias `[E, 2 I]`,
    down_bias `[E, d]`: what the base adds to the three products.
    """
    activate = gated(activation)
    pairs = {name: experts.split() for name, experts in deltas.items()}

    def project(name: str, e: int, weight: Tensor, bias: Tensor | None, value: Tensor) -> Tensor:
        y = weight.float() @ value
        if bias is not None:
            y = y + bias.float()
        if name in pairs:
            a, b = pairs[name][e]
            y = y + b.float() @ (a.float() @ value)
        return y

    y = torch.zeros(x.shape, dtype=torch.float32)
    for t, token in enumerate(x.float()):
        for weight, expert in zip(gate_weights[t].tolist(), chosen[t].tolist(), strict=True):
            gate, up = gate_up[expert].chunk(2)
            biases = (None, None) if gate_up_bias is None else gate_up_bias[expert].chunk(2)
            hidden = activate(
                project("gate_proj", expert, gate, biases[0], token),
                project("up_proj", expert, up, biases[1], token),
            )
            bias = None if down_bias is None else down_bias[expert]
            y[t] += weight * project("down_proj", expert, down[expert], bias, hidden)
    return y
