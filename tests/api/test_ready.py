"""When a server says that it may be sent requests."""

from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from vllm.v1.engine.exceptions import EngineDeadError

from molehill.api.http import vllm_routes


class Engine:
    """The part of vLLM's engine client that `/health` asks."""

    def __init__(self, dead: bool) -> None:
        self.dead = dead

    async def check_health(self) -> None:
        if self.dead:
            raise EngineDeadError


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
