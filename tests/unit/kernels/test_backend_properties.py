"""Random mixtures in random batches: every backend computes the definition.

Each op gets inputs that do not depend on the backend, so that only one op's rounding is compared.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from support.backend_cases import TOLERANCE, random, rounded
from support.cpu_cases import thread_count, usable_isas
from support.examples import examples
from support.random_adapters import SEEDS, ffn_mixtures, linear_mixtures, scale_mixtures
from torch import Tensor

from molehill.kernels import reference
from molehill.kernels.activation import ACTIVATIONS
from molehill.kernels.cpu import CpuBackend
from molehill.kernels.interface import (
    UNSERVED,
    ExpertScale,
    FfnPiece,
    FfnShape,
    LinearPiece,
    LinearShape,
    Run,
    ScalePiece,
    SlotWeights,
)
from molehill.kernels.mixture import FfnMixture, LinearMixture, ScaleMixture
from molehill.kernels.policy import Policy
from molehill.kernels.pytorch.backend import TorchBackend

BASE, EMPTY = None, 9


@dataclass(frozen=True)
class Layer:
    """A fused linear of three projections and a gated FFN, as a model has them.

    widths: of the projections. weights: of the FFN, by projection; biases likewise.
    """

    dtype: torch.dtype
    inputs: int
    widths: tuple[int, ...]
    intermediate: int
    biased: bool
    seed: int

    @property
    def starts(self) -> list[int]:
        return [sum(self.widths[:i]) for i in range(len(self.widths))]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        d, width = self.inputs, self.intermediate
        return {"gate_proj": (d, width), "up_proj": (d, width), "down_proj": (width, d)}

    @property
    def weights(self) -> dict[str, Tensor]:
        return {
            name: random(out, inputs, seed=self.seed + i, scale=inputs**-0.5).to(self.dtype).float()
            for i, (name, (inputs, out)) in enumerate(self.shapes.items())
        }

    @property
    def biases(self) -> dict[str, Tensor | None]:
        return {
            name: random(out, seed=self.seed + 5 + i).to(self.dtype).float()
            if self.biased
            else None
            for i, (name, (_, out)) in enumerate(self.shapes.items())
        }


@dataclass(frozen=True)
class Slot:
    """An adapter's mixtures: by projection of the fused linear, and of the FFN (or its h)."""

    linears: dict[int, LinearMixture | ScaleMixture]
    ffn: FfnMixture | ScaleMixture | None


def served(mixture, dtype):
    """A and B as they are served, in the layer's dtype."""
    if isinstance(mixture, LinearMixture):
        return replace(mixture, experts=rounded(mixture.experts, dtype))
    if isinstance(mixture, FfnMixture):
        stacks = {name: rounded(pair, dtype) for name, pair in mixture.experts.items()}
        return replace(mixture, experts=stacks)
    return mixture


