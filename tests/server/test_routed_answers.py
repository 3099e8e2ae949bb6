"""What routers chose, in the answers of the routes, with OpenAI's client, against the reference."""

import base64
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from support.api_client import BASE, KEY, Api, eventually, oracle
from support.golden import TINY_LLAMA, Case
from support.routed import Chosen, assert_chosen, gate_weights
from transformers import AutoModelForCausalLM

from molehill.api.cli import explain

CASE = "dynmole-soft"


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The base on Transformers."""
    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()


@pytest.fixture
def mixture(clean: Api) -> Api:
    """The shared server with a mixture, a plain LoRA and vectors."""
    for name, case in (("soft", CASE), ("plain", "lora"), ("heads", "mov")):
        assert clean.load(name, case).status_code == 200
    return clean


def arrays(routing: dict[str, Any]) -> dict[str, Any]:
    """Decoded as docs/routing.md says."""
    shape = routing["shape"]
    return {
        name: np.frombuffer(base64.b64decode(routing[name]), kind).reshape(shape)
        for name, kind in (("experts", "<i2"), ("weights", "<f2"))
        if name in routing
    }


def chosen(api: Api, name: str, parts: list[dict[str, Any]]) -> Chosen:
    """One choice's, of the parts that it came in."""
    listed = api.http.get(f"/v1/adapters/{name}").json()["routing"]
    position, decoded = 0, []
    for part in parts:
        assert part["start"] == position
        assert part["shape"][1:] == [len(listed["sites"]), listed["k"]]
        position += part["shape"][0]
        decoded.append(arrays(part))
    experts, weights = (
        np.concatenate([part[kind] for part in decoded]) for kind in ("experts", "weights")
    )
    routers = [(site["site"], site["head"] or 0) for site in listed["sites"]]
    return Chosen({r: (experts[:, i], weights[:, i]) for i, r in enumerate(routers)})


