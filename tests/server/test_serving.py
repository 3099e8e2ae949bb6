"""The OpenAI protocol with adapters, over HTTP, against the oracles."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file
from support.api_client import BASE, GOLDEN, Api, eventually, oracle
from support.golden import SERVED, TINY_LLAMA
from transformers import AutoModelForCausalLM, AutoTokenizer

from molehill.engine import formats
from molehill.engine.hf.reference import attach


@pytest.mark.parametrize("case", SERVED)
def test_a_hot_loaded_adapter_gives_the_oracles_tokens(clean: Api, case: str) -> None:
    assert clean.load(case, case).status_code == 200
    for prompt in oracle(case)["prompts"]:
        tokens = clean.greedy(case, prompt["prompt_token_ids"])
        assert tokens == prompt["greedy_token_ids"]


def test_an_adapter_named_at_start_gives_the_oracles_tokens(api: Api) -> None:
    for prompt in oracle("dynmole-default")["prompts"]:
        assert api.greedy("started", prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]


def test_the_base_model_is_unchanged_beside_adapters(api: Api) -> None:
    for prompt in oracle("dynmole-default")["prompts"]:
        assert api.greedy(BASE, prompt["prompt_token_ids"]) == prompt["base_greedy_token_ids"]


def test_adapters_and_base_share_batches_without_mixing(clean: Api) -> None:
    cases = ("mixlora", "mola", "dynmole-soft", "lora")
    for case in cases:
        assert clean.load(case, case).status_code == 200
    jobs = [
        (model, prompt["prompt_token_ids"], prompt[answer])
        for case in cases
        for prompt in oracle(case)["prompts"]
        for model, answer in ((case, "greedy_token_ids"), (BASE, "base_greedy_token_ids"))
    ]
    with ThreadPoolExecutor(16) as pool:
        result = list(pool.map(lambda job: clean.greedy(job[0], job[1]), jobs))
    assert result == [expected for _, _, expected in jobs]


def test_streamed_tokens_are_the_oracles(api: Api) -> None:
    prompt = oracle("dynmole-default")["prompts"][2]
    stream = api.complete("started", prompt["prompt_token_ids"], stream=True)
    chunks = [chunk.choices[0].token_ids for chunk in stream if chunk.choices]
    assert len(chunks) > 1
    assert [token for chunk in chunks for token in chunk or ()] == prompt["greedy_token_ids"]


def test_logprobs_are_the_oracles(api: Api) -> None:
    prompt = oracle("dynmole-default")["prompts"][1]
    tensors = load_file(GOLDEN / "cases" / "dynmole-default" / "oracle.safetensors")
    expected = torch.log_softmax(tensors["prompt1.logits_last"], dim=0)
    response = api.openai.completions.create(
        model="started",
        prompt=prompt["prompt_token_ids"],
        max_tokens=1,
        temperature=0,
        logprobs=5,
        extra_body={"return_tokens_as_token_ids": True},
    )
    top = response.choices[0].logprobs.top_logprobs[0]
    result = {int(token.removeprefix("token_id:")): value for token, value in top.items()}
    assert set(result) == set(expected.topk(5).indices.tolist())
    for token, value in result.items():
        assert value == pytest.approx(expected[token].item(), abs=1e-3)


def test_chat_renders_the_template_and_runs_on_the_adapter(api: Api) -> None:
    messages = [{"role": "user", "content": "The lamp and the map"}]
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tiny-llama")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    rendered = tokenizer(text, add_special_tokens=False).input_ids
    answers = {}
    for model in ("started", BASE):
        response = api.openai.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=12,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        choice: Any = response.choices[0]
        answers[model] = choice.token_ids
        assert response.model == model
        assert answers[model] == api.greedy(model, rendered)
    assert answers["started"] != answers[BASE]


def test_the_responses_route_runs_on_the_adapter(api: Api) -> None:
    text = "The lamp and the map"
    answers = {}
    for model in ("started", BASE):
        response = api.openai.responses.create(
            model=model, input=text, max_output_tokens=12, temperature=0
        )
        chat = api.openai.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": text}],
            max_tokens=12,
            temperature=0,
        )
        answers[model] = response.output_text
        assert answers[model] == chat.choices[0].message.content
    assert answers["started"] != answers[BASE]


def test_streamed_responses_name_their_generation_and_are_counted(api: Api) -> None:
    def info() -> dict[str, Any]:
        result: dict[str, Any] = api.http.get("/v1/adapters/started").json()
        return result

    with api.openai.responses.with_streaming_response.create(
        model="started", input="The lamp", max_output_tokens=400, temperature=0, stream=True
    ) as stream:
        assert stream.headers["molehill-generation"] == info()["generation"]
        assert info()["requests_in_flight"] == 1
        assert "response.completed" in stream.read().decode()
    assert eventually(lambda: info()["requests_in_flight"] == 0)


def of_both(api: Api, **more: Any) -> list[Any]:
    """The messages of the adapter and of the base to one chat, in one batch with a request of the
    base's that wants nothing special."""

    def ask(model: str) -> Any:
        response = api.openai.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "The lamp and the map"}],
            max_tokens=200,
            temperature=0,
            **more,
        )
        assert response.choices[0].finish_reason in ("stop", "tool_calls"), model
        return response.choices[0].message

    free = oracle("dynmole-default")["prompts"][0]
    with ThreadPoolExecutor(3) as pool:
        beside = pool.submit(api.greedy, BASE, free["prompt_token_ids"])
        answers = list(pool.map(ask, ("started", BASE)))
    assert beside.result() == free["base_greedy_token_ids"]
    return answers


def structured(api: Api, **constraint: object) -> list[str]:
    messages = of_both(api, extra_body={"structured_outputs": constraint})
    return [message.content for message in messages]


