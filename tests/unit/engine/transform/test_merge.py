"""Merging against the definition, and against dense sums that no part of it forms."""

from dataclasses import replace

import pytest
import torch
from support.golden import Case
from support.operators import Operators
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from molehill.engine import formats
from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.model import Adapter
from molehill.engine.hf.reference import attach
from molehill.engine.transform.merge import (
    collapse,
    merge_static,
    merged_weight,
    plain_sites,
    subtract,
)
from molehill.engine.transform.static_gates import deviation, gate
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture
from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK, TopP
from molehill.kernels.reference import ffn_mixture, linear_mixture

IN, OUT, TOKENS = 24, 40, 7
# Of the largest value: two float32 computations in another order.
EXACT = 2e-6


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def experts(ranks, inputs=IN, outputs=OUT, seed=0):
    rank = sum(ranks)
    return Experts(random(rank, inputs, seed=seed), random(outputs, rank, seed=seed + 1), ranks)


def near(experts, count, distance):
    """`count` experts whose B A differ from one pair's by `distance`, relative, to all sides."""
    a, b = experts.a, experts.b
    noise = [random(*b.shape, seed=90 + e) for e in range(count)]
    mean = sum(noise) / count
    noise = [n - mean for n in noise]
    largest = max((n @ a).norm() for n in noise)
    shifted = [b + n * distance * (b @ a).norm() / largest for n in noise]
    return Experts(a.repeat(count, 1), torch.cat(shifted, 1), experts.ranks * count)


def dense(experts, weights):
    pairs = zip(weights, experts.split(), strict=True)
    return sum(float(w) * (b.double() @ a.double()) for w, (a, b) in pairs)


def assert_near(actual, expected, tolerance=EXACT):
    assert expected.abs().max() > 0
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def merged(mixture, base=None, tolerance=0.0):
    adapter, merges = merge_static(Adapter("test", {"layers.0.mlp": mixture}), base, tolerance)
    return adapter.sites, merges


@pytest.mark.parametrize("ranks", [(3,), (2, 5, 1), (8, 8, 8, 8)])
def test_the_collapsed_pair_is_the_weighted_sum(ranks):
    """32 rank rows do not fit into 24 inputs."""
    site_experts, weights = experts(ranks), random(len(ranks), seed=3)
    result = collapse(site_experts, weights)
    assert_near(result.b.double() @ result.a.double(), dense(site_experts, weights))
    assert result.ranks == (min(sum(ranks), IN),)
    assert (result.a.dtype, result.b.dtype) == (torch.float32, torch.float32)


def test_what_adds_no_direction_adds_no_rank():
    one = experts((4,))
    twice = Experts(torch.cat([one.a, 2 * one.a]), torch.cat([one.b, one.b], 1), (4, 4))
    result = collapse(twice, torch.tensor([0.5, 0.25]))
    assert result.ranks == (4,)
    assert_near(result.b.double() @ result.a.double(), dense(one, [1.0]))


def test_singular_values_below_float32_go_and_those_above_stay():
    b, a = torch.eye(OUT, 3), torch.eye(3, IN)
    values = torch.tensor([1.0, 1e-5, 1e-8])
    result = collapse(Experts(a, b * values, (3,)), torch.ones(1))
    assert result.ranks == (2,)
    assert_near((result.b @ result.a)[1, 1], torch.tensor(1e-5))


def test_a_pair_that_is_one_already_stays_the_very_pair_and_is_not_factorised():
    site_experts = experts((8,), 256, 192)
    mixture = LinearMixture(site_experts, Constant((1.0,)))
    adapter = Adapter("test", {"layers.0.mlp": mixture})
    with Operators() as operators:
        result = collapse(site_experts, torch.ones(1))
        assert merge_static(adapter) == (adapter, ())
    assert operators.factorisations == []
    assert (result.a is site_experts.a, result.b is site_experts.b) == (True, True)


def test_a_plain_pair_without_an_effect_becomes_one_row_of_zeros():
    site_experts = Experts(random(8, IN), torch.zeros(OUT, 8), (8,))
    sites, (merge,) = merged(LinearMixture(site_experts, Constant((1.0,))))
    assert (merge.rank_before, merge.rank_after) == (8, 1)
    result = sites["layers.0.mlp"].experts
    assert (result.a.shape, result.b.shape) == ((1, IN), (OUT, 1))
    assert [bool(matrix.any()) for matrix in (result.a, result.b)] == [False, False]


def test_experts_of_weight_zero_leave_nothing():
    site_experts = experts((2, 3))
    result = collapse(site_experts, torch.tensor([0.0, 1.0]))
    assert torch.equal(result.a, site_experts.a[2:])
    assert torch.equal(result.b, site_experts.b[:, 2:])
    nothing = collapse(site_experts, torch.zeros(2))
    assert not (nothing.b @ nothing.a).any()


