"""Policies against values worked out by hand, and against plain loops written from the formulas.

Probabilities are multiples of 1/64, so that running sums are exact and boundaries are hit exactly.
"""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK, TopP

ENTROPY = 1e-5


def weights(policy, probabilities):
    return policy.route(torch.tensor([probabilities])).weights[0].tolist()


def test_constant_weights_do_not_look_at_the_token():
    assert weights(Constant((0.5, 2.0)), [0.25, 0.75]) == [0.5, 2.0]


def test_soft_keeps_every_probability():
    assert weights(Soft(), [0.125, 0.875]) == [0.125, 0.875]


@pytest.mark.parametrize(
    ("policy", "probabilities", "expected"),
    [
        (TopK(2), [0.125, 0.5, 0.25, 0.125], [0, 2 / 3, 1 / 3, 0]),
        (TopK(2, normalize=False), [0.125, 0.5, 0.25, 0.125], [0, 0.5, 0.25, 0]),
        (TopK(1, normalize=False), [0.25, 0.5, 0.25, 0.0], [0, 0.5, 0, 0]),
        (TopK(1), [0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]),
        (TopK(2), [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]),
        (TopK(2), [0.125, 0.375, 0.125, 0.375], [0, 0.5, 0, 0.5]),
        (TopK(9), [0.25, 0.75], [0.25, 0.75]),
        (TopK(2), [1.0], [1.0]),
    ],
    ids=["top-2", "unnormalised", "switch", "tie", "uniform", "pairs", "k above E", "one expert"],
)
def test_top_k(policy, probabilities, expected):
    assert weights(policy, probabilities) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("policy", "probabilities", "expected"),
    [
        (TopP(0.75), [0.125, 0.5, 0.25, 0.125], [0.125, 0.5, 0.25, 0]),
        (TopP(0.7), [0.125, 0.5, 0.25, 0.125], [0, 0.5, 0.25, 0]),
        (TopP(0.4), [0.125, 0.5, 0.25, 0.125], [0, 0.5, 0, 0]),
        (TopP(1.0), [0.125, 0.5, 0.25, 0.125], [0.125, 0.5, 0.25, 0.125]),
        (TopP(0.6), [0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0]),
        (TopP(0.8, temperature=0.5), [0.125, 0.5, 0.25, 0.125], [0, 1.0, 0, 0]),
        (TopP(0.8, temperature=2.0), [0.125, 0.5, 0.25, 0.125], [0.0625, 0.25, 0.125, 0.0625]),
        (TopP(0.8), [1.0], [1.0]),
    ],
    ids=[
        "a sum equal to top_p does not cross",
        "the crossing expert is kept",
        "the first is above top_p",
        "top_p 1 keeps all",
        "uniform, ties by index",
        "temperature divides probabilities",
        "nothing crosses",
        "one expert",
    ],
)
def test_top_p(policy, probabilities, expected):
    assert weights(policy, probabilities) == expected


SPARSE = {"entropy_threshold": 1.0}


@pytest.mark.parametrize(
    ("policy", "probabilities", "expected"),
    [
        (DynMoLE(0.75, 1, **SPARSE), [0.125, 0.5, 0.25, 0.125], [0, 0.5, 0.25, 0]),
        (DynMoLE(0.7, 1, **SPARSE), [0.125, 0.5, 0.25, 0.125], [0, 0.5, 0, 0]),
        (DynMoLE(0.7, 2, **SPARSE), [0.125, 0.5, 0.25, 0.125], [0, 0.5, 0.25, 0]),
        (DynMoLE(0.4, 1, **SPARSE), [0.125, 0.5, 0.25, 0.125], [0, 0.5, 0, 0]),
        (DynMoLE(0.4, 9, **SPARSE), [0.125, 0.5, 0.25, 0.125], [0.125, 0.5, 0.25, 0.125]),
        (DynMoLE(1.0, 1, **SPARSE), [0.125, 0.5, 0.25, 0.125], [0.125, 0.5, 0.25, 0.125]),
        (DynMoLE(0.5, 1, **SPARSE), [0.25] * 4, [0.25, 0.25, 0, 0]),
        (DynMoLE(0.5, 1), [0.25] * 4, [0.25] * 4),
        (DynMoLE(0.75, 2), [1.0], [1.0]),
        (
            DynMoLE(0.7, 1, **SPARSE, include_crossing=True),
            [0.125, 0.5, 0.25, 0.125],
            [0, 0.5, 0.25, 0],
        ),
        (
            DynMoLE(0.75, 1, **SPARSE, normalize_weights=True),
            [0.125, 0.5, 0.25, 0.125],
            [0, 2 / 3, 1 / 3, 0],
        ),
    ],
    ids=[
        "a sum equal to top_p is kept",
        "the crossing expert is dropped",
        "unless within keep_top_k",
        "the first is above top_p",
        "keep_top_k above E",
        "top_p 1 keeps all",
        "threshold 1 is never soft, not even for a uniform router",
        "a uniform router is soft",
        "one expert",
        "include_crossing",
        "normalize_weights",
    ],
)
def test_dynmole(policy, probabilities, expected):
    assert weights(policy, probabilities) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # p = [.75, .25]. Tsallis 2: (1 - .625) / (1 - 1/2). Renyi 2: -ln(.625) / ln 2.
        (DynMoLE(entropy_index=2.0, entropy_eps=0.0), 0.75),
        (DynMoLE(entropy_index=2.0, entropy_type="renyi", entropy_eps=0.0), 0.6780719),
        # Shannon in bits: .75 * .4150375 + .25 * 2.
        (DynMoLE(entropy_index=1.0, entropy_eps=0.0), 0.8112781),
        (DynMoLE(entropy_index=1.0, entropy_type="renyi", entropy_eps=0.0), 0.8112781),
        # eps 1/8 on both: 1 - (.875^2 + .375^2) = .09375, over 1/2.
        (DynMoLE(entropy_index=2.0, entropy_eps=0.125), 0.1875),
        # Not normalised: no eps, no maximum.
        (DynMoLE(entropy_index=2.0, entropy_eps=0.125, normalize_entropy=False), 0.375),
    ],
)
def test_entropy(policy, expected):
    routing = policy.route(torch.tensor([[0.75, 0.25]]))
    assert routing.entropy.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("policy", [Soft(), TopK(1), TopP(0.8), Constant((1.0, 1.0))])
