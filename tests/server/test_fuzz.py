"""Requests that nobody would write, made from the server's own OpenAPI document."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from support.api_client import BASE, KEY, Api, oracle
from support.examples import examples

schemathesis = pytest.importorskip("schemathesis", reason="the dev extra is not installed")
GenerationMode = schemathesis.GenerationMode
EXAMPLES = 30
FUZZ = settings(
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

# What molehill answers for, beside vLLM's own routes.
OURS = (
    r"^/(v1/(adapters|routing|models|load_lora_adapter|unload_lora_adapter)|health/ready|metrics)"
)
# Of them, routes that have requests that fit the document, and that do not.
OPERATIONS = {GenerationMode.POSITIVE: 12, GenerationMode.NEGATIVE: 5}

# Below 500, of a status that the document has, and of its shape.
CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
]

# Mixed in, so that requests also come to the ends of their routes.
NAMES = ("a", "b", "team/a", BASE, "ghost")
SOURCES = ("lora", "mola", "no-such", "..", "lora/../mola", "hf://a/b", "https://x/y")


@pytest.fixture(scope="module")
def document(api: Api) -> Iterator[Any]:
    """The OpenAPI document of the shared server, whose other adapters stay as they are."""
    before = set(api.models())
    yield schemathesis.openapi.from_url(f"{api.url}/openapi.json", headers=api.http.headers)
    for name in set(api.models()) - before:
        assert api.unload(name).status_code == 200


def ask(case: Any, name: str, source: str, known: bool) -> Any:
    """Sends a case. Half of them mean something that is there; none takes `started` away."""
    if known and isinstance(case.body, dict):
        fields: dict[str, Any] = dict.fromkeys(("name", "lora_name"), name)
        fields |= {**dict.fromkeys(("source", "lora_path"), source), "mix": {name: 0.5}}
        case.body.update({field: value for field, value in fields.items() if field in case.body})
    if known and "name" in case.path_parameters:
        case.path_parameters["name"] = name
    return case.call(headers={"Authorization": f"Bearer {KEY}"})


@pytest.mark.parametrize("mode", GenerationMode)
def test_every_answer_is_as_the_document_says(api: Api, document: Any, mode: Any) -> None:
    """mode: requests that fit the document, and such that do not."""
    seen: Counter[str] = Counter()
    ended: set[int] = set()
    for result in document.include(path_regex=OURS).get_all_operations():
        operation = result.ok()

        @settings(FUZZ, max_examples=examples(EXAMPLES))
        @given(
            case=operation.as_strategy(mode),
            name=st.sampled_from(NAMES),
            source=st.sampled_from(SOURCES),
            known=st.booleans(),
        )
        def try_out(case: Any, name: str, source: str, known: bool) -> None:
            response = ask(case, name, source, known)
            case.validate_response(response, checks=CHECKS)
            seen[case.operation.label] += 1
            ended.add(response.status_code)

        # A route without parameters has no requests that do not fit.
        with suppress(Unsatisfiable):
            try_out()
    assert len(seen) >= OPERATIONS[mode]
    assert ended >= {400, 404} | ({200} if mode is GenerationMode.POSITIVE else set())
    prompt = oracle("dynmole-default")["prompts"][0]
    assert api.greedy("started", prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]


# Lone surrogates are JSON, but no text that can be encoded.
TEXTS = st.text(st.characters(exclude_categories=()), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    "name",
    "source",
    "pinned",
    "expected_generation",
    "allow_noop",
    "lora_name",
    "lora_path",
    "mix",
)
POSTS = ("adapters", "adapters/a/pin", "load_lora_adapter", "unload_lora_adapter")


@settings(FUZZ, max_examples=examples(4 * EXAMPLES))
@given(
    path=st.sampled_from(POSTS),
    body=JSON | st.dictionaries(st.sampled_from(FIELDS), JSON | TEXTS, max_size=4),
)
def test_any_json_is_answered(api: Api, path: str, body: Any) -> None:
    text = json.dumps(body)
    headers = {"Content-Type": "application/json"}
    response = api.http.post(f"/v1/{path}", content=text, headers=headers)
    assert response.status_code < 500, (text, response.text)


@pytest.mark.parametrize("text", ["\ud800", "a\ud800", "\x1b[2J", "\u202e", "\x00"])
def test_text_that_cannot_be_shown_is_refused(api: Api, text: str) -> None:
    bodies = {
        "adapters": [{"name": text, "source": "lora"}, {"name": "a", "source": text}],
        "load_lora_adapter": [{"lora_name": text, "lora_path": "lora"}],
        "unload_lora_adapter": [{"lora_name": text}],
    }
    expecting = {"name": "a", "source": "lora", "expected_generation": text}
    for path, result in {**bodies, "adapters": [*bodies["adapters"], expecting]}.items():
        for body in result:
            headers = {"Content-Type": "application/json"}
            response = api.http.post(f"/v1/{path}", content=json.dumps(body), headers=headers)
            assert api.error(response)[0] in (400, 404, 409), body
