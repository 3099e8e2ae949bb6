"""When a server says that it may be sent requests."""

from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from support.health import Engine

from molehill.api.http import vllm_routes


@pytest.mark.parametrize(
    ("restored", "converged", "dead", "status", "retry"),
    [
        (True, None, False, 200, None),
        (True, True, False, 200, None),
        (False, None, False, 503, "1"),
        (False, True, False, 503, "1"),
        (True, False, False, 503, "1"),
        (True, None, True, 503, None),
        (False, None, True, 503, None),
    ],
)
def test_ready_is_what_is_restored_has_converged_and_has_an_engine(
    restored: bool, converged: bool | None, dead: bool, status: int, retry: str | None
) -> None:
    """converged: None of a server that follows no adapters file."""
    app = FastAPI()
    app.include_router(vllm_routes.router)
    app.state.engine_client = Engine(dead)
    file = None if converged is None else SimpleNamespace(ready=converged)
    restore = SimpleNamespace(ready=restored)
    app.state.molehill = SimpleNamespace(restore=restore, adapters_file=file)
    answer = TestClient(app).get("/health/ready")
    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, retry)
