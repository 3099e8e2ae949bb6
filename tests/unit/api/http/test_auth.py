"""No route of the whole app is open by accident."""

import itertools
import pkgutil
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

import pytest
import vllm.entrypoints
from fastapi import APIRouter
from starlette.routing import Mount
from starlette.testclient import TestClient
from support.api_client import GOLDEN

from molehill.api.http.auth import Kind, kind_of
from molehill.api.vllm import launcher
from molehill.api.vllm.options import Options

KEY, ADMIN = "a-key", "an-admin-key"

# All that answers without a key.
OPEN = {"/health", "/health/ready", "/ping", "/metrics", "/dashboard"}

READS = ("GET", "HEAD")

# Every operation of vLLM's and of ours, on whatever model and with whatever options. A route that
# is not here needs somebody to decide which kind it is.
ASKS = {
    *(f"GET {path}" for path in ("/version", "/load", "/v1/models", "/v1/models/")),
    "GET /v1/models/{name}",
    *(f"GET {path}" for path in ("/v1/routing", "/v1/adapters", "/v1/adapters/{name}")),
    *("GET /v1/adapters/{name}/routing", "GET /v1/responses/{response_id}"),
    *(
        f"{method} {path}"
        for method in READS
        for path in ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
    ),
    *(f"POST {path}" for path in ("/tokenize", "/detokenize", "/invocations", "/pooling")),
    *(f"POST {path}" for path in ("/classify", "/score", "/rerank", "/generative_scoring")),
    *(f"POST /v1/completions{part}" for part in ("", "/render", "/derender")),
    *(f"POST /v1/chat/completions{part}" for part in ("", "/render", "/derender", "/batch")),
    *(f"POST /v1/responses{part}" for part in ("", "/render", "/{response_id}/cancel")),
    *(f"POST /v1/messages{part}" for part in ("", "/render", "/count_tokens")),
    *(f"POST /v1/{part}" for part in ("embeddings", "score", "rerank", "systemone")),
    *(f"POST /v1/audio/{part}" for part in ("transcriptions", "translations")),
    *(f"POST {path}" for path in ("/v2/embed", "/v2/rerank", "/inference/v1/generate")),
    "WEBSOCKET /v1/realtime",
}
ADMINISTERS = {
    *(f"GET {path}" for path in ("/fault_tolerance/status", "/get_world_size", "/is_paused")),
    *(f"GET {path}" for path in ("/is_sleeping", "/kv_event_sources", "/server_info")),
    *(f"GET {path}" for path in ("/weight_info", "/metrics/x")),
    *(f"POST {path}" for path in ("/v1/adapters", "/v1/adapters/{name}/pin")),
    *("DELETE /v1/adapters/{name}", "POST /v1/load_lora_adapter"),
    *("POST /v1/unload_lora_adapter", "POST /inference/v1/abort_requests"),
    *(f"POST /{name}" for name in ("abort_requests", "collective_rpc", "ping", "pause", "resume")),
    *(f"POST /{name}" for name in ("fault_tolerance/apply", "scale_elastic_ep", "sleep")),
    *(f"POST /{name}" for name in ("is_scaling_elastic_ep", "wake_up", "start_profile")),
    *(f"POST /{name}" for name in ("stop_profile", "release_kv_cache_memory")),
    *(f"POST /reset_{name}_cache" for name in ("encoder", "mm", "prefix")),
    *(f"POST /{name}_weight_transfer_engine" for name in ("init", "shutdown")),
    *(f"POST /{name}_weight_update" for name in ("start", "start_draft", "finish")),
    *(f"POST /{name}" for name in ("update_weights", "update_weight_version", "weight_checker")),
}