@st.composite
def slots(draw, layer: Layer) -> Slot:
    linears: dict[int, LinearMixture | ScaleMixture] = {}
    for i, width in enumerate(layer.widths):
        kind = draw(st.sampled_from(["none", "linear", "scale"]))
        if kind == "linear":
            linears[i] = served(draw(linear_mixtures(layer.inputs, width)), layer.dtype)
        elif kind == "scale":
            heads = draw(st.sampled_from([h for h in (1, 2, 3) if width % h == 0]))
            linears[i] = draw(scale_mixtures(heads, width // heads))
    vectors = scale_mixtures(1, layer.intermediate, "input")
    ffn = draw(st.one_of(st.none(), ffn_mixtures(layer.shapes), vectors))
    return Slot(linears, served(ffn, layer.dtype))


@st.composite
def layers(draw) -> Layer:
    widths = tuple(draw(st.sampled_from([6, 16, 33, 64, 70])) for _ in range(3))
    return Layer(
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        inputs=draw(st.sampled_from([5, 16, 33, 72])),
        widths=widths,
        intermediate=draw(st.sampled_from([7, 48, 64, 77])),
        biased=draw(st.booleans()),
        seed=draw(SEEDS),
    )


@st.composite
def batches(draw, count: int) -> list[tuple[int | None, int]]:
    """(slot, rows) of neighbouring runs; BASE has none, EMPTY and UNSERVED are void."""
    kinds = st.sampled_from([*range(count), *range(count), BASE, EMPTY, UNSERVED])
    rows = st.sampled_from([1, 1, 2, 3, 8, 9, 40])
    return draw(st.lists(st.tuples(kinds, rows), min_size=1, max_size=8))


@st.composite
def worlds(draw) -> tuple[Layer, list[Slot], list[tuple[int | None, int]]]:
    layer = draw(layers())
    slots_in_use = draw(st.lists(slots(layer), min_size=1, max_size=3))
    return layer, slots_in_use, draw(batches(len(slots_in_use)))


class Model:
    """A layer's handles in one backend, with the slots stored."""

    def __init__(self, backend, layer: Layer, slots_in_use: list[Slot]) -> None:
        self.backend, self.layer = backend, layer
        dtype, width, d = layer.dtype, layer.intermediate, layer.inputs
        self.qkv = backend.register_linear(LinearShape("qkv", d, sum(layer.widths), dtype))
        self.gate_up = backend.register_linear(LinearShape("gate_up", d, 2 * width, dtype))
        self.down = backend.register_linear(LinearShape("down", width, d, dtype))
        self.mlp = backend.register_ffn(FfnShape("mlp", self.gate_up, self.down, width))
        for number, slot in enumerate(slots_in_use):
            backend.store(number, self._cut(slot))

    def _cut(self, slot: Slot) -> SlotWeights:
        linears, scales = [], []
        for i, mixture in slot.linears.items():
            start = self.layer.starts[i]
            if isinstance(mixture, ScaleMixture):
                scales.append(
                    ScalePiece(f"p{i}", mixture.policy, mixture.router, mixture.vectors, start)
                )
            else:
                pair, policy = mixture.experts, mixture.policy
                linears.append(LinearPiece(f"p{i}", start, pair, policy, mixture.router))
        linear_pieces = {self.qkv: linears} if linears else {}
        vectors = {self.qkv: scales} if scales else {}
        if isinstance(slot.ffn, ScaleMixture):
            mixture = slot.ffn
            piece = ScalePiece("mlp", mixture.policy, mixture.router, mixture.vectors)
            return SlotWeights(linear_pieces, {}, vectors, {self.mlp: piece})
        ffns = {} if slot.ffn is None else {self.mlp: self._cut_ffn(slot.ffn)}
        return SlotWeights(linear_pieces, ffns, vectors)

    def _cut_ffn(self, mixture: FfnMixture) -> FfnPiece:
        """DoRA's factors as the engine makes them at load."""
        stacks, scales = dict(mixture.experts), {}
        for name, magnitude in mixture.magnitudes.items():
            weight, pair = self.layer.weights[name], mixture.experts[name]
            norms = torch.stack([(weight + b @ a).norm(dim=1) for a, b in pair.split()])
            factors = magnitude / norms
            scales[name] = ExpertScale(factors, self.layer.biases[name])
            stacks[name] = replace(pair, b=pair.b * factors[pair.expert_of_row].T)
        gate, up, down = (stacks.get(name) for name in self.layer.shapes)
        return FfnPiece(
            "mlp",
            mixture.policy,
            mixture.router,
            "silu",
            gate,
            up,
            down,
            self.layer.biases["down_proj"],
            gate_scale=scales.get("gate_proj"),
            up_scale=scales.get("up_proj"),
        )

    def run(self, runs: list[Run], x: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The qkv output, the FFN's intermediate and its output, as a model makes them."""
        dtype, weights, biases = self.layer.dtype, self.layer.weights, self.layer.biases

        def linear(name: str, value: Tensor) -> Tensor:
            y = value.float() @ weights[name].T
            bias = biases[name]
            return (y if bias is None else y + bias).to(dtype)

        self.backend.begin_step(runs)
        y = base.clone()
        self.backend.linear(y, x, self.qkv)
        gate, up = linear("gate_proj", x), linear("up_proj", x)
        pre = torch.cat([gate, up], dim=1)
        self.backend.linear(pre, x, self.gate_up)
        h = (ACTIVATIONS["silu"](gate.float()) * up.float()).to(dtype)
        self.backend.ffn(h, torch.cat([gate, up], dim=1), self.mlp)
        out = linear("down_proj", h)
        self.backend.linear(out, h, self.down)
        return y, h, out


def decisive(policy: Policy, logits: Tensor) -> Tensor:
    """bool `[T]`: rows whose weights do not hang on the rounding of the logits."""
    weights = policy.route(torch.softmax(logits, -1)).weights
    sound = torch.ones(len(logits), dtype=torch.bool)
    for seed in range(4):
        noisy = logits + random(*logits.shape, seed=seed, scale=1e-4)
        moved = policy.route(torch.softmax(noisy, -1)).weights - weights
        sound &= moved.abs().amax(-1) < 1e-2
    return sound


def expected_qkv(layer: Layer, slot: Slot, x: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """The definition's output of some rows, and which of them are decisive."""
    y, sound = base.clone(), torch.ones(len(x), dtype=torch.bool)
    for i, mixture in slot.linears.items():
        columns = slice(layer.starts[i], layer.starts[i] + layer.widths[i])
        if isinstance(mixture, ScaleMixture):
            heads = reference.split_heads(base[:, columns], mixture.num_heads)
            logits = (heads @ mixture.router.T).flatten(0, 1)
            sound &= decisive(mixture.policy, logits).view(len(x), -1).all(1)
            y[:, columns] = reference.scale_mixture(base[:, columns], mixture)[0]
            continue
        if mixture.router is not None:
            sound &= decisive(mixture.policy, x @ mixture.router.T)
        weight = torch.zeros(layer.widths[i], layer.inputs)
        y[:, columns] += reference.linear_mixture(x, weight, None, mixture)[0]
    return y, sound


def assert_rows(actual: Tensor, expected: Tensor, sound: Tensor, dtype: torch.dtype) -> None:
    if sound.any():
        scale = max(expected[sound].abs().max().item(), 1e-3)
        error = (actual.float() - expected)[sound].abs().max().item()
        assert error <= TOLERANCE[dtype] * scale, f"{error} of {scale}"


def check(model: Model, slots_in_use: list[Slot], batch: list[tuple[int | None, int]]) -> None:
    layer, dtype = model.layer, model.layer.dtype
    tokens = sum(rows for _, rows in batch)
    x = random(tokens, layer.inputs, seed=layer.seed + 20).to(dtype)
    base = random(tokens, sum(layer.widths), seed=layer.seed + 21).to(dtype)
    runs, places, row = [], [], 0
    for slot, rows in batch:
        places.append((slot, slice(row, row + rows)))
        if slot is not BASE:
            runs.append(Run(slot, row, row + rows))
        row += rows
    plain = model.run([], x, base)
    qkv, h, out = model.run(runs, x, base)
    for number, span in places:
        if number in (EMPTY, UNSERVED):
            assert not qkv[span].any()
            assert not out[span].any()
            continue
        if number is BASE:
            for result, before in zip((qkv, h, out), plain, strict=True):
                assert torch.equal(result[span], before[span])
            continue
        weights = slots_in_use[number]
        wide = x[span].float()
        assert_rows(qkv[span], *expected_qkv(layer, weights, wide, base[span].float()), dtype)
        if weights.ffn is None:
            assert torch.equal(out[span], plain[2][span])
        elif isinstance(weights.ffn, ScaleMixture):
            before = plain[1][span].float()
            sound = decisive(weights.ffn.policy, before @ weights.ffn.router.T)
            assert_rows(h[span], reference.scale_mixture(before, weights.ffn)[0], sound, dtype)
        else:
            sound = decisive(weights.ffn.policy, wide @ weights.ffn.router.T)
            arguments = layer.weights, layer.biases, "silu", weights.ffn
            assert_rows(out[span], reference.ffn_mixture(wide, *arguments)[0], sound, dtype)


@pytest.mark.slow
@settings(
    max_examples=examples(150),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(world=worlds(), threads=st.sampled_from([1, 2]))
def test_any_mixtures_in_any_batch_give_the_definition(world, threads):
    """All backends on each example: to draw it takes longer than to compute it."""
    layer, slots_in_use, batch = world
    with thread_count(threads):
        for isa in [*usable_isas(), "torch"]:
            note(isa)
            backend = TorchBackend() if isa == "torch" else CpuBackend(isa=isa)
            check(Model(backend, layer, slots_in_use), slots_in_use, batch)
