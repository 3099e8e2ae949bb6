"""What it comes to that a route of vLLM's looks its request's model up: the request is admitted to
the name's generation, or to the mix that it asks for."""

from typing import Any

from vllm.exceptions import VLLMValidationError

from molehill.api.adapters.generation import Generation
from molehill.api.adapters.request_admission import RequestAdmission
from molehill.api.vllm.request_scope import request_scope


def mix_for(model: object) -> Any:
    """What the request that is being answered runs on in the place of its model; None for that
    itself."""
    request = request_scope.get()
    if request is None or request.mixed is None or model not in request.mixed.models:
        return None
    return request.mixed.lora_request


def check_model(model: str) -> None:
    """Raises VLLMValidationError, as vLLM's routes understand it, where a request names another
    adapter than those of its mix."""
    request = request_scope.get()
    if request is not None and request.mixed is not None and model not in request.mixed.models:
        raise VLLMValidationError(
            f"model: found {model!a} beside a mix, expected the base model or an adapter of the "
            "mix",
            parameter="model",
        )


def admit(registry: RequestAdmission, lora_request: Any) -> Generation | None:
    """A route has looked its request's model up. The generation that the answer runs on; outside of
    a request the name's, if there is one."""
    request = request_scope.get()
    if request is None:
        return registry.get(lora_request.lora_name)
    lease = request.lease(registry, lora_request)
    lease.release()
    return lease.generation
