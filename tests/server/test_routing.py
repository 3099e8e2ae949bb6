"""Routing figures over HTTP: by layer and projection, and under concurrent requests."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from safetensors.torch import load_file
from support.api_client import GOLDEN, Api, oracle


def routing(api: Api, name: str) -> dict[str, Any]:
    response = api.http.get(f"/v1/adapters/{name}/routing")
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def numbers(value: Any, before: Any) -> Any:
    """`value` with its counts less what they were: a load sends a probe through the adapter."""
    if isinstance(value, dict):
        return {key: numbers(value, before[key]) for key, value in value.items()}
    if isinstance(value, list):
        return [numbers(value, old) for value, old in zip(value, before, strict=True)]
    return value - before if type(value) is int and type(before) is int else value


class Watched:
    """An adapter whose figures count from now on."""

    def __init__(self, api: Api, name: str) -> None:
        self._api, self._name = api, name
        self._before = routing(api, name)

    def since(self) -> dict[str, Any]:
        """Counts since then; ratios are those since the load."""
        result = routing(self._api, self._name)
        layers = [site["layer"] for site in result["sites"]]
        changed: dict[str, Any] = numbers(result, self._before)
        for site, layer in zip(changed["sites"], layers, strict=True):
            site["layer"] = layer
        return changed


def summary(api: Api, name: str) -> dict[str, Any]:
    adapters = api.http.get("/v1/routing").json()["adapters"]
    (result,) = (adapter for adapter in adapters if adapter["adapter"] == name)
    summed: dict[str, Any] = result
    return summed


@pytest.mark.parametrize("case", ["mixlora", "mola", "dynmole-soft", "loramoe"])
def test_every_site_is_the_oracles(clean: Api, case: str) -> None:
    assert clean.load("team/m:v2", case).status_code == 200
    watched = Watched(clean, "team/m:v2")
    prompt = oracle(case)["prompts"][0]["prompt_token_ids"]
    clean.complete("team/m:v2", prompt, 1)
    result = watched.since()
    assert (result["adapter"], result["kind"]) == ("team/m:v2", case.partition("-")[0])
    assert result["tokens"] == len(prompt)

    tensors = load_file(GOLDEN / "cases" / case / "oracle.safetensors")
    routed = {
        name.removeprefix("route.prompt0.").removesuffix(".w"): tensor > 0
        for name, tensor in tensors.items()
        if name.startswith("route.prompt0.") and name.endswith(".w")
    }
    sites = {site["site"]: site for site in result["sites"] if site["decisions"]}
    # The oracle holds the first and the last layer, or the first and the last of a few sites.
    assert len(routed) > 1
    assert sites.keys() > routed.keys()
    for name, chosen in routed.items():
        site = sites[name]
        assert site["decisions"] == len(prompt)
        assert site["expert_tokens"] == chosen.sum(0).tolist()
        layer, projection = name.split(".")[1], name.split(".")[-1]
        assert (site["layer"], site["projection"]) == (int(layer), projection)
    assert result["total"]["decisions"] == len(sites) * len(prompt)


def test_flops_follow_from_shapes_and_choices(clean: Api) -> None:
    assert clean.load("flops", "mixlora").status_code == 200
    watched = Watched(clean, "flops")
    prompt = oracle("mixlora")["prompts"][0]["prompt_token_ids"]
    clean.complete("flops", prompt, 1)
    # 4 layers; 4 experts of rank 2 on three projections of 64 x 176, two chosen; a router [4, 64].
    expert, router = 3 * 2 * 2 * (64 + 176), 2 * 4 * 64
    total = watched.since()["total"]
    assert total["flops_done"] == 4 * len(prompt) * (2 * expert + router)
    assert total["flops_avoided"] == 4 * len(prompt) * 2 * expert
    total = routing(clean, "flops")["total"]
    assert clean.of_adapter("flops", "adapter_flops_total") == total["flops_done"]
    assert clean.of_adapter("flops", "adapter_flops_avoided_total") == total["flops_avoided"]


def test_ratios_follow_from_the_counts(clean: Api) -> None:
    assert clean.load("ratios", "dynmole-soft").status_code == 200
    clean.complete("ratios", [5, 6, 7, 8, 9], 8)
    result = routing(clean, "ratios")
    for stats in (result["total"], *result["sites"]):
        experts = stats["experts_activated"] / stats["decisions"]
        assert stats["experts_per_decision"] == pytest.approx(experts)
        assert 0 <= stats["soft_share"] <= 1
        assert 0 < stats["mean_entropy"] <= 1
        assert 1 <= stats["imbalance"] <= 4
    for site in result["sites"]:
        shares = [tokens / site["decisions"] for tokens in site["expert_tokens"]]
        assert site["expert_shares"] == pytest.approx(shares)
        assert sum(shares) == pytest.approx(site["experts_per_decision"])


def test_a_plain_lora_has_sites_without_decisions(clean: Api) -> None:
    assert clean.load("plain", "lora").status_code == 200
    clean.complete("plain", [5, 6, 7], 1)
    result = routing(clean, "plain")
    assert result["sites"]
    for site in result["sites"]:
        assert site["decisions"] == 0
        assert site["experts_per_decision"] is site["expert_shares"] is site["imbalance"] is None
        assert site["flops_done"] > 0
    assert result["total"]["flops_avoided"] == 0


def test_totals_are_what_concurrent_requests_sent(clean: Api) -> None:
    cases = ("mixlora", "mola", "dynmole-soft", "lora")
    for case in cases:
        assert clean.load(case, case).status_code == 200
    before = {case: summary(clean, case)["tokens"] for case in cases}
    watched = {case: Watched(clean, case) for case in cases}
    ops = {case: clean.of_adapter(case, "adapter_op_seconds_total") for case in cases}
    jobs = [
        (cases[i % len(cases)], [10 + i, *range(100, 100 + 3 * i)], 2 + i % 5) for i in range(60)
    ]

    def ask(job: tuple[str, list[int], int]) -> int:
        """Tokens that ran through the adapter. The last one of an answer is never read."""
        usage = clean.complete(*job).usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(job[1]), job[2])
        details = usage.prompt_tokens_details
        return len(job[1]) - (details.cached_tokens if details else 0) + job[2] - 1

    def scrape(_: int) -> None:
        assert clean.http.get("/metrics").status_code == 200
        routing(clean, cases[0])

    with ThreadPoolExecutor(12) as pool:
        scrapes = [pool.submit(scrape, i) for i in range(20)]
        read = list(pool.map(ask, jobs))
        for done in scrapes:
            done.result()
    for case in cases:
        sent = sum(tokens for job, tokens in zip(jobs, read, strict=True) if job[0] == case)
        result, by_site = summary(clean, case), watched[case].since()
        assert result["tokens"] - before[case] == sent == by_site["tokens"]
        assert result["requests_in_flight"] == 0
        routers = sum(site["decisions"] > 0 for site in by_site["sites"])
        assert by_site["total"]["decisions"] == routers * sent
    steps = clean.metrics()["molehill_step_seconds_total"]
    for case in cases:
        spent = clean.of_adapter(case, "adapter_op_seconds_total")
        assert ops[case] < spent < steps
        assert clean.of_adapter(case, "adapter_op_share") == pytest.approx(spent / steps)
    every = clean.http.get("/v1/routing").json()
    shared = [adapter_stats["op_seconds"] for adapter_stats in every["adapters"]]
    assert sum(shared) <= every["seconds"]["adapter_ops"] * (1 + 1e-9)


def test_base_requests_take_steps_but_no_adapter_ops(api: Api) -> None:
    before = api.http.get("/v1/routing").json()["seconds"]
    api.greedy("tiny", [5, 6, 7])
    after = api.http.get("/v1/routing").json()["seconds"]
    assert after["steps"] > before["steps"]
    assert after["adapter_ops"] == before["adapter_ops"]


def test_a_replaced_adapter_counts_on_in_the_metrics(clean: Api) -> None:
    assert clean.load("again", "mixlora").status_code == 200
    start = clean.of_adapter("again", "adapter_tokens_total")
    probe = routing(clean, "again")["tokens"]
    clean.complete("again", [5, 6, 7], 1)
    assert clean.load("again", "mola", load_inplace=True).status_code == 200
    clean.complete("again", [5, 6, 7, 8], 1)
    assert clean.of_adapter("again", "adapter_tokens_total") == start + 3 + probe + 4
    assert routing(clean, "again")["tokens"] == probe + 4


def test_an_unknown_adapter_is_not_found(api: Api) -> None:
    response = api.http.get("/v1/adapters/nobody/routing")
    assert api.error(response)[:2] == (404, "adapter_not_loaded")


def test_the_routes_want_the_key_and_stand_in_the_schema(api: Api) -> None:
    paths = api.http.get("/openapi.json").json()["paths"]
    for path in ("/v1/routing", "/v1/adapters/{name}/routing"):
        assert "get" in paths[path]
        address = path.format(name="started")
        refused = api.http.get(address, headers={"Authorization": "Bearer wrong"})
        assert refused.status_code == 401


def test_refusals_are_counted_without_names_and_the_rest_by_loaded_ones(clean: Api) -> None:
    def counts() -> tuple[float, float, float]:
        samples = clean.metrics()
        refused = samples.get('molehill_adapter_loads_refused_total{kind="adapter_not_found"}', 0)
        hits = samples.get('molehill_adapter_cache_hits_total{adapter="counted",tier="worker"}', 0)
        return samples["molehill_adapter_load_seconds_count"], refused, hits

    before = counts()
    assert clean.load("counted", "lora").status_code == 200
    assert clean.load("evil-name", "no-such-directory").status_code == 404
    clean.complete("counted", [5, 6], 1)
    assert counts() == tuple(count + 1 for count in before)
    assert "evil-name" not in clean.http.get("/metrics").text
