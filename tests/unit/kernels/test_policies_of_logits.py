"""Policies that read the router's logits, against values worked out by hand and plain loops that
follow the methods' own formulas."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from molehill.kernels.policy import AdaMoLE, Arrow, FlyLoRA, Soft, Sparsegen, Threshold, TopK


def decided(policy, logits, parameters=None):
    learned = None if parameters is None else torch.tensor(parameters)
    probabilities, routing = policy.decide(torch.tensor([logits]), learned)
    return probabilities[0].tolist(), routing.weights[0].tolist()


def softmax(logits):
    powers = [math.exp(value) for value in logits]
    return [power / sum(powers) for power in powers]


def test_policies_of_probabilities_decide_by_the_softmax():
    logits = torch.tensor([[0.3, -1.0, 2.0]])
    for policy in (Soft(), TopK(2), Threshold(0.2)):
        probabilities, routing = policy.decide(logits)
        assert torch.equal(probabilities, torch.softmax(logits, -1))
        assert torch.equal(routing.weights, policy.route(probabilities).weights)
        assert (policy.extra_rows, policy.num_parameters) == (0, 0)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.25, [0, 2 / 3, 1 / 3, 0]), (0.3, [0, 1, 0, 0]), (0.6, [0, 0, 0, 0]), (0, None)],
    ids=["reached exactly", "one", "none is reached: no weights, no division by 0", "all"],
)
def test_threshold(threshold, expected):
    p = [0.125, 0.5, 0.25, 0.125]
    result = Threshold(threshold).route(torch.tensor([p])).weights[0].tolist()
    assert result == pytest.approx(p if expected is None else expected, abs=1e-7)


def test_arrow_ignores_the_sign_of_a_score():
    p, w = decided(Arrow(2, temperature=2.0), [1.0, -6.0, 4.0, 0.0])
    assert p == pytest.approx(softmax([0.5, 3.0, 2.0, 0.0]), abs=1e-7)
    assert w == pytest.approx([0, *softmax([3.0, 2.0]), 0], abs=1e-7)


def test_arrow_has_the_entropy_of_its_probabilities():
    policy, logits = Arrow(1), torch.tensor([[1.0, -1.0]])
    assert policy.decide(logits)[1].entropy.tolist() == [1.0]


def test_adamole_subtracts_the_tokens_threshold():
    # sigmoid(ln 3 - ln 1) = .75, times .4: a threshold of .3. p = [.5, .4, .1].
    logits = [math.log(5.0), math.log(4.0), 0.0, math.log(3.0) - 1.0]
    p, w = decided(AdaMoLE(0.4), logits, [1.0])
    assert p == pytest.approx([0.5, 0.4, 0.1], abs=1e-6)
    assert w == pytest.approx([2 / 3, 1 / 3, 0], abs=1e-5)


def test_adamole_without_an_expert_above_the_threshold_has_no_weights():
    assert decided(AdaMoLE(1.0), [0.0, 0.0, 0.0, 9.0], [9.0])[1] == [0, 0, 0]
    assert decided(AdaMoLE(0.5), [0.0, 0.0, 200.0], [0.0])[1] == [0, 0]


def test_sparsegen_by_hand():
    # The MLP gives 0, so 1 - lambda = .01 + ln 2; with u = [.5, .2, -9] two experts are in the
    # support and tau = (.7 - .7031...) / 2.
    scale = 0.01 + math.log(2.0)
    tau = (0.7 - scale) / 2
    p, w = decided(Sparsegen(2), [0.5, 0.2, -9.0, 5.0, 7.0], [-6.0, 0.0, 1.0, 0.0, 0.0])
    assert p == w
    assert p == pytest.approx([(0.5 - tau) / scale, (0.2 - tau) / scale, 0], abs=1e-6)


def test_sparsegen_uses_what_is_positive_after_the_bias():
    """Hidden values 1 - 2 < 0 and 3 + 0.5; output 2 * 3.5 - 8 = -1."""
    scale = 0.01 + math.log1p(math.e)
    p, _ = decided(Sparsegen(2), [0.1, 0.0, 1.0, 3.0], [-2.0, 0.5, 4.0, 2.0, -8.0])
    assert p[0] - p[1] == pytest.approx(0.1 / scale, abs=1e-6)


def plain_sparsegen(u, output):
    """In the order of LD-MoLE's own computation."""
    lam = -math.log1p(math.exp(-output)) + 0.99
    ranked = sorted(u, reverse=True)
    sums = [sum(ranked[: k + 1]) for k in range(len(u))]
    kept = [k for k in range(len(u)) if 1 - lam + (k + 1) * ranked[k] > sums[k]]
    count = max(len(kept), 1)
    tau = (sum(ranked[k] for k in kept) - 1 + lam) / count
    return [max(value - tau, 0) / max(1 - lam, 0.01) for value in u]


