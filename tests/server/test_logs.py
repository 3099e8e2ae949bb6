"""A real server's log as JSON: every line, and whose request it is about."""

import json
import uuid
from typing import Any

from support.api_client import Api, eventually


def lines(api: Api) -> list[dict[str, Any]]:
    """What the server has logged since it serves; before that, C++ prints and Python imports."""
    assert api.log is not None
    written = api.log.read_text(errors="replace").splitlines(keepends=True)
    started = next(i for i, line in enumerate(written) if "Application startup complete" in line)
    # The last one may be on its way.
    return [json.loads(line) for line in written[started:] if line.endswith("\n")]


def of_request(api: Api, request_id: str) -> list[dict[str, Any]]:
    return [record for record in lines(api) if record.get("request_id") == request_id]


def test_every_line_is_json_and_names_its_request(clean: Api) -> None:
    assert clean.load("logged", "dynmole-soft").status_code == 200
    generation = clean.http.get("/v1/adapters/logged").json()["generation"]
    request_id, trace = uuid.uuid4().hex, uuid.uuid4().hex
    headers = {"X-Request-Id": request_id, "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    clean.complete("logged", [5, 6, 7], 2, extra_headers=headers)
    assert eventually(lambda: of_request(clean, request_id))
    (access,) = of_request(clean, request_id)
    assert access["name"] == "uvicorn.access"
    assert "POST /v1/completions" in access["message"]
    expected = {"adapter": "logged", "generation": generation, "trace_id": trace}
    assert {key: access[key] for key in expected} == expected


def test_molehills_lines_are_of_the_request_that_they_are_about(clean: Api) -> None:
    request_id = uuid.uuid4().hex
    headers = {"X-Request-Id": request_id}
    body = {"lora_name": "x", "lora_path": "no-such-directory", "unknown_field": 1}
    assert clean.http.post("/v1/load_lora_adapter", json=body, headers=headers).is_error
    assert eventually(lambda: len(of_request(clean, request_id)) == 2)
    ours, access = sorted(of_request(clean, request_id), key=lambda record: record["name"] or "")
    assert {ours["name"], access["name"]} == {"uvicorn.access", "vllm.molehill"}


def test_a_request_without_an_id_has_the_engines(api: Api) -> None:
    answer = api.complete("tiny", [5, 6, 7], 2)
    assert eventually(lambda: of_request(api, f"{answer.id}-0"))
