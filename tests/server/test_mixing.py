"""Mixes by request and by name, with OpenAI's client, against PEFT's weighted sums."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from support.api_client import BASE, Api, Running, eventually, oracle
from support.authored import SCALES, save_lora, weighted_answers
from support.golden import Prompt

HEADER = "Molehill-Mix"
TEXT = "The lamp and the map"
STACK = {"formal": 1.0, "german": 1.0, "short": 1.0}


def post(api: Api, name: str, **body: Any) -> httpx.Response:
    return api.http.post("/v1/adapters", json={"name": name, **body})


def written(weights: dict[str, float]) -> str:
    return ", ".join(f"{name}={weight}" for name, weight in weights.items())


@pytest.fixture(scope="module")
def parts(api: Api, authored: Any) -> dict[str, str]:
    """Sources of three LoRAs of unequal ranks and linears, by name."""
    folder = api.root / "parts"
    for name in SCALES:
        shutil.copytree(authored["mix"].path / name, folder / name)
    save_lora(folder / "short", 33, r=4, target_modules=["v_proj", "down_proj", "o_proj"])
    return {name: f"parts/{name}" for name in STACK}


@pytest.fixture
def mixing(clean: Api, parts: dict[str, str]) -> Api:
    """The shared server with the three; unloading them ends their mixes."""
    for name, source in parts.items():
        answer = post(clean, name, source=source)
        assert answer.status_code == 200, answer.text
    return clean


def tokens(api: Api, prompt: Prompt, weights: dict[str, float], model: str = BASE) -> list[int]:
    answer = api.openai.completions.create(
        model=model,
        prompt=list(prompt.ids),
        max_tokens=len(prompt.greedy),
        temperature=0,
        extra_body={
            "ignore_eos": True,
            "return_token_ids": True,
            "molehill": {"mix": weights},
        },
    )
    choice: Any = answer.choices[0]
    assert answer.model == "(mix)"
    return list(choice.token_ids)


def listed(api: Api) -> list[dict[str, Any]]:
    """Mixes by request."""
    data = api.http.get("/v1/adapters").json()["data"]
    return [info for info in data if info["name"] == "(mix)" and info["state"] == "serving"]


def test_a_request_names_adapters_and_weights(mixing: Api, authored: Any) -> None:
    """As its model it names the base or one of them; order does not matter."""
    backwards = dict(reversed(SCALES.items()))
    for prompt in authored["mix"].prompts:
        for model, weights in ((BASE, SCALES), ("formal", backwards), ("german", SCALES)):
            assert tuple(tokens(mixing, prompt, weights, model)) == prompt.greedy
    (mix,) = listed(mixing)
    shown = {part["name"]: part for part in mix["mix"]}
    assert {name: part["weight"] for name, part in shown.items()} == SCALES
    for name in SCALES:
        serving = mixing.http.get(f"/v1/adapters/{name}").json()
        assert shown[name]["generation"] == serving["generation"]
    assert (mix["kind"], mix["plan"]["dynamic"]) == ("mix", 0)


def test_three_are_stacked_with_weight_1_each(mixing: Api, parts: dict[str, str]) -> None:
    paths = {name: mixing.root / source for name, source in parts.items()}
    for prompt in weighted_answers("stack", paths, STACK):
        assert tuple(tokens(mixing, prompt, STACK)) == prompt.greedy


def test_mixes_and_their_parts_share_a_batch(mixing: Api, authored: Any) -> None:
    """Half of them by name, half by request, and what golden cases say beside them."""
    prompt = authored["mix"].prompts[0]
    assert post(mixing, "third", mix={"short": 0.5, "german": 0.5}).status_code == 200
    alone = {name: mixing.greedy(name, list(prompt.ids)) for name in (*STACK, "third", BASE)}
    golden = oracle("dynmole-default")["prompts"][0]

    def ask(n: int) -> bool:
        name = list(alone)[n % len(alone)]
        if n % 3 == 0:
            return tuple(tokens(mixing, prompt, SCALES)) == prompt.greedy
        if n % 3 == 1:
            return mixing.greedy(name, list(prompt.ids)) == alone[name]
        answered = mixing.greedy("started", golden["prompt_token_ids"])
        return bool(answered == golden["greedy_token_ids"])

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(24)))


def test_every_route_takes_the_header(mixing: Api) -> None:
    """They answer as the same mix does by its name."""
    named = post(mixing, "named", mix=SCALES).json()
    assert (named["status"], named["source"]) == ("loaded", "formal=0.75, german=-0.4")
    assert {part["name"]: part["weight"] for part in named["mix"]} == SCALES
    header = {HEADER: written(SCALES)}
    messages: Any = [{"role": "user", "content": TEXT}]
    chat = {"messages": messages, "max_tokens": 8, "temperature": 0}
    routes: dict[str, dict[str, Any]] = {
        "completions": {"prompt": TEXT, "max_tokens": 8, "temperature": 0},
        "chat/completions": chat,
        "responses": {"input": TEXT, "max_output_tokens": 8, "temperature": 0},
        "messages": chat,
    }
    field = {"completions": "choices", "chat/completions": "choices", "responses": "output"}
    for route, body in routes.items():
        answers = {}
        for model, headers in (("named", {}), (BASE, header), ("formal", {}), (BASE, {})):
            answer = mixing.http.post(
                f"/v1/{route}", json={"model": model, **body}, headers=headers
            )
            assert answer.status_code == 200, answer.text
            content = answer.json()[field.get(route, "content")]
            answers[model, *headers] = text_of(content), answer.headers.get("molehill-generation")
        assert answers[BASE, HEADER] == answers["named",]
        assert answers["named",][1] == named["generation"]
        assert answers[BASE,][1] is None
        assert answers["named",][0] not in (answers["formal",][0], answers[BASE,][0])
    generate = {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 8, "temperature": 0}}
    generated = [
        mixing.http.post("/inference/v1/generate", json={"model": model, **generate}, headers=more)
        for model, more in (("named", {}), (BASE, header))
    ]
    assert [answer.status_code for answer in generated] == [200, 200], generated[0].text
    assert generated[0].json()["choices"] == generated[1].json()["choices"]
    assert generated[1].headers["molehill-generation"] == named["generation"]
    # The name serves them all.
    assert listed(mixing) == []


def text_of(content: Any) -> str:
    """Of an answer's first choice, whatever the route calls it."""
    first = content[0]
    if "content" in first:
        return str(first["content"][0]["text"])
    return str(first["message"]["content"] if "message" in first else first["text"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_the_field_is_found_however_json_writes_it(mixing: Api, encoding: str) -> None:
    body = {"model": BASE, "prompt": [1, 2], "max_tokens": 1, "molehill": {"mix": SCALES}}
    text = json.dumps(body).replace('"molehill"', '"mole\\u0068ill"')
    headers = {"Content-Type": "application/json"}
    answer = mixing.http.post("/v1/completions", content=text.encode(encoding), headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "(mix)"


def test_openais_client_streams_it_by_a_header(mixing: Api, authored: Any) -> None:
    prompt = authored["mix"].prompts[0]
    stream = mixing.openai.completions.with_streaming_response.create(
        model=BASE,
        prompt=list(prompt.ids),
        max_tokens=12,
        temperature=0,
        stream=True,
        extra_headers={HEADER: written(SCALES)},
        extra_body={"ignore_eos": True},
    )
    with stream as response:
        assert response.headers["molehill-generation"] == listed(mixing)[0]["generation"]
        assert '"(mix)"' in response.read().decode()


def test_equal_mixes_share_the_prefix_cache(mixing: Api) -> None:
    prompt = [(31 * i + 7) % 280 + 5 for i in range(70)]

    def cached(weights: dict[str, float]) -> int:
        answer = mixing.complete(BASE, prompt, 1, extra_headers={HEADER: written(weights)})
        tokens_read: int = answer.usage.prompt_tokens_details.cached_tokens
        return tokens_read

    assert [cached({"formal": 0.5, "german": 0.25}), cached({"german": 0.25, "formal": 0.5})] == [
        0,
        64,
    ]
    assert cached({"formal": 0.5, "german": 0.5}) == 0


def test_an_adapter_with_weight_1_is_itself(mixing: Api) -> None:
    """Also one that no sum can have in it."""
    prompt = oracle("dynmole-default")["prompts"][0]
    for model in (BASE, "started", "formal"):
        mix = {"started": 1, "formal": 0}
        answer = mixing.complete(
            model, prompt["prompt_token_ids"], extra_headers={HEADER: written(mix)}
        )
        assert answer.model == "started"
        assert answer.choices[0].token_ids == prompt["greedy_token_ids"]
    assert listed(mixing) == []


@pytest.mark.parametrize(
    ("mix", "status", "kind", "message"),
    [
        ({}, 400, "invalid_mix", "found {}, expected weights"),
        (["formal"], 400, "invalid_mix", "found ['formal'], expected weights"),
        ({"formal": "1"}, 400, "invalid_mix", "'formal': found '1', expected a number"),
        ({"formal": 1e9}, 400, "invalid_mix", "from -100 to 100"),
        ({"formal": 0}, 400, "invalid_mix", "weights of 0 alone"),
        ({"formal": 1, "ghost": 1}, 404, "adapter_not_loaded", "found 'ghost', expected names"),
        ({"formal": 1, BASE: 1}, 404, "adapter_not_loaded", f"found '{BASE}', expected names"),
        (
            {"formal": 1, "started": 0.5},
            422,
            "unsupported",
            "found a mixture that reads the token (DynMoLE), expected a LoRA's",
        ),
    ],
)
def test_a_mix_that_is_none_is_refused_by_request_and_by_name(
    mixing: Api, mix: Any, status: int, kind: str, message: str
) -> None:
    body = {"model": BASE, "prompt": "x", "max_tokens": 1, "molehill": {"mix": mix}}
    answer = mixing.http.post("/v1/completions", json=body)
    refusal = mixing.error(answer)
    assert refusal[:2] == (status, kind)
    assert message in refusal[2]
    assert str(mixing.store) not in refusal[2]
    loaded = mixing.http.post("/v1/adapters", json={"name": "x", "mix": mix})
    if isinstance(mix, dict) and kind != "invalid_mix":
        assert mixing.error(loaded) == refusal
    assert loaded.status_code in (status, 422)
    assert mixing.http.get("/v1/adapters/x").status_code == 404
    assert listed(mixing) == []


def test_what_contradicts_itself_is_refused(mixing: Api) -> None:
    mix = {"formal": 0.5, "german": 0.5}
    plain = {"model": BASE, "prompt": "x", "max_tokens": 1}
    for body, headers, status in (
        ({**plain, "molehill": {"mix": mix}}, {HEADER: written(mix)}, 400),
        ({**plain, "molehill": {"mixes": mix}}, {}, 400),
        ({**plain, "molehill": 3}, {}, 400),
        (plain, {HEADER: "formal"}, 400),
        ({**plain, "model": "short", "molehill": {"mix": mix}}, {}, 400),
        ({**plain, "model": "ghost", "molehill": {"mix": mix}}, {}, 404),
    ):
        answer = mixing.http.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == status, (body, answer.text)
        assert answer.json()["error"]["code"] == status
    assert mixing.http.post("/v1/completions", json={**plain, "molehill": None}).status_code == 200
    for more in ({"source": "lora"}, {"base_is_residual": True}, {"non_granular_after": 0}):
        answer = post(mixing, "x", mix=mix, **more)
        assert mixing.error(answer)[:2] == (400, "invalid_mix")
    assert mixing.error(post(mixing, "x"))[:2] == (400, "invalid_path")


def test_a_running_mix_ends_as_it_began_when_a_part_goes(mixing: Api, authored: Any) -> None:
    prompt = authored["mix"].prompts[0]
    weights = {"formal": 0.25, "german": 0.5}
    alone = mixing.complete(BASE, list(prompt.ids), 300, extra_headers={HEADER: written(weights)})
    headers = {HEADER: written(weights)}

    class Mixed(Api):
        def complete(self, *args: Any, **more: Any) -> Any:
            return super().complete(*args, extra_headers=headers, **more)

    running = Running(Mixed(mixing.url, mixing.root, mixing.store), BASE, list(prompt.ids), 300)
    (mix,) = listed(mixing)
    assert mixing.unload("german").status_code == 200
    with pytest.raises(openai.NotFoundError, match="found 'german', expected names"):
        mixing.complete(BASE, list(prompt.ids), 1, extra_headers=headers)
    assert running.rest() == alone.choices[0].token_ids
    # Other weights of that name are another mix.
    assert post(mixing, "german", source="parts/short").status_code == 200
    mixing.complete(BASE, list(prompt.ids), 1, extra_headers=headers)
    assert [info["generation"] for info in listed(mixing)] != [mix["generation"]]
    assert eventually(lambda: not (mixing.store / mix["generation"]).exists())


def test_mixes_by_request_have_one_set_of_series(mixing: Api) -> None:
    scrapes = []
    for n in range(4):
        weights = {"formal": 1.0 + n, "german": 1.0}
        mixing.complete(BASE, [5, 6, 7], 2, extra_headers={HEADER: written(weights)})
        scrapes.append(mixing.metrics())
    assert len(listed(mixing)) == 4
    # Four mixes, and the series of one adapter.
    first, *_, last = scrapes
    assert first.keys() == last.keys()
    hits = [
        sum(value for series, value in scrape.items() if 'hits_total{adapter="(mix)"' in series)
        for scrape in (first, last)
    ]
    assert hits[1] - hits[0] == 3
    tokens_run = 'molehill_adapter_tokens_total{adapter="(mix)"}'
    assert last[tokens_run] - first[tokens_run] == 3 * 4
    assert "(mix)" not in mixing.models()
    assert mixing.http.delete("/v1/adapters/(mix)").status_code == 404
