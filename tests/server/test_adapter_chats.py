"""Adapters that are talked to by templates and special tokens of their own, over HTTP: what is
rendered is what Transformers renders by the tokenizer in the adapter's directory."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from support.activated import INVOCATION
from support.api_client import BASE, Api, copy_adapter
from support.golden import TINY_LLAMA
from transformers import AutoTokenizer

CHATML = (
    "{% for m in messages %}{{ bos_token + m['role'] + ': ' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant: ' }}{% endif %}"
)
TOOLS = "{% if tools %}{{ tools[0].function.name }} {% endif %}" + CHATML
SHOUTED = (
    "{% for m in messages %}How many {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} The{% endif %}"
)
MESSAGES: Any = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "the lamp"},
    {"role": "user", "content": "which fox"},
]
TOOL: Any = {"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}


def adapter(api: Api, case: str, name: str, template: Any, **special_tokens: str) -> Path:
    """A golden adapter with the tokenizer files that a trainer leaves beside it."""
    folder = copy_adapter(case, api.root / name)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA, **special_tokens)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def load(api: Api, name: str, source: str, **more: Any) -> Any:
    answer = api.http.post("/v1/adapters", json={"name": name, "source": source, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def tokens(api: Api, model: str, messages: Any = MESSAGES, **more: Any) -> list[int]:
    """As /tokenize renders them."""
    answer = api.http.post("/tokenize", json={"model": model, "messages": messages, **more})
    assert answer.status_code == 200, answer.text
    result: list[int] = answer.json()["tokens"]
    return result


def rendered(folder: Path, messages: Any = MESSAGES, **more: Any) -> list[int]:
    """As Transformers does by the directory's tokenizer."""
    arguments = {"add_generation_prompt": True, "return_dict": False, **more}
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    result: list[int] = tokenizer.apply_chat_template(messages, **arguments)
    return result


def chat(
    api: Api, model: str, messages: Any = MESSAGES, **more: Any
) -> tuple[list[int], list[int]]:
    """(Token ids of the prompt, greedy tokens of the answer)."""
    extra = {"return_token_ids": True, "ignore_eos": True, **more.pop("extra_body", {})}
    answer: Any = api.openai.chat.completions.create(
        model=model, messages=messages, max_tokens=8, temperature=0, extra_body=extra, **more
    )
    if not more.get("stream"):
        return answer.prompt_token_ids, answer.choices[0].token_ids
    chunks = list(answer)
    prompts = [ids for c in chunks if (ids := getattr(c, "prompt_token_ids", None))]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return prompts[0], [t for c in choices for t in getattr(c, "token_ids", None) or ()]


def test_each_model_is_talked_to_by_its_template_in_one_batch(clean: Api) -> None:
    folders = {
        BASE: TINY_LLAMA,
        "a": adapter(clean, "lora", "chatml", {"default": CHATML, "tool_use": TOOLS}),
        "b": adapter(clean, "lora", "shouted", SHOUTED),
        "c": adapter(clean, "mola", "mola-chatml", CHATML),
    }
    shown = {name: load(clean, name, folders[name].name)["chat"] for name in "abc"}
    assert {name: sorted(chat["templates"]) for name, chat in shown.items()} == {
        "a": ["default", "tool_use"],
        "b": ["default"],
        "c": ["default"],
    }
    assert clean.http.get("/v1/adapters/b").json()["chat"] == shown["b"]
    expected = {name: rendered(folder) for name, folder in folders.items()}
    assert len(set(map(tuple, expected.values()))) == 3
    jobs = [(name, stream) for name in folders for stream in (False, True)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: chat(clean, job[0], stream=job[1]), jobs))
    for (name, _), (prompt, answer) in zip(jobs, answers, strict=True):
        assert prompt == expected[name] == tokens(clean, name)
        assert answer == clean.greedy(name, prompt, 8)


def test_every_way_to_render_takes_the_template(clean: Api) -> None:
    folder = adapter(clean, "lora", "ways", {"default": CHATML, "tool_use": TOOLS})
    load(clean, "m", "ways")
    options = {"add_generation_prompt": False, "continue_final_message": True}
    open_end = MESSAGES[:2]
    expected = rendered(folder, open_end, **options)
    assert tokens(clean, "m", open_end, **options) == expected
    assert chat(clean, "m", open_end, extra_body=options)[0] == expected
    with_tools = rendered(folder, tools=[TOOL])
    assert with_tools != rendered(folder)
    assert tokens(clean, "m", tools=[TOOL]) == with_tools
    assert chat(clean, "m", tools=[TOOL], tool_choice="none")[0] == with_tools
    counts = {
        "/v1/responses": {"input": MESSAGES[:1], "max_output_tokens": 1},
        "/v1/messages": {"messages": MESSAGES[:1], "max_tokens": 1},
    }
    for route, body in counts.items():
        answer = clean.http.post(route, json={"model": "m", **body})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["input_tokens"] == len(rendered(folder, MESSAGES[:1]))
    # A request's own is vLLM's to allow; on this server it is not.
    for model in (BASE, "m"):
        with pytest.raises(openai.BadRequestError, match="--trust-request-chat-template"):
            chat(clean, model, extra_body={"chat_template": SHOUTED})