POLICIES = [
    Soft(),
    TopK(2),
    TopK(1, normalize=False),
    TopP(0.6),
    TopP(0.9, temperature=0.7),
    DynMoLE(),
    DynMoLE(entropy_threshold=1.0),
    DynMoLE(normalize_weights=True),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("ranks", [(3,), (2, 1, 4)], ids=["one expert", "router of zeros"])
def test_a_static_site_is_what_its_policy_gives_every_token(policy, ranks):
    """One expert's weight is not always 1: TopP divides by its temperature."""
    router = random(1, IN, seed=5) if len(ranks) == 1 else torch.zeros(len(ranks), IN)
    routed = LinearMixture(experts(ranks), policy, router)
    sites, (merge,) = merged(routed)
    result = sites["layers.0.mlp"]
    assert (result.policy, result.router, result.num_experts) == (Constant((1.0,)), None, 1)
    assert merge.rank_after == result.experts.ranks[0] <= merge.rank_before == sum(ranks)
    assert merge.error == 0
    x, weight, bias = random(TOKENS, IN, seed=6), random(OUT, IN, seed=7), random(OUT, seed=8)
    expected = linear_mixture(x, weight, bias, routed)[0]
    assert_near(linear_mixture(x, weight, bias, result)[0], expected)


def test_identical_experts_become_one_of_them():
    one = experts((3,))
    site_experts = Experts(one.a.repeat(4, 1), one.b.repeat(1, 4), (3,) * 4)
    sites, _ = merged(LinearMixture(site_experts, TopK(2), random(4, IN)))
    assert torch.equal(sites["layers.0.mlp"].experts.a, one.a)
    assert torch.equal(sites["layers.0.mlp"].experts.b, one.b)


@pytest.mark.parametrize(
    "mixture",
    [
        LinearMixture(experts((2, 2)), Soft(), random(2, IN)),
        LinearMixture(experts((2,)), Constant((1.0,)), magnitude=torch.ones(OUT)),
        LinearMixture(experts((2,)), Constant((1.0,))),
        FfnMixture({"up_proj": experts((2, 2))}, TopK(2), random(2, IN)),
        # Constant weights, but they scale W too, or mix experts inside the activation.
        FfnMixture({"up_proj": experts((2, 2))}, TopK(1, normalize=False), torch.zeros(2, IN)),
        FfnMixture({"up_proj": experts((2, 2))}, TopK(2), torch.zeros(2, IN)),
        FfnMixture({"up_proj": experts((2,))}, TopP(0.5, temperature=0.5), random(1, IN)),
        FfnMixture({"up_proj": experts((2,))}, TopK(1), random(1, IN), "relu"),
    ],
)
def test_what_is_dynamic_or_merged_already_comes_back_as_it_is(mixture):
    adapter = Adapter("test", {"layers.0.mlp": mixture})
    assert merge_static(adapter) == (adapter, ())
    assert merge_static(adapter)[0] is adapter


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("up_proj",)])
@pytest.mark.parametrize(
    ("count", "policy", "router"),
    [
        (1, TopK(1), random(1, IN)),
        (1, TopK(1, normalize=False), random(1, IN)),
        (3, TopK(1), torch.zeros(3, IN)),
    ],
    ids=["one expert", "switch of one", "router of zeros"],
)
def test_an_ffn_mixture_of_one_expert_is_linears(names, count, policy, router):
    shapes = {"gate_proj": (IN, OUT), "up_proj": (IN, OUT), "down_proj": (OUT, IN)}
    site_experts = {n: experts((2,) * count, *shapes[n], seed=i) for i, n in enumerate(names)}
    mixture = FfnMixture(site_experts, policy, router, "silu")
    base = BaseModel("base", "Test", {}, {"layers.0.mlp": "silu"})
    sites, _ = merged(mixture, base)
    assert sites.keys() == {f"layers.0.mlp.{name}" for name in names}
    weights = {n: random(o, i, seed=20) for n, (i, o) in shapes.items()}
    x = random(TOKENS, IN, seed=6)

    def project(name, value):
        site = sites.get(f"layers.0.mlp.{name}")
        weight = weights[name] if site is None else merged_weight(weights[name], site)
        return value @ weight.T

    result = project("down_proj", F.silu(project("gate_proj", x)) * project("up_proj", x))
    expected = ffn_mixture(x, weights, dict.fromkeys(shapes), "silu", mixture)[0]
    assert_near(result, expected, 5e-6)


def test_deviation_is_the_dense_one():
    site_experts = experts((2, 5, 1))
    products = [b.double() @ a.double() for a, b in site_experts.split()]
    mean = sum(products) / 3
    expected = max((p - mean).norm() / mean.norm() for p in products)
    assert deviation(site_experts) == pytest.approx(float(expected), rel=1e-6)
    assert deviation(near(experts((4,)), 5, 0.03)) == pytest.approx(0.03, rel=1e-4)