# What must be guarded is there at all: a walk over an empty app would pass.
INHERITED = {
    *("/invocations", "/tokenize", "/detokenize", "/version", "/load", "/scale_elastic_ep"),
    *("/pause", "/resume", "/sleep", "/wake_up", "/collective_rpc", "/update_weights"),
    *("/reset_prefix_cache", "/server_info", "/abort_requests"),
    *("/v1/completions", "/v1/chat/completions", "/v1/models", "/inference/v1/generate"),
    *("/v1/adapters", "/v1/adapters/{name}", "/v1/adapters/{name}/pin"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/docs", "/openapi.json"),
}


def build(
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str,
    admin: tuple[str, ...] = (),
    trainer_control: bool = False,
) -> Any:
    """vLLM's app with every route that it can have, ours among them; no engine behind it."""
    from vllm.entrypoints.launchers.app import build_app

    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_PLUGINS", launcher.allow_plugin(None))
    args = launcher.parse([str(GOLDEN / "tiny-llama"), *arguments])
    options = Options(admin_keys=admin, trainer_control=trainer_control)
    args = launcher.prepare(args, options)
    args.enable_fault_tolerance = True
    return build_app(args, ("generate", "embed", "classify", "transcription", "realtime"))


def operations(app: Any) -> Iterator[tuple[str, str]]:
    return operations_of(app.routes)


def operations_of(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """(method, path) of every route, websockets as WEBSOCKET."""
    for route in routes:
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


def test_every_operation_that_vllm_can_have_is_of_a_kind_that_somebody_chose(app: Any) -> None:
    """Those of the app, and those that vLLM adds for other models and options."""
    packages = pkgutil.walk_packages(vllm.entrypoints.__path__, "vllm.entrypoints.")
    modules = [import_module(name) for _, name, _ in packages if name.endswith(".api_router")]
    routers = [
        value for module in modules for value in vars(module).values() if type(value) is APIRouter
    ]
    assert len(routers) > 15
    result = {
        *operations(app),
        *(one for router in routers for one in operations_of(router.routes)),
    }
    kinds = {f"{method} {path}": kind_of(method, path) for method, path in result}
    assert {one for one, kind in kinds.items() if kind is Kind.OPEN} == {f"GET {p}" for p in OPEN}
    assert {one for one, kind in kinds.items() if kind is Kind.ASK} == ASKS
    assert {one for one, kind in kinds.items() if kind is Kind.ADMIN} == ADMINISTERS


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
        off = ("/pause", "/sleep", "/collective_rpc", "/update_weights", "/start_profile")
        for path in (*off, "/inference/v1/abort_requests"):
            assert client.post(path, headers=headers).status_code == 404


@pytest.mark.parametrize(
    ("arguments", "admin", "key"),
    [((), (), ""), (("--api-key", KEY), (), KEY), (("--api-key", KEY), (ADMIN,), ADMIN)],
)
def test_trainers_stop_the_engine_with_the_key_that_loads_adapters(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], admin: tuple[str, ...], key: str
) -> None:
    """The guard lets them through; without an engine, the routes behind it then fail."""
    app = build(monkeypatch, *arguments, admin=admin, trainer_control=True)
    client = TestClient(app, raise_server_exceptions=False)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for method, path in (("POST", "/pause"), ("POST", "/resume"), ("GET", "/is_paused")):
        assert client.request(method, path, headers=headers).status_code == 500
        if key:
            assert client.request(method, path).status_code == 401
    refused = 500 if admin else 404
    assert client.post("/sleep", headers=headers).status_code == refused
    assert client.post("/pause/x", headers=headers).status_code == 404
    if admin:
        other = {"Authorization": f"Bearer {KEY}"}
        assert client.post("/pause", headers=other).status_code == 403


def test_a_slash_too_many_leads_to_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(build(monkeypatch), follow_redirects=False)
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/load_lora_adapter"):
        answer = client.post(f"{path}/", json={})
        assert (path, answer.status_code) == (path, 307)
        assert answer.headers["location"].endswith(path)


def test_an_admin_key_alone_guards_what_changes_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = TestClient(build(monkeypatch, admin=(ADMIN,)))
    assert client.get("/version").status_code == 200
    for path in ("/v1/adapters", "/v1/load_lora_adapter", "/pause"):
        assert client.post(path).status_code == 401
    assert client.delete("/v1/adapters/a").status_code == 401


@pytest.mark.slow
def test_both_keys_pass_where_asking_is_enough(app: Any) -> None:
    """The guard lets them through; without an engine, the routes behind it then fail."""
    client = TestClient(app, raise_server_exceptions=False)
    for key, path in itertools.product((KEY, ADMIN), ("/version", "/openapi.json")):
        answer = client.get(path, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v1/no/such/route", 404, "not_found"),
        ("GET", "/v1/adapters/a%0A/routing", 404, "not_found"),
        ("PUT", "/v1/adapters", 405, "method_not_allowed"),
    ],
)
def test_what_no_route_takes_has_an_error_body(
    app: Any, method: str, path: str, status: int, kind: str
) -> None:
    headers = {"Authorization": f"Bearer {ADMIN}"}
    answer = TestClient(app).request(method, path, headers=headers)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == (kind, status)