def test_a_mix_is_talked_to_as_the_base_is(clean: Api) -> None:
    folder = adapter(clean, "lora", "of-a-mix", CHATML)
    load(clean, "m", "of-a-mix")
    assert rendered(folder) != rendered(TINY_LLAMA)
    answers = [
        chat(clean, model, extra_body={"molehill": {"mix": {"m": 0.5}}}) for model in ("m", BASE)
    ]
    assert answers[0] == answers[1]
    assert answers[0][0] == rendered(TINY_LLAMA)


def test_another_template_is_taken_up_in_place(clean: Api) -> None:
    folder = adapter(clean, "lora", "replaced", CHATML)
    first = load(clean, "m", "replaced")
    (folder / "chat_template.jinja").write_text(SHOUTED)
    assert tokens(clean, "m") != rendered(folder)
    refused = clean.load("m", "replaced")
    assert (refused.status_code, "another chat template" in refused.text) == (400, True)
    second = load(clean, "m", "replaced")
    assert (second["status"], second["generation"]) == ("replaced", first["generation"])
    assert tokens(clean, "m") == rendered(folder)
    assert load(clean, "m", "replaced")["status"] == "unchanged"
    assert load(clean, "m", "replaced", chat_template="base")["chat"] is None
    assert tokens(clean, "m") == tokens(clean, BASE)


def test_a_template_that_does_not_compile_is_refused_with_its_line(clean: Api) -> None:
    folder = adapter(clean, "lora", "bad-template", CHATML)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}\n{% for %}")
    body = {"name": "m", "source": "bad-template"}
    status, kind, message = clean.error(clean.http.post("/v1/adapters", json=body))
    assert (status, kind) == (422, "invalid_config")
    assert message.startswith("chat_template.jinja: line 2: found ")
    assert set(clean.models()) == {BASE, "started"}


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(messages) }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ raise_exception('no such role') }}",
    ],
)
def test_a_template_that_fails_or_breaks_out_is_a_bad_request(clean: Api, template: str) -> None:
    name = f"escape-{abs(hash(template))}"
    adapter(clean, "lora", name, template)
    load(clean, "m", name)
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            chat(clean, "m", stream=stream)
        assert "/" not in refused.value.message.replace("input/output", "")
    assert tokens(clean, BASE) == rendered(TINY_LLAMA)


def test_the_adapters_end_of_text_ends_its_answers(clean: Api) -> None:
    prompt = rendered(TINY_LLAMA)
    answer = clean.greedy("started", prompt, 12)
    end = next(token for token in answer[2:] if answer.index(token) >= 2)
    text = AutoTokenizer.from_pretrained(TINY_LLAMA).convert_ids_to_tokens(end)
    template = AutoTokenizer.from_pretrained(TINY_LLAMA).chat_template
    folder = adapter(clean, "dynmole-default", "ends", template)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": text}))
    shown = load(clean, "ends", "ends")["chat"]
    assert (shown["stop_token_ids"], shown["templates"]) == ([end], {})
    assert shown["special_tokens"] == {"eos_token": text}

    def ask(model: str, **more: Any) -> Any:
        extra = {"return_token_ids": True, **more}
        return clean.openai.chat.completions.create(
            model=model,
            messages=MESSAGES,
            max_tokens=12,
            temperature=0,
            extra_body=extra,
        ).choices[0]

    ended = ask("ends")
    assert ended.token_ids == answer[: answer.index(end) + 1]
    assert ended.finish_reason == "stop"
    assert ask("started").token_ids == answer
    assert ask("ends", ignore_eos=True).token_ids == answer


def test_an_activated_adapters_template_invokes_it(clean: Api) -> None:
    invocation = AutoTokenizer.from_pretrained(TINY_LLAMA).decode(INVOCATION)
    asking = "{% if add_generation_prompt %}{{ 'assistant:" + invocation + "' }}{% endif %}"
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}" + asking
    folder = adapter(clean, "alora", "invoking", template)
    load(clean, "m", "invoking")
    load(clean, "plain", "alora")
    prompt, answer = chat(clean, "m")
    assert prompt == rendered(folder)
    assert prompt[-len(INVOCATION) :] == INVOCATION
    assert answer == clean.greedy("plain", prompt, 8)
    assert answer != clean.greedy(BASE, prompt, 8)
    with pytest.raises(openai.BadRequestError, match="that activate the adapter 'plain'"):
        chat(clean, "plain")


def test_tokens_that_the_base_lacks_are_named_in_a_warning(clean: Api) -> None:
    adapter(clean, "lora", "more-tokens", SHOUTED, pad_token="<|pad|>")
    (warning,) = [w for w in load(clean, "m", "more-tokens")["warnings"] if "tokenizer" in w]
    assert "added tokens that the base's lacks: '<|pad|>'" in warning
