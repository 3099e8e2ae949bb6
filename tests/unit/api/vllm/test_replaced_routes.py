"""Routes of the plugin take the place of vLLM's, which vLLM before 0.32 left in front of them."""

from fastapi import FastAPI
from fastapi.testclient import TestClient

from molehill.api.vllm.compat import replace_routes


def app_with(*replacing: tuple[str, str]) -> TestClient:
    """GET and DELETE of /models/{name}, GET of /health, and what `replacing` adds: method, path."""
    app = FastAPI()
    for method, path in (
        ("GET", "/models/{name}"),
        ("DELETE", "/models/{name}"),
        ("GET", "/health"),
    ):
        app.add_api_route(path, lambda: "core", methods=[method])
    app.mount("/metrics", FastAPI())
    core = list(app.router.routes)
    for method, path in replacing:
        app.add_api_route(path, lambda: "molehill", methods=[method])
    replace_routes(app, core)
    return TestClient(app)


def test_one_of_the_same_path_and_method_answers_alone() -> None:
    client = app_with(("GET", "/models/{name}"), ("GET", "/adapters"))
    assert client.get("/models/a").json() == "molehill"
    assert client.get("/adapters").json() == "molehill"
    assert app_with(("GET", "/metrics")).get("/metrics").json() == "molehill"
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths["/models/{name}"]) == {"get", "delete"}


def test_other_methods_and_paths_stay() -> None:
    client = app_with(("GET", "/models/{name}"))
    assert client.delete("/models/a").json() == "core"
    assert client.get("/health").json() == "core"
    assert client.get("/docs").status_code == 200
