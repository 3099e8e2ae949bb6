"""The shapes that serve every method, as data.

Tensors are in `nn.Linear` layout (out, in), float32 unless a backend's serving copy says
otherwise. Scaling (alpha / r) is folded into `b`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from molehill.kernels.policy import Constant, Policy


@dataclass(frozen=True)
class Experts:
    """E low-rank pairs for one linear, stacked: expert e owns `ranks[e]` consecutive rank rows.

    a: `[R, in]`, b: `[out, R]`, R = sum(ranks).
    """

    a: Tensor
    b: Tensor
    ranks: tuple[int, ...]

    @property
    def expert_of_row(self) -> Tensor:
        """int64 `[R]`: the expert that owns each rank row."""
        return torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks))

    def split(self) -> list[tuple[Tensor, Tensor]]:
        """The pairs (A_e `[r_e, in]`, B_e `[out, r_e]`) one by one."""
        return list(zip(self.a.split(self.ranks), self.b.split(self.ranks, dim=1), strict=True))


@dataclass(frozen=True)
class LinearMixture:
    """y = W x + bias + sum_e w_e B_e A_e x + B_s A_s x, for one original projection.

    router: `[E + policy.extra_rows, in]` float32; None when the gate weights are constant.
    parameters: `[policy.num_parameters]` float32; None when there are none.
    magnitude: `[out]`, DoRA's; then y = m / ||W + BA|| * (W x + B A x) + bias.
    shared: one pair B_s A_s that every token gets beside those that the router chooses: what GOAT
    took from W in training, or what takes back from W what another adapter has merged into it.
    """

    experts: Experts
    policy: Policy
    router: Tensor | None = None
    magnitude: Tensor | None = None
    parameters: Tensor | None = None
    shared: Experts | None = None

    @property
    def num_experts(self) -> int:
        return len(self.experts.ranks)


@dataclass(frozen=True)
class FfnMixture:
    """y = sum_e w_e FFN_e(x): one router per FFN, experts inside the non-linearity.

    router: `[E + policy.extra_rows, d]`. parameters: as in LinearMixture.

    experts: by projection (`gate_proj`, `up_proj`, `down_proj`); one that is missing uses W alone.
    activation: name as in a Transformers config (`silu`, `gelu_pytorch_tanh`, ...); None is the
    base model's own.
    magnitudes: `[E, out]` by projection, DoRA's of each expert; then expert e's projection is
    m_e / ||W + B_e A_e|| * (W x + B_e A_e x) + bias.
    """

    experts: Mapping[str, Experts]
    policy: Policy
    router: Tensor
    activation: str | None = None
    parameters: Tensor | None = None
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return self.router.shape[0] - self.policy.extra_rows


@dataclass(frozen=True)
class ScaleMixture:
    """y = u * sum_e w_e l_e, element by element: experts are vectors (MoV, arXiv 2309.05444).

    of: u is the `output` of a projection, bias included, or the `input` of an FFN's down_proj.
    vectors: `[heads, E, width]`; head i is columns `i * width` onwards of u. router: `[E, width]`,
    reads each head of u by itself, so that every head has gate weights of its own. policy: one with
    neither extra rows nor parameters.
    """

    vectors: Tensor
    policy: Policy
    router: Tensor
    of: Literal["output", "input"] = "output"

    @property
    def num_experts(self) -> int:
        return self.router.shape[0]

    @property
    def parameters(self) -> None:
        """None, as the mixtures have whose policy learned nothing."""

    @property
    def num_heads(self) -> int:
        return self.vectors.shape[0]


@dataclass(frozen=True)
class Reflection:
    """y = W (x - U A x) + bias: a low-rank change of what a linear reads.

    A product of r Householder reflections is I - U A (HRA, arXiv 2405.17484). Beside W it is the
    low-rank pair (A, -W U), which only a holder of W can make. a: `[r, in]`. u: `[in, r]`.
    """

    a: Tensor
    u: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def num_experts(self) -> int:
        return 1

    @property
    def policy(self) -> Policy:
        """Every token gets it."""
        return Constant((1.0,))

    @property
    def router(self) -> None:
        """None: there is nothing to choose."""

    @property
    def parameters(self) -> None:
        """None, as the mixtures have whose policy learned nothing."""

    def pair(self, weight: Tensor) -> Experts:
        """(A, -W U) for W `[out, in]`, float32."""
        return Experts(self.a, -(weight @ self.u), (self.rank,))


@dataclass(frozen=True)
class ClassifierMixture:
    """y = W x + bias + sum_e c_e B_e A_e x, whose gate weights c come from the adapter's classifier
    (X-LoRA, arXiv 2402.07148), see molehill.kernels.classifier.

    place: of this linear's gate weights among the classifier's.
    """

    experts: Experts
    place: int

    @property
    def num_experts(self) -> int:
        return len(self.experts.ranks)

    @property
    def router(self) -> None:
        """None of its own."""


@dataclass(frozen=True)
class VocabularyRows:
    """Rows of the embedding, or of the LM head, in the place of the base's, by token.

    ids: int64 `[n]`, ascending. rows: `[n, hidden]`.
    """

    ids: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Bias:
    """y = W x + (trained or bias) + added: what every token gets at a linear, whatever it reads.

    trained: `[out]`, in place of the base's own bias; None where that stays. added: `[out]`, beside
    it, scaling folded in; None for none.
    """

    trained: Tensor | None = None
    added: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        both = {"trained": self.trained, "added": self.added}
        return {name: tensor for name, tensor in both.items() if tensor is not None}

    def whole(self, bias: Tensor | None) -> Tensor | None:
        """All that is added to W x, float32 `[out]`. bias: the base's own, if it has one."""
        parts = [bias if self.trained is None else self.trained, self.added]
        there = [part.float() for part in parts if part is not None]
        return sum(there[1:], there[0]) if there else None


# What has a policy of its own.
RoutedMixture = LinearMixture | FfnMixture | ScaleMixture | Reflection
Mixture = RoutedMixture | ClassifierMixture
