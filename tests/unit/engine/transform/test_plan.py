"""The plan's facts on mixtures built for the purpose and on the golden cases."""

import pytest
import torch

from molehill.engine import formats
from molehill.engine.adapter.model import Adapter
from molehill.engine.transform.plan import plan
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture
from molehill.kernels.policy import AdaMoLE, Arrow, Constant, DynMoLE, Soft, Threshold, TopK, TopP


def linear(policy, copies, router):
    """`copies` says which of two different experts stands at each place."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 2, 8), torch.randn(2, 6, 2)
    stacked = Experts(
        torch.cat([a[c] for c in copies]), torch.cat([b[c] for c in copies], 1), (2,) * len(copies)
    )
    return LinearMixture(stacked, policy, router)


ROUTER = torch.randn(2, 8)
IDENTICAL = "identical experts with weights summing to 1"
DYNAMIC = "router reads the token"


@pytest.mark.parametrize(
    ("mixture", "static", "reason"),
    [
        (linear(Constant((1.0,)), [0], None), True, "no router"),
        (linear(TopK(2), [0], ROUTER[:1]), True, "one expert"),
        (linear(DynMoLE(), [0, 1], torch.zeros(2, 8)), True, "router of zeros"),
        (linear(Soft(), [0, 0], ROUTER), True, IDENTICAL),
        (linear(TopK(1), [0, 0], ROUTER), True, IDENTICAL),
        (linear(DynMoLE(normalize_weights=True), [0, 0], ROUTER), True, IDENTICAL),
        (linear(TopK(1, normalize=False), [0, 0], ROUTER), False, DYNAMIC),
        (linear(TopP(0.8), [0, 0], ROUTER), False, DYNAMIC),
        (linear(DynMoLE(), [0, 0], ROUTER), False, DYNAMIC),
        (linear(Soft(), [0, 1], ROUTER), False, DYNAMIC),
        (linear(Arrow(1), [0, 0], ROUTER), True, IDENTICAL),
        (linear(Arrow(1), [0, 1], torch.zeros(2, 8)), True, "router of zeros"),
        (linear(Threshold(0.6), [0, 0], ROUTER), False, DYNAMIC),
        (linear(AdaMoLE(0.5), [0], torch.zeros(2, 8)), False, DYNAMIC),
    ],
)
def test_static_or_dynamic_and_why(mixture, static, reason):
    (site,) = plan(Adapter("test", {"layers.0.x": mixture}))
    assert (site.static, site.reason) == (static, reason)


def test_experts_with_equal_a_only_are_not_identical():
    mixture = linear(Soft(), [0, 0], ROUTER)
    mixture.experts.b[0, 3] += 1
    assert not plan(Adapter("test", {"layers.0.x": mixture}))[0].static


def test_figures_of_a_linear():
    experts = Experts(torch.ones(5, 8), torch.ones(6, 5), (2, 3))
    mixture = LinearMixture(experts, Soft(), ROUTER)
    (site,) = plan(Adapter("test", {"layers.0.mlp.up_proj": mixture}))
    assert (site.shape, site.policy, site.experts) == ("linear", Soft(), 2)
    assert site.ranks == {"up_proj": (2, 3)}
    assert site.bytes == 4 * (5 * 8 + 6 * 5 + 2 * 8)


def test_figures_of_an_ffn():
    stacks = {"down_proj": Experts(torch.randn(2, 6), torch.ones(8, 2), (1, 1))}
    mixture = FfnMixture(stacks, TopK(1), ROUTER)
    (site,) = plan(Adapter("test", {"layers.0.mlp": mixture}))
    assert (site.shape, site.experts, site.static) == ("ffn", 2, False)
    assert site.ranks == {"down_proj": (1, 1)}
    assert site.bytes == 4 * (2 * 6 + 8 * 2 + 2 * 8)


def cost_of(mixture, **more):
    (site,) = plan(Adapter("test", {"layers.0.mlp": mixture}), **more)
    return site.cost


def test_a_token_costs_the_rows_of_its_experts_and_the_router():
    experts = Experts(torch.randn(6, 8), torch.randn(10, 6), (1, 2, 3))
    router = torch.randn(3, 8)
    soft = cost_of(LinearMixture(experts, Soft(), router))
    assert (soft.flops, soft.bytes) == (2 * (6 * 18 + 24), 2 * 6 * 18 + 4 * 24)
    assert (soft.base_flops, soft.base_bytes) == (2 * 80, 2 * 80)
    # At the most: the two experts of the highest ranks.
    assert cost_of(LinearMixture(experts, TopK(2), router)).flops == 2 * (5 * 18 + 24)


def test_a_static_site_costs_what_merging_leaves():
    one, two = torch.randn(2, 8), torch.randn(10, 2)
    experts = Experts(one.repeat(3, 1), two.repeat(1, 3), (2, 2, 2))
    mixture = LinearMixture(experts, TopK(2), torch.randn(3, 8))
    (site,) = plan(Adapter("test", {"layers.0.q_proj": mixture}))
    assert site.merged == {"q_proj": 2}
    assert (site.cost.flops, site.cost.bytes) == (2 * 2 * 18, 2 * 2 * 18)
    report = site.as_json()
    assert (report["merged_ranks"], report["flops_share"]) == ({"q_proj": 2}, 36 / 80)


def test_an_ffns_base_is_known_by_any_of_its_projections():
    router = torch.randn(2, 8)
    down = {"down_proj": Experts(torch.randn(2, 6), torch.randn(8, 2), (1, 1))}
    cost = cost_of(FfnMixture(down, TopK(1), router))
    assert (cost.flops, cost.base_flops) == (2 * (14 + 16), 2 * 3 * 8 * 6)
    assert cost_of(FfnMixture({}, TopP(0.5), router)).base_flops is None


def test_a_tolerance_shows_what_it_would_merge():
    a, b = torch.randn(2, 8), torch.randn(10, 2)
    experts = Experts(a.repeat(2, 1), torch.cat([b, 1.1 * b], 1), (2, 2))
    adapter = Adapter(
        "test", {"layers.0.q_proj": LinearMixture(experts, Soft(), torch.randn(2, 8))}
    )
    assert not plan(adapter)[0].static
    (site,) = plan(adapter, tolerance=0.05)
    # b and 1.1 b are 0.05 of b from their mean, 1.05 b.
    assert (site.static, site.error) == (True, pytest.approx(0.05 / 1.05))
    assert site.reason == "experts within 0.05 of their mean"


def test_sites_in_natural_order_and_bytes_that_add_up(golden):
    adapter = formats.read(golden / "cases" / "mixlora-expert-lora")
    sites = plan(adapter)
    assert [site.site for site in sites[:5]] == [
        "layers.0.mlp",
        "layers.0.self_attn.k_proj",
        "layers.0.self_attn.o_proj",
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.v_proj",
    ]
    assert sum(site.bytes for site in sites) == adapter.num_bytes
    assert sum(site.static for site in sites) == 16