def test_structured_output_by_choice(api: Api) -> None:
    assert set(structured(api, choice=["red", "green"])) <= {"red", "green"}


def test_structured_output_by_regex(api: Api) -> None:
    for text in structured(api, regex=r"[a-f]{3}-[0-9]{2}"):
        assert re.fullmatch(r"[a-f]{3}-[0-9]{2}", text)


SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"type": "string", "enum": ["red", "green"]},
        "sure": {"type": "boolean"},
    },
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


def assert_by_schema(text: str) -> None:
    result = json.loads(text)
    assert set(result) == {"colour", "sure"}
    assert result["colour"] in ("red", "green")
    assert isinstance(result["sure"], bool)


def test_structured_output_by_json_schema(api: Api) -> None:
    for text in structured(api, json=SCHEMA):
        assert_by_schema(text)


def test_a_tool_that_is_asked_for_is_called_by_the_adapter(api: Api) -> None:
    function = {"name": "paint", "parameters": SCHEMA}
    messages = of_both(
        api,
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "paint"}},
    )
    for message in messages:
        (call,) = message.tool_calls
        assert call.function.name == "paint"
        assert_by_schema(call.function.arguments)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The base on Transformers."""
    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()


@torch.inference_mode()
def best_beams(model: Any, prompt: list[int], tokens: int) -> list[list[int]]:
    """Transformers' two, the better one first."""
    result = model.generate(
        torch.tensor([prompt]),
        num_beams=2,
        num_return_sequences=2,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    beams: list[list[int]] = result[:, len(prompt) :].tolist()
    return beams


def test_beams_of_an_adapter_and_of_the_base_are_those_of_transformers(api: Api, tiny: Any) -> None:
    prompt, tokens = oracle("dynmole-default")["prompts"][1]["prompt_token_ids"], 6

    def ask(model: str) -> list[str]:
        answer = api.openai.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=tokens,
            n=2,
            temperature=0,
            extra_body={"use_beam_search": True, "ignore_eos": True},
        )
        return [choice.text for choice in answer.choices]

    with ThreadPoolExecutor(2) as pool:
        adapted, plain = pool.map(ask, ("started", BASE))
    adapter = formats.read(GOLDEN / "cases" / "dynmole-default")
    with attach(tiny, adapter):
        expected = best_beams(tiny, prompt, tokens)
    others = best_beams(tiny, prompt, tokens)
    assert expected != others
    decode = AutoTokenizer.from_pretrained(TINY_LLAMA).decode
    assert adapted == [decode(beam) for beam in expected]
    assert plain == [decode(beam) for beam in others]


def test_several_samples_run_on_the_adapter(api: Api) -> None:
    prompt = oracle("dynmole-default")["prompts"][0]
    response = api.openai.completions.create(
        model="started",
        prompt=prompt["prompt_token_ids"],
        max_tokens=12,
        n=3,
        # Among one candidate, sampling is greedy; vLLM refuses n > 1 at temperature 0.
        extra_body={"top_k": 1, "ignore_eos": True, "return_token_ids": True},
    )
    choices: list[Any] = list(response.choices)
    assert [c.token_ids for c in choices] == [prompt["greedy_token_ids"]] * 3


def test_an_unknown_model_is_not_found(api: Api) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        api.greedy("nobody", [5, 6])
    assert refusal.value.status_code == 404
    with pytest.raises(openai.NotFoundError):
        api.openai.chat.completions.create(
            model="../started", messages=[{"role": "user", "content": "x"}]
        )


def test_a_request_without_a_model_runs_on_the_base(api: Api) -> None:
    prompt = oracle("dynmole-default")["prompts"][0]
    body = {
        "prompt": prompt["prompt_token_ids"],
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = api.http.post("/v1/completions", json=body).json()
    assert answer["model"] == BASE
    assert answer["choices"][0]["token_ids"] == prompt["base_greedy_token_ids"]


def test_an_adapter_named_like_a_content_type_takes_no_foreign_requests(clean: Api) -> None:
    def chat(model: str) -> list[int]:
        response = clean.openai.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": [{"type": "text", "text": "The lamp"}]}],
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        choice: Any = response.choices[0]
        token_ids: list[int] = choice.token_ids
        return token_ids

    alone = chat(BASE)
    assert clean.load("text", "lora").status_code == 200
    assert chat(BASE) == alone
    assert chat("text") != alone


def test_health_is_open(api: Api) -> None:
    assert httpx.get(f"{api.url}/health").status_code == 200


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
def test_every_v1_route_wants_the_key(api: Api, headers: dict[str, str]) -> None:
    bodies = {
        "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "lora"},
        "/v1/unload_lora_adapter": {"lora_name": "started"},
        "/v1/completions": {"model": "started", "prompt": [5]},
    }
    for path, body in bodies.items():
        assert httpx.post(f"{api.url}{path}", json=body, headers=headers).status_code == 401
    assert httpx.get(f"{api.url}/v1/models", headers=headers).status_code == 401
    assert "started" in api.models()


def test_models_lists_base_and_adapters_without_paths(clean: Api) -> None:
    assert clean.load("team/model-x:v2", "lora").status_code == 200
    listed = clean.http.get("/v1/models").json()
    cards = {card["id"]: card for card in listed["data"]}
    assert set(cards) == {BASE, "started", "team/model-x:v2"}
    assert cards[BASE]["parent"] is None
    for name in ("started", "team/model-x:v2"):
        assert cards[name]["parent"] == BASE
        assert cards[name]["root"] == name
        assert cards[name]["max_model_len"] == 2048
    text = json.dumps(listed)
    for path in (clean.root, clean.store, GOLDEN):
        assert str(path) not in text