def test_a_key_in_the_environment_guards_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    client = TestClient(build(monkeypatch, admin=(ADMIN,)))
    assert client.get("/version").status_code == 401
    for key in (KEY, ADMIN):
        answer = client.get("/version", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200


@pytest.mark.slow
def test_the_routes_are_documented(app: Any) -> None:
    schema = app.openapi()
    for method, path, model in (
        ("get", "/v1/adapters", "AdapterList"),
        ("post", "/v1/adapters", "LoadedInfo"),
        ("get", "/v1/adapters/{name}", "AdapterDetails"),
        ("delete", "/v1/adapters/{name}", "AdapterInfo"),
        ("post", "/v1/adapters/{name}/pin", "AdapterInfo"),
    ):
        operation = schema["paths"][path][method]
        assert operation["description"]
        content = operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert content["$ref"].endswith(model)


@pytest.mark.slow
def test_what_our_routes_refuse_is_documented(app: Any) -> None:
    paths = app.openapi()["paths"]
    of_change = {"400", "401", "403", "404", "409", "422"}
    of_load = of_change | {"429", "502", "503", "507"}
    for method, path, statuses in (
        ("get", "/v1/adapters", {"401", "422"}),
        ("post", "/v1/adapters", of_load | {"408", "413"}),
        ("get", "/v1/adapters/{name}", {"401", "404", "422"}),
        ("delete", "/v1/adapters/{name}", of_change),
        ("post", "/v1/adapters/{name}/pin", of_change | {"503"}),
        ("get", "/v1/adapters/{name}/routing", {"401", "404", "422"}),
        ("get", "/v1/routing", {"401", "422"}),
        ("post", "/v1/load_lora_adapter", of_load),
        ("post", "/v1/unload_lora_adapter", of_change),
    ):
        responses = {
            status: answer["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            for status, answer in paths[path][method]["responses"].items()
            if status != "200"
        }
        assert responses == dict.fromkeys(statuses, "ErrorBody"), path


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/health", Kind.OPEN),
        ("POST", "/health", Kind.ADMIN),
        ("GET", "/health/", Kind.ADMIN),
        ("GET", "//health", Kind.ADMIN),
        ("GET", "/v1/adapters", Kind.ASK),
        ("DELETE", "/v1/adapters/a/b", Kind.ADMIN),
        ("POST", "/v1/adaptersx", Kind.ADMIN),
        ("PUT", "/v1/completions/x", Kind.ADMIN),
        ("POST", "/v1/responses/x/y/cancel", Kind.ADMIN),
        ("POST", "/cohere/v2/chat", Kind.ASK),
        ("POST", "/tokenize", Kind.ASK),
        # A route answers these with a redirect to itself.
        ("POST", "/v1/completions/", Kind.ASK),
        ("POST", "/v1/responses/x/cancel/", Kind.ASK),
        ("GET", "/version/", Kind.ASK),
        ("POST", "/v1/completions//", Kind.ADMIN),
        ("POST", "/v1/adapters/", Kind.ADMIN),
        ("POST", "/pause/", Kind.ADMIN),
        ("GET", "/is_sleeping", Kind.ADMIN),
        ("GET", "/whatever/comes/next", Kind.ADMIN),
    ],
)
def test_what_is_not_known_needs_the_admin_key(method: str, path: str, kind: Kind) -> None:
    assert kind_of(method, path) is kind