def test_a_tolerance_merges_what_is_within_it_and_says_how_far_off_it_is():
    linear_mixture = LinearMixture(near(experts((4,)), 3, 0.03), TopK(2), random(3, IN))
    assert merged(linear_mixture) == ({"layers.0.mlp": linear_mixture}, ())
    assert merged(linear_mixture, tolerance=0.029)[1] == ()
    sites, (merge,) = merged(linear_mixture, tolerance=0.031)
    assert merge.error == pytest.approx(0.03, rel=1e-4)
    assert merge.reason == "experts within 0.031 of their mean"
    result = sites["layers.0.mlp"].experts
    assert_near(result.b.double() @ result.a.double(), dense(linear_mixture.experts, [1 / 3] * 3))
    assert result.ranks == (4,)


@pytest.mark.parametrize("policy", [DynMoLE(), TopP(0.8), TopK(1, normalize=False)], ids=repr)
def test_no_tolerance_merges_experts_whose_weights_do_not_sum_to_1(policy):
    linear_mixture = LinearMixture(near(experts((4,)), 3, 0.01), policy, random(3, IN))
    assert gate(linear_mixture, tolerance=10.0).weights is None


def test_merging_twice_is_merging_once():
    sites = {
        "layers.0.x": LinearMixture(experts((2, 3)), Soft(), torch.zeros(2, IN)),
        "layers.0.y": LinearMixture(experts((2, 3)), Soft(), random(2, IN)),
        "layers.0.z": LinearMixture(experts((30, 30)), Constant((0.5, 0.5))),
    }
    once, merges = merge_static(Adapter("test", sites, "base", ("a warning",)))
    assert [merge.site for merge in merges] == ["layers.0.x", "layers.0.z"]
    assert (once.kind, once.base_model, once.warnings) == ("test", "base", ("a warning",))
    assert merge_static(once) == (once, ())


def test_a_merged_weight_is_rounded_once():
    linear_mixture = LinearMixture(experts((3,)), Constant((1.0,)))
    weight = random(OUT, IN, seed=7).bfloat16()
    exact = weight.double() + dense(linear_mixture.experts, [1.0])
    result = merged_weight(weight, linear_mixture)
    assert result.dtype == torch.bfloat16
    # Half a unit in the last of its 8 bits.
    assert ((result.double() - exact).abs() <= 2**-8 * exact.abs() * (1 + 1e-5)).all()


RESIDENT = "lora"
LINEAR = [
    "rslora",
    "dora",
    "mola",
    "mola-official",
    "loramoe",
    "hydralora",
    "dynmole-default",
    "dynmole-renyi",
]


@pytest.mark.slow
@pytest.mark.parametrize("case", [RESIDENT, *LINEAR, "base"])
def test_on_merged_weights_every_adapter_gives_its_oracle(golden, case):
    """The golden logits, from a model into which another golden adapter is merged."""
    model = AutoModelForCausalLM.from_pretrained(golden / "tiny-llama", dtype=torch.float32).eval()
    resident = plain_sites(formats.read(golden / "cases" / RESIDENT))
    assert len(resident) == 28
    with torch.no_grad():
        for site, pair in resident.items():
            model.get_submodule(f"model.{site}").weight += pair.b @ pair.a
    adapter = Adapter("base", {})
    if case != "base":
        adapter = formats.read(golden / "cases" / case)
    left = subtract(adapter, resident)
    assert bool(left.sites) == (case != RESIDENT)
    (prompt, *_) = Case(case).prompts
    with torch.no_grad(), attach(model, left):
        result = model(torch.tensor([prompt.ids])).logits[0]
    expected = Case(case).tensors["prompt0.logits"]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)


def test_only_the_same_bits_are_left_out():
    pair = experts((3,))
    same = Experts(pair.a.clone(), pair.b.clone(), (3,))
    almost = replace(pair, a=pair.a * 2, b=pair.b / 2)
    plain = Constant((1.0,))
    resident = {"layers.0.x": pair, "layers.0.y": pair}
    sites = {"layers.0.x": LinearMixture(same, plain), "layers.0.y": LinearMixture(almost, plain)}
    left = subtract(Adapter("test", sites), resident)
    assert left.sites.keys() == {"layers.0.y"}
    result = left.sites["layers.0.y"]
    assert isinstance(result, LinearMixture)
    assert result.policy == Constant((1.0, 1.0))
    x, nothing = random(TOKENS, IN), torch.zeros(OUT, IN)
    assert linear_mixture(x, nothing, None, result)[0].abs().max() < 1e-4