def test_other_policies_report_shannon_entropy_and_are_never_soft(policy):
    routing = policy.route(torch.tensor([[0.75, 0.25], [1.0, 0.0]]))
    assert routing.entropy.tolist() == pytest.approx([0.8112781, 0.0], abs=1e-6)
    assert routing.soft.tolist() == [False, False]


def test_one_expert_has_no_entropy():
    for policy in (Soft(), DynMoLE(entropy_type="renyi")):
        assert policy.route(torch.ones(3, 1)).entropy.tolist() == [0.0] * 3


def test_soft_tokens_are_marked():
    routing = DynMoLE().route(torch.tensor([[0.25] * 4, [0.97, 0.01, 0.01, 0.01]]))
    assert routing.soft.tolist() == [True, False]


def test_leading_axes_are_kept():
    probabilities = torch.softmax(torch.randn(2, 3, 5), -1)
    for policy in (Soft(), TopK(2), TopP(0.8), DynMoLE(), Constant((0.2,) * 5)):
        routing = policy.route(probabilities)
        shapes = routing.weights.shape, routing.entropy.shape, routing.soft.shape
        assert shapes == ((2, 3, 5), (2, 3), (2, 3))


@st.composite
def distributions(draw):
    """Multiples of 1/64 that sum to 1, many of them tied."""
    cuts = draw(st.lists(st.integers(0, 64), min_size=0, max_size=9))
    bounds = [0, *sorted(cuts), 64]
    return [(high - low) / 64 for low, high in itertools.pairwise(bounds)]


def order_of(p):
    return sorted(range(len(p)), key=lambda e: (-p[e], e))


def plain_top_k(p, k, normalize):
    kept = order_of(p)[:k]
    total = sum(p[e] for e in kept) if normalize else 1.0
    return [p[e] / total if e in kept else 0.0 for e in range(len(p))]


def plain_top_p(p, top_p, temperature):
    q = [value / temperature if temperature > 0 else value for value in p]
    w, total = [0.0] * len(p), 0.0
    for e in order_of(q):
        w[e] = q[e]
        total += q[e]
        if total > top_p:
            break
    return w


def plain_entropy(p, policy):
    q, experts = policy.entropy_index, len(p)
    if experts == 1:
        return 0.0
    p = [value + policy.entropy_eps for value in p]
    if q == 1.0:
        return -sum(v * math.log(v) for v in p if v > 0) / math.log(experts)
    power = sum(v**q for v in p)
    if policy.entropy_type == "renyi":
        return math.log(power + 1e-10) / (1 - q) / math.log(experts)
    return ((1 - power) / (q - 1)) / ((1 - experts ** (1 - q)) / (q - 1))


def plain_dynmole(p, policy):
    if policy.entropy_threshold < 1 and plain_entropy(p, policy) > policy.entropy_threshold:
        return list(p)
    w, total = [0.0] * len(p), 0.0
    for rank, e in enumerate(order_of(p), start=1):
        total += p[e]
        if total <= policy.top_p or rank <= policy.keep_top_k:
            w[e] = p[e]
    return w


top_ps = st.integers(1, 64).map(lambda n: n / 64)


@settings(deadline=None)
@given(distributions(), st.integers(1, 12), st.booleans())
def test_top_k_is_the_plain_loop(p, k, normalize):
    assert weights(TopK(k, normalize), p) == pytest.approx(plain_top_k(p, k, normalize), abs=1e-6)


@settings(deadline=None)
@given(distributions(), top_ps, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_top_p_is_the_plain_loop(p, top_p, temperature):
    assert weights(TopP(top_p, temperature), p) == plain_top_p(p, top_p, temperature)


@settings(deadline=None)
@given(
    distributions(),
    st.builds(
        DynMoLE,
        top_p=top_ps,
        keep_top_k=st.integers(1, 12),
        entropy_threshold=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0, 2.0]),
        entropy_index=st.sampled_from([0.5, 1.0, 1.1, 1.5, 2.0]),
        entropy_type=st.sampled_from(["tsallis", "renyi"]),
        entropy_eps=st.sampled_from([0.0, 1e-5]),
    ),
)
def test_dynmole_is_the_plain_loop(p, policy):
    entropy = plain_entropy(p, policy)
    assume(abs(entropy - policy.entropy_threshold) > 10 * ENTROPY)
    routing = policy.route(torch.tensor([p]))
    assert routing.entropy.item() == pytest.approx(entropy, abs=ENTROPY)
    assert routing.weights[0].tolist() == plain_dynmole(p, policy)