@pytest.mark.parametrize(("name", "case"), [("soft", CASE), ("heads", "mov")])
def test_completions_give_each_choice_its_own(
    mixture: Api, tiny: Any, name: str, case: str
) -> None:
    """Two prompts, the second known to the prefix cache, two samples each."""
    prompts = [prompt["prompt_token_ids"] for prompt in oracle(case)["prompts"][2:4]]
    mixture.complete(name, prompts[1], 1)
    answer: Any = mixture.openai.completions.create(
        model=name,
        prompt=prompts,
        n=2,
        seed=5,
        max_tokens=6,
        temperature=1.0,
        extra_body={
            "ignore_eos": True,
            "return_token_ids": True,
            "molehill": {"routing": "weights", "usage": True},
        },
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    decisions = activated = 0
    for choice in answer.choices:
        ids = [*prompts[choice.index // 2], *choice.token_ids[:-1]]
        result = chosen(mixture, name, [choice.molehill["routing"]])
        assert_chosen(result, gate_weights(tiny, Case(case).path, ids))
        decisions += len(ids) * len(result.routers)
        activated += sum(int((experts >= 0).sum()) for experts, _ in result.routers.values())
    usage = answer.usage.molehill
    assert (usage["router_decisions"], usage["experts_activated"]) == (decisions, activated)
    assert usage["experts_per_decision"] == pytest.approx(activated / decisions)


def test_a_streamed_chat_gives_each_chunk_its_part(mixture: Api, tiny: Any) -> None:
    chunks: list[Any] = list(
        mixture.openai.chat.completions.create(
            model="soft",
            messages=[{"role": "user", "content": "The lamp and the map"}],
            max_tokens=7,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={
                "ignore_eos": True,
                "return_token_ids": True,
                "molehill": {"routing": "weights", "usage": True},
            },
        )
    )
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    parts = [choice.molehill["routing"] for choice in choices if hasattr(choice, "molehill")]
    assert len(parts) > 3
    prompt = next(c.prompt_token_ids for c in chunks if getattr(c, "prompt_token_ids", None))
    generated = [token for c in choices for token in getattr(c, "token_ids", None) or ()]
    ids = [*prompt, *generated][:-1]
    assert sum(part["shape"][0] for part in parts) == len(ids)
    result = chosen(mixture, "soft", parts)
    assert_chosen(result, gate_weights(tiny, Case(CASE).path, ids))
    assert chunks[-1].usage.molehill["router_decisions"] == len(ids) * len(result.routers)


def test_the_token_route_takes_the_header_and_tells_ids_alone(mixture: Api) -> None:
    prompt = oracle(CASE)["prompts"][0]["prompt_token_ids"]
    body = {"model": "soft", "token_ids": prompt, "sampling_params": {"max_tokens": 1}}
    answers = [
        mixture.http.post("/inference/v1/generate", json=body, headers=headers)
        for headers in ({"Molehill-Routing": "experts"}, {})
    ]
    # Without max_tokens all that the model can hold is kept room for: more than this server has.
    unbounded = {**body, "sampling_params": {"max_tokens": None}}
    asking = {"Molehill-Routing": "experts"}
    refused = mixture.http.post("/inference/v1/generate", json=unbounded, headers=asking)
    assert mixture.error(refused)[0] == 400
    assert "(--routing-bytes)" in mixture.error(refused)[2]
    report, silent = (answer.json()["choices"][0] for answer in answers)
    assert "molehill" not in silent
    decoded = arrays(report["molehill"]["routing"])
    assert decoded.keys() == {"experts"}
    routes = Case(CASE).routes()
    sites = [s["site"] for s in mixture.http.get("/v1/adapters/soft").json()["routing"]["sites"]]
    for site, route in routes.items():
        ids = decoded["experts"][:, sites.index(site)]
        assert len(ids) == len(prompt)
        for row, weights in zip(ids, route["w"], strict=True):
            assert set(row[row >= 0]) == set(weights.nonzero().flatten().tolist())


def test_explain_draws_what_a_servers_kernels_chose(
    mixture: Api, tiny: Any, capsys: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.delenv(explain.KEY_VARIABLE, raising=False)
    prompt = oracle(CASE)["prompts"][0]
    page = tmp_path / "page.html"
    asked = [BASE, "soft", prompt["text"], "--url", mixture.url, "--max-tokens", "4"]
    assert explain.main(asked) == 2
    assert "401: Unauthorized" in capsys.readouterr().err
    monkeypatch.setenv(explain.KEY_VARIABLE, KEY)
    assert explain.main([*asked, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    ids = [*prompt["prompt_token_ids"], *prompt["greedy_token_ids"][:3]]
    assert (len(result["tokens"]), result["prompt_tokens"]) == (len(ids) + 1, len(ids) - 3)
    experts, weights = np.array(result["experts"], np.int16), np.array(result["weights"])
    routers = [(site["site"], site["head"] or 0) for site in result["sites"]]
    there = {r: (experts[:, i], weights[:, i]) for i, r in enumerate(routers)}
    wanted = gate_weights(tiny, Case(CASE).path, ids)
    assert_chosen(Chosen(there), wanted)
    for i, router in enumerate(routers):
        soft = [row[i] for row in result["soft"]]
        assert soft == (wanted[router] > 0).all(1).tolist()
    assert explain.main([*asked, "--output", str(page)]) == 0
    assert f"What the kernels of {mixture.url} chose" in page.read_text()
    assert explain.main([BASE, "plain", "x", "--url", mixture.url]) == 2
    assert "plain: found no router that decides anything" in capsys.readouterr().err


def test_a_bill_is_shapes_times_choices(mixture: Api) -> None:
    """Of a plain LoRA too, where nothing is decided; the base has none to pay."""
    prompt = [5, 6, 7]
    body = {"prompt": prompt, "max_tokens": 1, "molehill": {"usage": True}}
    before = mixture.http.get("/v1/adapters/plain/routing").json()["total"]["flops_done"]
    usages = {}
    for model in ("plain", BASE, "soft"):
        answer = mixture.http.post("/v1/completions", json={"model": model, **body})
        assert answer.status_code == 200, answer.text
        assert "molehill" not in answer.json()["choices"][0]
        usages[model] = answer.json()["usage"]["molehill"]
    after = mixture.http.get("/v1/adapters/plain/routing").json()["total"]["flops_done"]
    assert usages["plain"]["low_rank_flops"] == after - before > 0
    assert (usages["plain"]["tokens"], usages["plain"]["router_decisions"]) == (3, 0)
    assert usages[BASE]["low_rank_flops"] == usages[BASE]["tokens"] == 0
    assert usages["soft"]["tokens"] == 3


@pytest.mark.parametrize(
    ("path", "body", "headers", "message"),
    [
        ("completions", {"model": "plain"}, {}, "'plain', in which no router decides anything"),
        ("completions", {"model": BASE}, {}, "found the base model, which routes nothing"),
        ("completions", {"use_beam_search": True, "n": 2}, {}, "found beam search"),
        ("responses", {"input": "x"}, {}, "found a request of /v1/responses"),
        ("completions", {"molehill": {"routing": "all"}}, {}, "found 'all', expected true"),
        ("completions", {"molehill": {"usage": 1}}, {}, "usage: found 1"),
        ("completions", {}, {"Molehill-Routing": "paths"}, "found 'paths', expected experts"),
        ("completions", {"max_tokens": 2000}, {}, "(--routing-bytes)"),
        (
            "completions",
            {"vllm_xargs": {"molehill_routing": "1"}, "molehill": {}},
            {},
            "found molehill_routing in extra_args",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(
    mixture: Api, path: str, body: dict[str, Any], headers: dict[str, str], message: str
) -> None:
    asked = {"model": "soft", "prompt": "x", "max_tokens": 2, "molehill": {"routing": True}}
    # vLLM streams no beam search.
    for stream in (False,) if "use_beam_search" in body else (False, True):
        answer = mixture.http.post(
            f"/v1/{path}", json={**asked, **body, "stream": stream}, headers=headers
        )
        assert answer.status_code == 400, answer.text
        assert message in answer.json()["error"]["message"]


def test_a_client_that_leaves_frees_what_was_kept(mixture: Api) -> None:
    """What one such request may take leaves no room for a second one."""

    def ask() -> httpx.Response:
        body = {
            "model": "soft",
            "prompt": "x",
            "max_tokens": 400,
            "stream": True,
            "ignore_eos": True,
            "molehill": {"routing": "weights"},
        }
        with mixture.http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_bytes())
            return answer

    for _ in range(3):
        assert eventually(lambda: ask().status_code == 200)


def test_who_finds_the_memory_taken_is_told_when_to_come_back(mixture: Api) -> None:
    body = {
        "model": "soft",
        "prompt": "x",
        "max_tokens": 400,
        "ignore_eos": True,
        "molehill": {"routing": "weights"},
    }
    # Whoever drops an iterator of a stream hangs up.
    reading: list[Any] = []
    with ExitStack() as running:

        def begins() -> bool:
            """Once what earlier tests' clients left is freed."""
            streamed = mixture.http.stream("POST", "/v1/completions", json={**body, "stream": True})
            answer = running.enter_context(streamed)
            reading.append(answer.iter_bytes())
            return answer.status_code == 200 and bool(next(reading[-1]))

        assert eventually(begins)
        for stream in (False, True):
            refused = mixture.http.post("/v1/completions", json={**body, "stream": stream})
            status, kind, message = mixture.error(refused)
            assert (status, kind) == (503, "routing_memory_taken")
            assert "(--routing-bytes)" in message
            assert refused.headers["Retry-After"] == "1"
            assert refused.json()["error"]["param"] == "molehill"
