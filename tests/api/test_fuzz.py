"""Requests that nobody would write, made from the server's own OpenAPI document."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from api_client import BASE, KEY, Api, oracle
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

schemathesis = pytest.importorskip("schemathesis", reason="the dev extra is not installed")

EXAMPLES = int(os.environ.get("MOLEHILL_FUZZ_EXAMPLES", "60"))

# What molehill answers for, beside vLLM's own routes.
OURS = r"^/(v1/(adapters|routing|models|load_lora_adapter|unload_lora_adapter)|health/ready)"

# Mixed in, so that requests also come to the ends of their routes.
NAMES = ("a", "b", "team/a", BASE, "started", "ghost")
SOURCES = ("lora", "mola", "no-such", "..", "lora/../mola", "hf://a/b", "https://x/y")


@pytest.fixture(scope="module")
def document(api: Api) -> Iterator[Any]:
    """The OpenAPI document of the shared server, whose other adapters stay as they are."""
    before = set(api.models())
    yield schemathesis.openapi.from_url(f"{api.url}/openapi.json", headers=api.http.headers)
    for name in set(api.models()) - before:
        assert api.unload(name).status_code == 200


schema = schemathesis.pytest.from_fixture("document")
ours = schema.include(path_regex=OURS)


@pytest.fixture
def sound(api: Api) -> Iterator[Api]:
    yield api
    prompt = oracle("dynmole-default")["prompts"][0]
    assert api.greedy("started", prompt["prompt_token_ids"]) == prompt["greedy_token_ids"]


SOMETIMES = st.sampled_from([True, False])


@ours.given(
    name=st.sampled_from(NAMES), source=st.sampled_from(SOURCES), known=SOMETIMES, wild=SOMETIMES
)
@ours.parametrize()
@settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
def test_no_request_is_a_server_error(
    case: Any, sound: Api, name: str, source: str, known: bool, wild: bool
) -> None:
    if known and isinstance(case.body, dict):
        fields = {"name": name, "lora_name": name, "source": source, "lora_path": source}
        case.body.update({field: own for field, own in fields.items() if field in case.body})
    if wild and case.path_parameters and name != "started":
        case.path_parameters["name"] = name
    if case.method == "DELETE" and case.path_parameters.get("name") == "started":
        case.path_parameters["name"] = "a"
    response = case.call(headers={"Authorization": f"Bearer {KEY}"})
    case.validate_response(response, checks=[schemathesis.checks.not_a_server_error])
