"""Log records of what is done for a request name it, its adapter and its trace.

vLLM's JSON formatter (`--logging-config.formatter json`, of its own lines, molehill's and
uvicorn's) writes whatever a record has; its text formatter leaves these fields out.
"""

import logging
from collections.abc import Callable
from typing import Any

from molehill.api.vllm.request_scope import RequestScope, request_scope


class RequestRecords:
    """A factory of log records. factory: the one before it."""

    def __init__(self, factory: Callable[..., logging.LogRecord]) -> None:
        self._factory = factory

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._factory(*args, **kwargs)
        request = request_scope.get()
        if request is not None:
            record.__dict__.update(fields_of(request))
        return record


def fields_of(request: RequestScope) -> dict[str, str]:
    """Those that are known by now; of several adapters the first."""
    fields = {}
    if request.request_id:
        fields["request_id"] = request.request_id
    if request.leases:
        generation = next(iter(request.leases.values())).generation
        fields |= {"adapter": generation.name, "generation": generation.digest}
    # version-trace-span-flags
    parent = (request.trace_headers or {}).get("traceparent", "").split("-")
    if len(parent) == 4:
        fields["trace_id"] = parent[1]
    return fields


def name_requests() -> None:
    """From here on, in this process. A second call does nothing."""
    factory = logging.getLogRecordFactory()
    if not isinstance(factory, RequestRecords):
        logging.setLogRecordFactory(RequestRecords(factory))
