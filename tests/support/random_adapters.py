"""Random adapters for a base model: hypothesis draws the structure, a seed the values.

Structure and values are strong enough that each site shows in the logits.
"""

import torch
from hypothesis import strategies as st
from torch import Tensor

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.model import Adapter
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture, Mixture, ScaleMixture
from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK, TopP

RANKS = st.sampled_from([1, 2, 3, 8, 17])
FRACTIONS = st.sampled_from([0.2, 0.5, 0.75, 0.9])
ROUTED = st.one_of(
    st.just(Soft()),
    st.builds(TopK, st.integers(1, 4), st.booleans()),
    st.builds(TopP, FRACTIONS, st.sampled_from([0.0, 0.7])),
    st.builds(
        DynMoLE,
        top_p=FRACTIONS,
        keep_top_k=st.integers(1, 3),
        entropy_threshold=st.sampled_from([0.6, 0.9, 1.0]),
        entropy_index=st.sampled_from([0.5, 1.0, 1.1, 2.0]),
        entropy_type=st.sampled_from(["tsallis", "renyi"]),
        normalize_weights=st.booleans(),
        include_crossing=st.booleans(),
        normalize_entropy=st.booleans(),
    ),
)
SEEDS = st.integers(0, 2**16)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def router(experts: int, inputs: int, seed: int) -> Tensor:
    """For inputs of unit variance: logits of a standard deviation of 2."""
    return random(experts, inputs, seed=seed, scale=2 * inputs**-0.5)


def experts(ranks: list[int], inputs: int, out: int, seed: int, scale: float = 0.5) -> Experts:
    """Outputs of about `scale * sqrt(rank)` for inputs of unit variance."""
    a = random(sum(ranks), inputs, seed=seed, scale=inputs**-0.5)
    return Experts(a, random(out, sum(ranks), seed=seed + 1, scale=scale), tuple(ranks))


@st.composite
def linear_mixtures(draw, inputs: int, out: int, scale: float = 0.5) -> LinearMixture:
    ranks, seed = draw(st.lists(RANKS, min_size=1, max_size=11)), draw(SEEDS)
    pair = experts(ranks, inputs, out, seed, scale)
    if not draw(st.booleans()):
        return LinearMixture(pair, draw(ROUTED), router(len(ranks), inputs, seed + 2))
    each = st.sampled_from([0.0, 0.5, 1.0])
    weights = draw(st.lists(each, min_size=len(ranks), max_size=len(ranks)))
    return LinearMixture(pair, Constant(tuple(weights)))


@st.composite
def dora(draw, inputs: int, out: int, scale: float, norm: float = 1.0) -> LinearMixture:
    rank, seed = draw(RANKS), draw(SEEDS)
    magnitude = norm * (1 + 0.3 * random(out, seed=seed))
    pair = experts([rank], inputs, out, seed + 1, scale)
    return LinearMixture(pair, Constant((1.0,)), magnitude=magnitude)


@st.composite
def scale_mixtures(draw, heads: int, width: int, of: str = "output") -> ScaleMixture:
    count, seed = draw(st.integers(1, 11)), draw(SEEDS)
    vectors = 1 + 0.5 * random(heads, count, width, seed=seed)
    return ScaleMixture(vectors, draw(ROUTED), router(count, width, seed + 1), of)


@st.composite
def ffn_mixtures(
    draw, shapes: dict[str, tuple[int, int]], scale: float = 0.5, norm: float = 1.0
) -> FfnMixture:
    """shapes: (inputs, outputs) of `gate_proj`, `up_proj`, `down_proj`. norm: about that of W's
    rows, where DoRA's magnitudes lie."""
    count, seed = draw(st.integers(1, 9)), draw(SEEDS)
    stacks, magnitudes = {}, {}
    for i, (name, (inputs, out)) in enumerate(shapes.items()):
        if draw(st.booleans()):
            ranks = draw(st.lists(RANKS, min_size=count, max_size=count))
            stacks[name] = experts(ranks, inputs, out, seed + 9 * i, scale)
            if name != "down_proj" and draw(st.booleans()):
                magnitudes[name] = norm * (1 + 0.3 * random(count, out, seed=seed + i))
    gate = router(count, shapes["gate_proj"][0], seed + 3)
    return FfnMixture(stacks, draw(ROUTED), gate, magnitudes=magnitudes)


@st.composite
def adapters(draw, base: BaseModel, head: int) -> Adapter:
    """head: width of an attention head. Some sites of some layers, at least one."""
    sites: dict[str, Mixture] = {}
    scale = 0.05
    for ffn in base.ffns:
        layer = ffn.rpartition(".")[0]
        attention = [f"{layer}.self_attn.{name}_proj" for name in "qkvo"]
        for site in draw(st.lists(st.sampled_from(attention), unique=True, max_size=3)):
            inputs, out = base.linears[site]
            linear = linear_mixtures(inputs, out, scale)
            vectors = scale_mixtures(out // head, head)
            sites[site] = draw(st.one_of(linear, vectors, dora(inputs, out, scale)))
        shapes = {f"{name}_proj": base.linears[f"{ffn}.{name}_proj"] for name in _FFN}
        kind = draw(st.sampled_from(["none", "ffn", "linears", "vectors"]))
        if kind == "ffn":
            sites[ffn] = draw(ffn_mixtures(shapes, scale))
        elif kind == "linears":
            name = draw(st.sampled_from(list(shapes)))
            sites[f"{ffn}.{name}"] = draw(linear_mixtures(*shapes[name], scale))
        elif kind == "vectors":
            vectors = scale_mixtures(1, shapes["down_proj"][0], "input")
            sites[f"{ffn}.down_proj"] = draw(vectors)
    return Adapter("random", sites)


_FFN = ("gate", "up", "down")
