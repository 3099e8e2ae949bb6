"""Stats of sites and adapters against torch's own FLOP counter and the policies' decisions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from molehill.engine.adapter.model import Adapter
from molehill.engine.routing_stats import (
    RoutingStats,
    SiteCost,
    SiteRoutingStats,
    cost_table,
    costs,
    site_stats,
    total_stats,
)
from molehill.kernels import reference
from molehill.kernels.counters import SiteCounters, SlotCounters, joined
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture
from molehill.kernels.policy import Constant, TopK

LINEAR, FFN, STATIC = "layers.0.self_attn.q_proj", "layers.0.mlp", "layers.1.self_attn.q_proj"
WIDTH, INNER = 12, 20


def pair(inputs, outputs, ranks):
    rank = sum(ranks)
    return Experts(torch.randn(rank, inputs), torch.randn(outputs, rank), ranks)


def linear_mixture(ranks=(2, 3, 4)):
    return LinearMixture(pair(WIDTH, INNER, ranks), TopK(2), torch.randn(len(ranks), WIDTH))


def ffn_mixture():
    ranks = (1, 2, 3)
    experts = {
        "gate_proj": pair(WIDTH, INNER, ranks),
        "up_proj": pair(WIDTH, INNER, ranks),
        "down_proj": pair(INNER, WIDTH, ranks),
    }
    return FfnMixture(experts, TopK(2), torch.randn(3, WIDTH))


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_a_linear_mixture_costs_what_torch_counts() -> None:
    mixture = linear_mixture()
    cost = costs(Adapter("mola", {LINEAR: mixture})).sites[LINEAR]
    x, weight = torch.randn(7, WIDTH), torch.randn(INNER, WIDTH)
    router = counted(lambda: reference.probabilities(x, mixture.router))
    everything = counted(lambda: reference.linear_mixture(x, weight, None, mixture))
    base = counted(lambda: x @ weight.T)
    assert router == 7 * cost.router
    assert everything - base - router == 7 * sum(cost.experts)


def test_each_expert_costs_what_torch_counts() -> None:
    mixture = linear_mixture()
    cost = costs(Adapter("mola", {LINEAR: mixture})).sites[LINEAR]
    x = torch.randn(5, WIDTH)
    for flops, (a, b) in zip(cost.experts, mixture.experts.split(), strict=True):
        assert counted(lambda a=a, b=b: x @ a.T @ b.T) == 5 * flops


def test_an_ffn_mixture_costs_what_torch_counts() -> None:
    mixture = ffn_mixture()
    bare = FfnMixture({}, mixture.policy, mixture.router)
    weights = {
        "gate_proj": torch.randn(INNER, WIDTH),
        "up_proj": torch.randn(INNER, WIDTH),
        "down_proj": torch.randn(WIDTH, INNER),
    }
    x, biases = torch.randn(7, WIDTH), dict.fromkeys(weights)

    def run(some):
        return counted(lambda: reference.ffn_mixture(x, weights, biases, "silu", some))

    cost = costs(Adapter("mixlora", {FFN: mixture})).sites[FFN]
    assert run(mixture) - run(bare) == 7 * sum(cost.experts)
    assert counted(lambda: reference.probabilities(x, mixture.router)) == 7 * cost.router


def counters_of(routing):
    chosen = routing.weights > 0
    return SiteCounters(
        len(chosen),
        int(routing.soft.sum()),
        float(routing.entropy.sum()),
        chosen.sum(0).tolist(),
    )


def test_done_and_avoided_flops_are_those_of_the_policys_choices() -> None:
    mixture = linear_mixture()
    cost = SiteCost((10, 100, 1000), 7)
    x = torch.randn(50, WIDTH)
    routing = reference.route(x, mixture.router, mixture.policy, 3)
    counters = SlotCounters.of(50, {LINEAR: counters_of(routing)})
    result = site_stats(counters, cost_table(((LINEAR, cost),)))[LINEAR]
    chosen = [set(row.nonzero().flatten().tolist()) for row in routing.weights]
    assert result.flops_done == sum(7 + sum(10 ** (e + 1) for e in token) for token in chosen)
    assert result.flops_avoided == sum(1110 - sum(10 ** (e + 1) for e in token) for token in chosen)


def test_without_a_router_every_token_takes_every_expert() -> None:
    adapter = Adapter("lora", {STATIC: LinearMixture(pair(4, 6, (2,)), Constant((1.0,)))})
    result = total_stats(SlotCounters(11), costs(adapter))
    assert (result.tokens, result.decisions, result.expert_tokens) == (11, 0, [])
    assert (result.flops_done, result.flops_avoided) == (11 * 2 * 2 * (4 + 6), 0)
    assert result.imbalanced == 0


@pytest.mark.parametrize(
    ("tokens", "expected"), [((5, 5, 5), 1.0), ((9, 0, 0), 3.0), ((2, 4, 0), 2.0)]
)
def test_imbalance_is_the_busiest_experts_tokens_over_the_mean(tokens, expected) -> None:
    assert SiteRoutingStats(3, 9, 0, 0.0, tokens, 0, 0).imbalance == pytest.approx(expected)


def test_before_any_token_there_is_no_imbalance() -> None:
    assert SiteRoutingStats(3, 0, 0, 0.0, (0, 0, 0), 0, 0).imbalance is None


def test_an_adapters_figures_are_its_sites_sums() -> None:
    sites = cost_table(
        (("a", SiteCost((1, 1), 1)), ("b", SiteCost((1, 1, 1), 1)), ("idle", SiteCost((1,), 1)))
    )
    counters = SlotCounters.of(
        4, {"a": SiteCounters(4, 1, 2.0, [4, 1]), "b": SiteCounters(4, 0, 1.0, [0, 0, 8])}
    )
    result = total_stats(counters, sites)
    assert (result.tokens, result.decisions, result.soft, result.entropy) == (4, 8, 1, 3.0)
    assert result.expert_tokens == [4, 1, 8]
    assert result.imbalance / result.imbalanced == pytest.approx((1.6 + 3.0) / 2)


def drawn_site(draw: st.DrawFn) -> tuple[SiteCost, SiteCounters | None]:
    """Costs, and counters if it has a router."""
    experts = draw(st.integers(1, 5))
    number, flops = st.integers(0, 1 << 40), st.integers(0, 1 << 30)
    cost = SiteCost(draw(st.tuples(*[flops] * experts)), draw(st.none() | flops))
    if cost.router is None:
        return cost, None
    chosen = draw(st.lists(number, min_size=experts, max_size=experts))
    decisions = draw(st.integers(max(chosen), 1 << 41))
    return cost, SiteCounters(decisions, draw(number), draw(st.floats(0, 1e9)), chosen)


@pytest.mark.slow
@settings(deadline=None, derandomize=True, database=None)
@given(st.data())
def test_all_sites_at_once_are_the_sites_one_by_one(data) -> None:
    drawn = [drawn_site(data.draw) for _ in range(data.draw(st.integers(0, 4)))]
    sites = cost_table(tuple((str(i), cost) for i, (cost, _) in enumerate(drawn)))
    routed = [
        (str(i), site_counters)
        for i, (_, site_counters) in enumerate(drawn)
        if site_counters is not None
    ]
    counters = SlotCounters.of(7, dict(data.draw(st.permutations(routed))))
    expected = RoutingStats(7)
    for stats in site_stats(counters, sites).values():
        expected.add_site(stats)
    result = total_stats(counters, sites)
    for name in ("entropy", "imbalance", "flops_done", "flops_avoided"):
        assert getattr(result, name) == pytest.approx(getattr(expected, name))
        setattr(result, name, getattr(expected, name))
    assert result == expected


def test_counters_keep_their_sites() -> None:
    sites = {"a": SiteCounters(4, 1, 2.0, [4, 1]), "b": SiteCounters(4, 0, 1.0, [0, 0, 8])}
    counters = SlotCounters.of(5, sites)
    assert (counters.tokens, counters.sites) == (5, sites)
    assert SlotCounters.of(5, {}).sites == {}


def test_stays_join_site_by_site() -> None:
    first = SlotCounters.of(
        4, {"a": SiteCounters(4, 1, 2.0, [4, 1]), "b": SiteCounters(0, 0, 0.0, [0])}
    )
    second = SlotCounters.of(
        6, {"b": SiteCounters(6, 0, 0.5, [6]), "a": SiteCounters(6, 0, 1.0, [0, 6])}
    )
    result = joined(first, second)
    assert result.tokens == 10
    assert result.sites == {
        "a": SiteCounters(10, 1, 3.0, [4, 7]),
        "b": SiteCounters(6, 0, 0.5, [6]),
    }


@pytest.mark.parametrize("empty_first", [True, False])
def test_a_stay_without_routers_adds_its_tokens(empty_first: bool) -> None:
    routed, static = SlotCounters.of(4, {"a": SiteCounters(4, 1, 2.0, [4])}), SlotCounters(3)
    result = joined(static, routed) if empty_first else joined(routed, static)
    assert (result.tokens, result.sites) == (7, routed.sites)


def test_figures_add_up() -> None:
    one, two = (
        RoutingStats(1, 2, 3, 0.5, [1, 2], 5, 6, 1.5, 1),
        RoutingStats(10, 20, 30, 5.0, [1], 50, 60),
    )
    one.add(two)
    assert one == RoutingStats(11, 22, 33, 5.5, [2, 2], 55, 66, 1.5, 1)
