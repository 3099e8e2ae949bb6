"""No route of the whole app is open by accident."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
from api_client import GOLDEN
from starlette.routing import Mount
from starlette.testclient import TestClient

from molehill.api import launcher
from molehill.api.guard import Kind, kind_of
from molehill.api.options import Options

KEY, ADMIN = "a-key", "an-admin-key"

# All that answers without a key.
OPEN = {"/health", "/health/ready", "/ping", "/metrics", "/dashboard"}

# What must be guarded is there at all: a walk over an empty app would pass.
INHERITED = {
    *("/invocations", "/tokenize", "/detokenize", "/version", "/load", "/scale_elastic_ep"),
    *("/pause", "/resume", "/sleep", "/wake_up", "/collective_rpc", "/update_weights"),
    *("/reset_prefix_cache", "/server_info", "/abort_requests"),
    *("/v1/completions", "/v1/chat/completions", "/v1/models", "/inference/v1/generate"),
    *("/v1/adapters", "/v1/adapters/{name}", "/v1/adapters/{name}/pin"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/docs", "/openapi.json"),
}


def build(monkeypatch: pytest.MonkeyPatch, *arguments: str, admin: tuple[str, ...] = ()) -> Any:
    """vLLM's app with every route that it can have, ours among them; no engine behind it."""
    from vllm.entrypoints.launchers.app import build_app

    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_PLUGINS", launcher.allow_plugin(None))
    args = launcher.parse([str(GOLDEN / "tiny-llama"), *arguments])
    args = launcher.prepare(args, Options(admin_keys=admin))
    args.enable_fault_tolerance = True
    return build_app(args, ("generate", "embed", "classify", "transcription", "realtime"))


def operations(app: Any) -> Iterator[tuple[str, str]]:
    """(method, path) of every route, websockets as WEBSOCKET."""
    for route in app.routes:
        if isinstance(route, Mount):
            yield "GET", f"{route.path}/x"
            continue
        path = re.sub(r"\{(\w+)(:\w+)?\}", r"{\1}", route.path)
        for method in getattr(route, "methods", None) or ("WEBSOCKET",):
            yield method, path


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Any:
    return build(monkeypatch, "--api-key", KEY, admin=(ADMIN,))


def test_the_walk_meets_the_routes_that_it_is_about(app: Any) -> None:
    assert {path for _, path in operations(app)} >= INHERITED | OPEN


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
def test_without_a_key_every_route_is_closed_but_for_an_explicit_list(
    app: Any, headers: dict[str, str]
) -> None:
    client = TestClient(app)
    answers = {}
    for method, path in operations(app):
        if (path in OPEN and method in ("GET", "HEAD")) or method == "WEBSOCKET":
            continue
        answers[method, path] = client.request(method, path, headers=headers).status_code
    assert len(answers) > 60
    opened = {operation: status for operation, status in answers.items() if status != 401}
    assert opened == {}


def test_websockets_are_closed_too(app: Any) -> None:
    from starlette.testclient import WebSocketDenialResponse
    from starlette.websockets import WebSocketDisconnect

    paths = {path for method, path in operations(app) if method == "WEBSOCKET"}
    assert "/v1/realtime" in paths
    for path in paths:
        with (
            pytest.raises((WebSocketDisconnect, WebSocketDenialResponse)),
            TestClient(app).websocket_connect(path),
        ):
            pass


def test_what_changes_the_server_wants_the_admin_key(app: Any) -> None:
    client = TestClient(app)
    headers = {"Authorization": f"Bearer {KEY}"}
    changing = [
        (method, path) for method, path in operations(app) if kind_of(method, path) is Kind.ADMIN
    ]
    expected = {
        *(("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/{name}")),
        *(("POST", "/v1/adapters/{name}/pin"), ("POST", "/v1/load_lora_adapter")),
        *(("POST", "/v1/unload_lora_adapter"), ("POST", "/pause"), ("POST", "/collective_rpc")),
    }
    assert expected <= set(changing)
    for method, path in changing:
        answer = client.request(method, path, headers=headers)
        assert (method, path, answer.status_code) == (method, path, 403)
        if method != "HEAD":
            assert answer.json()["error"]["type"] == "admin_key_required"


def test_without_an_admin_key_the_inherited_controls_do_not_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for arguments, key in (((), ""), (("--api-key", KEY), KEY)):
        client = TestClient(build(monkeypatch, *arguments))
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        for path in ("/pause", "/sleep", "/collective_rpc", "/update_weights", "/start_profile"):
            assert client.post(path, headers=headers).status_code == 404


def test_an_admin_key_alone_guards_what_changes_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = TestClient(build(monkeypatch, admin=(ADMIN,)))
    assert client.get("/version").status_code == 200
    for path in ("/v1/adapters", "/v1/load_lora_adapter", "/pause"):
        assert client.post(path).status_code == 401
    assert client.delete("/v1/adapters/a").status_code == 401


def test_both_keys_pass_where_asking_is_enough(app: Any) -> None:
    """The guard lets them through; without an engine, the routes behind it then fail."""
    client = TestClient(app, raise_server_exceptions=False)
    for key, path in itertools.product((KEY, ADMIN), ("/version", "/openapi.json")):
        answer = client.get(path, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200


def test_a_key_in_the_environment_guards_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    client = TestClient(build(monkeypatch, admin=(ADMIN,)))
    assert client.get("/version").status_code == 401
    for key in (KEY, ADMIN):
        answer = client.get("/version", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200


def test_the_routes_are_documented(app: Any) -> None:
    schema = app.openapi()
    for method, path, model in (
        ("get", "/v1/adapters", "AdapterList"),
        ("post", "/v1/adapters", "LoadedInfo"),
        ("get", "/v1/adapters/{name}", "AdapterInfo"),
        ("delete", "/v1/adapters/{name}", "AdapterInfo"),
        ("post", "/v1/adapters/{name}/pin", "AdapterInfo"),
    ):
        operation = schema["paths"][path][method]
        assert operation["description"]
        content = operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert content["$ref"].endswith(model)


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/health", Kind.OPEN),
        ("POST", "/health", Kind.ADMIN),
        ("GET", "/health/", Kind.ADMIN),
        ("GET", "//health", Kind.ADMIN),
        ("GET", "/v1/adapters", Kind.ASK),
        ("DELETE", "/v1/adapters/a/b", Kind.ADMIN),
        ("POST", "/v1/adaptersx", Kind.ASK),
        ("POST", "/tokenize", Kind.ASK),
        ("GET", "/is_sleeping", Kind.ADMIN),
        ("GET", "/whatever/comes/next", Kind.ADMIN),
    ],
)
def test_what_is_not_known_needs_the_admin_key(method: str, path: str, kind: Kind) -> None:
    assert kind_of(method, path) is kind
