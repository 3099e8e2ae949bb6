"""When a server says that it may be sent requests."""

from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from support.health import Engine

from molehill.api.http import vllm_routes


@pytest.mark.parametrize(
    ("restored", "dead", "status", "retry"),
    [
        (True, False, 200, None),
        (False, False, 503, "1"),
        (True, True, 503, None),
        (False, True, 503, None),
    ],
)
def test_ready_is_what_is_restored_and_has_an_engine(
    restored: bool, dead: bool, status: int, retry: str | None
) -> None:
    app = FastAPI()
    app.include_router(vllm_routes.router)
    app.state.engine_client = Engine(dead)
    app.state.molehill = SimpleNamespace(restart=SimpleNamespace(ready=restored))
    answer = TestClient(app).get("/health/ready")
    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, retry)
