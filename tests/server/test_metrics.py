"""Per-adapter metrics: a real server's figures against the oracle's routing and what was sent."""

import itertools
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file
from support.api_client import BASE, GOLDEN, Api, copy_adapter, edit_config, edit_tensors, oracle


def first_router_only(folder: Path) -> str:
    """Leaves one module to a golden adapter: the first, whose input the others do not change."""
    module = "layers.0.self_attn.q_proj"

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if module not in name]:
            del tensors[name]

    edit_config(folder, target_modules=["q_proj"])
    edit_tensors(folder, cut)
    return module


def counted(api: Api, name: str) -> Callable[[str], float]:
    """The metrics of an adapter less what they are now: its load sent a probe through it."""
    before = api.metrics()

    def since(metric: str) -> float:
        labels = metric if "{" in metric else f'{metric}{{adapter="{name}"}}'
        return api.metrics()[f"molehill_{labels}"] - before[f"molehill_{labels}"]

    return since


def test_figures_are_the_oracles_routing(clean: Api) -> None:
    module = first_router_only(copy_adapter("dynmole-soft", clean.root / "first-router"))
    assert clean.load("m", "first-router").status_code == 200
    since = counted(clean, "m")
    prompt = oracle("dynmole-soft")["prompts"][0]["prompt_token_ids"]
    clean.complete("m", prompt, 1)

    tensors = load_file(GOLDEN / "cases" / "dynmole-soft" / "oracle.safetensors")
    chosen = tensors[f"route.prompt0.{module}.w"] > 0
    entropy = tensors[f"route.prompt0.{module}.entropy"]
    # The case's threshold is 0.5; the prompt has tokens on either side of it.
    soft = int((entropy > 0.5).sum())
    assert 0 < soft < len(prompt)
    assert since("adapter_tokens_total") == len(prompt)
    assert since("router_decisions_total") == len(prompt)
    assert since("experts_activated_total") == int(chosen.sum())
    assert since("soft_routed_total") == soft
    result = since("router_entropy_sum")
    assert result == pytest.approx(float(entropy.sum()), abs=1e-4)
    for expert, expected in enumerate(chosen.sum(dim=0).tolist()):
        labels = f'{{adapter="m",expert="{expert}"}}'
        assert since(f"expert_tokens_total{labels}") == expected


def test_figures_grow_with_what_is_sent_and_end_at_unload(clean: Api) -> None:
    assert clean.load("m", "mixlora").status_code == 200
    since = counted(clean, "m")
    prompts = [prompt["prompt_token_ids"] for prompt in oracle("mixlora")["prompts"][:3]]
    for prompt in prompts:
        clean.complete("m", prompt, 12)
    # The last token of each answer is never read.
    tokens = sum(len(prompt) + 11 for prompt in prompts)
    assert since("adapter_tokens_total") == tokens
    assert since("router_decisions_total") == 4 * tokens
    assert since("experts_activated_total") == 2 * 4 * tokens
    assert since("soft_routed_total") == 0
    assert clean.of_adapter("m", "adapter_requests_in_flight") == 0
    loaded = clean.metrics()["molehill_adapters_loaded"]
    states = {"loading": 0, "serving": loaded, "draining": 0, "failed": 0}
    for state, number in states.items():
        assert clean.metrics()[f'molehill_adapters{{state="{state}"}}'] == number
    assert clean.unload("m").status_code == 200
    samples = clean.metrics()
    assert samples["molehill_adapters_loaded"] == loaded - 1
    assert not [sample for sample in samples if '"m"' in sample]


def test_base_requests_count_for_no_adapter(api: Api) -> None:
    before = api.of_adapter("started", "adapter_tokens_total")
    api.greedy("tiny", [5, 6, 7])
    assert api.of_adapter("started", "adapter_tokens_total") == before


def test_the_exposition_parses_and_holds_vllms_families(api: Api) -> None:
    response = api.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert families["molehill_expert_tokens"].type == "counter"
    assert families["molehill_router_entropy"].type == "summary"
    assert families["molehill_adapter_resident_bytes"].type == "gauge"
    assert "vllm:num_requests_running" in families


def series(api: Api) -> set[str]:
    """Of vLLM, the HTTP server and molehill."""
    lines = api.http.get("/metrics").text.splitlines()
    return {line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#")}


def test_series_do_not_grow_with_the_sets_of_adapters_that_run_together(clean: Api) -> None:
    names = [f"{case}-{uuid.uuid4().hex[:8]}" for case in ("lora", "mola", "mixlora", "loramoe")]

    def ask_together(chosen: tuple[str, ...]) -> None:
        with ThreadPoolExecutor(len(chosen)) as pool:
            list(pool.map(lambda name: clean.greedy(name, [5, 6, 7], 40), chosen))

    clean.greedy(BASE, [5, 6, 7])
    before = series(clean)
    for name in names:
        assert clean.load(name, name.partition("-")[0]).status_code == 200
    ask_together(tuple(names[:1]))
    few = series(clean)
    for size in (2, 3, 4):
        for chosen in itertools.combinations(names, size):
            ask_together(chosen)
    assert {text for text in series(clean) - few if any(name in text for name in names)} == set()
    for name in names:
        assert clean.unload(name).status_code == 200
    left = series(clean)
    assert not [text for text in left if any(name in text for name in names)]
    # What is new is the routes that had not been asked before.
    assert len(left - before) < 30


def test_names_that_clients_make_up_create_no_series(api: Api) -> None:
    def ask(number: int) -> None:
        name = f"made-up-{number}"
        with pytest.raises(openai.NotFoundError):
            api.greedy(name, [5, 6, 7])
        assert api.http.get(f"/v1/adapters/{name}").status_code == 404
        assert api.http.get(f"/{name}").status_code == 404

    ask(0)
    before = series(api)
    for number in range(1, 20):
        ask(number)
    assert series(api) == before