floats = st.floats(-6, 6, width=32)


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.lists(floats, min_size=1, max_size=9),
    st.lists(st.tuples(floats, floats, floats), min_size=1, max_size=5),
    floats,
)
def test_sparsegen_is_the_plain_loop(u, units, offset):
    h, b, c = (list(values) for values in zip(*units, strict=True))
    output = offset + sum(w * max(x + y, 0) for x, y, w in units)
    p, w = decided(Sparsegen(len(h)), [*u, *h], [*b, *c, offset])
    # The least scale is .01, so an error of 1e-6 in a logit is one of 1e-4 in a probability.
    assert w == pytest.approx(plain_sparsegen(u, output), abs=1e-3)
    assert sum(p) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(floats, min_size=1, max_size=9), floats, floats, st.floats(0.0625, 1, width=32))
def test_adamole_is_the_plain_loop(gate, extra, bias, greatest):
    p = softmax(gate)
    threshold = greatest / (1 + math.exp(-extra - bias))
    above = [max(value - threshold, 0) for value in p]
    # Whether the last expert is kept is a matter of rounding where all but nothing is left.
    assume(sum(above) > 1e-2 or sum(above) == 0)
    assume(all(abs(value - threshold) > 1e-6 for value in p))
    expected = [value / (sum(above) or 1) for value in above]
    assert decided(AdaMoLE(greatest), [*gate, extra], [bias])[1] == pytest.approx(
        expected, abs=1e-4
    )


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(floats, min_size=1, max_size=9), st.integers(1, 9), st.sampled_from([0.5, 1.0, 3]))
def test_arrow_is_a_softmax_over_the_best_scores(logits, k, temperature):
    scores = [abs(value) for value in logits]
    kept = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]
    powers = [math.exp(scores[e] / temperature) if e in kept else 0 for e in range(len(scores))]
    expected = [power / sum(powers) for power in powers]
    # Scores that differ by rounding only may change places.
    ordered = sorted(scores, reverse=True)
    assume(all(x == y or x - y > 1e-4 for x, y in itertools.pairwise(ordered)))
    assert decided(Arrow(k, temperature), logits)[1] == pytest.approx(expected, abs=1e-5)


def test_flylora_keeps_the_greatest_scores_whatever_their_sign():
    scores, w = decided(FlyLoRA(2, experts=4), [-3.0, 2.0, -1.0, -8.0], [0.0, -6.0, 0.25, 0.0])
    assert scores == [-3.0, -4.0, -0.75, -8.0]
    assert w == [1, 0, 1, 0]


def test_flylora_tells_scores_apart_that_softmax_cannot():
    """Far below the greatest all probabilities are 0."""
    w = decided(FlyLoRA(2, experts=3), [300.0, -2.0, -1.0], [0.0, 0.0, 0.0])[1]
    assert w == [1, 0, 1]


def test_flyloras_entropy_is_that_of_the_scores_softmax():
    policy, logits = FlyLoRA(1, experts=2), torch.tensor([[1.0, 3.0]])
    entropy = policy.decide(logits, torch.tensor([2.0, 0.0]))[1].entropy
    assert entropy.tolist() == [1.0]


@pytest.mark.parametrize("policy", [AdaMoLE(0.3), Sparsegen(3), FlyLoRA(2, experts=4)], ids=repr)
def test_parameters_of_several_routers_broadcast(policy):
    logits = torch.randn(5, 2, 4 + policy.extra_rows)
    parameters = torch.randn(2, policy.num_parameters)
    p, routing = policy.decide(logits, parameters)
    assert (routing.entropy.shape, routing.soft.shape) == ((5, 2), (5, 2))
    for site in range(2):
        own_p, site_weights = policy.decide(logits[:, site], parameters[site])
        assert torch.equal(p[:, site], own_p)
        assert torch.equal(routing.weights[:, site], site_weights.weights)
