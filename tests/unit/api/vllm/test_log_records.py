"""What a log record says of the request that it is made for."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.world import World

from molehill.api.vllm.log_records import name_requests
from molehill.api.vllm.request_scope import RequestScope, request_scope

FIELDS = ("request_id", "adapter", "generation", "trace_id")


@pytest.fixture
def factory() -> Iterator[None]:
    before = logging.getLogRecordFactory()
    name_requests()
    yield
    logging.setLogRecordFactory(before)


def record() -> dict[str, Any]:
    """Of the fields, those that a record made now has."""
    made = logging.getLogRecordFactory()("name", logging.INFO, "path", 1, "text", (), None)
    return {field: made.__dict__[field] for field in FIELDS if field in made.__dict__}


@pytest.mark.usefixtures("factory")
def test_a_request_is_named_as_far_as_it_is_known(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        assert record() == {}
        headers = {"traceparent": f"00-{'4b' * 16}-{'00f0' * 4}-01"}
        request = RequestScope(trace_headers=headers)
        token = request_scope.set(request)
        assert record() == {"trace_id": "4b" * 16}
        outputs = w.engine.generate("p", None, "of-engine", lora_request=w.served["a"])
        known = {"adapter": "a", "generation": w.registry.get("a").digest}
        assert record() == {"request_id": "of-engine", "trace_id": "4b" * 16, **known}
        await outputs.aclose()
        request.end()
        request_scope.reset(token)
        assert record() == {}

    asyncio.run(scenario(World(tmp_path)))


@pytest.mark.usefixtures("factory")
@pytest.mark.parametrize("parent", ["", "nonsense", "a-b-c"])
def test_headers_that_are_no_trace_give_none(parent: str) -> None:
    request = RequestScope(request_id="of-client", trace_headers={"traceparent": parent})
    token = request_scope.set(request)
    assert record() == {"request_id": "of-client"}
    request_scope.reset(token)


@pytest.mark.usefixtures("factory")
def test_a_second_call_changes_nothing() -> None:
    before = logging.getLogRecordFactory()
    name_requests()
    assert logging.getLogRecordFactory() is before
