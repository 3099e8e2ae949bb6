"""vLLM's requests for adapters: how one is made, and where vLLM looks them up."""

from typing import Any

from vllm.lora.request import LoRARequest

from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.vllm import model_lookup


def make_request(name: str, number: int, path: str) -> LoRARequest:
    """See MakeRequest of the registry. vLLM keys its prefix cache by the name and the path."""
    return LoRARequest(name, number, path)


class ServedRequests(dict[str, Any]):
    """Names to LoRARequests, as vLLM looks them up by a request's model; that admits the request.
    Where the request asks for a mix, its model and the mix's parts are that.

    In chat, vLLM also goes through all values for an adapter *named* like a content part's type
    (`text`, `image`) and runs the base model's requests on it. It finds none here.
    """

    registry: AdapterRegistry | None = None

    def __contains__(self, name: object) -> bool:
        return model_lookup.mix_for(name) is not None or super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        request = model_lookup.mix_for(name) or super().__getitem__(name)
        model_lookup.check_model(name)
        if self.registry is not None:
            model_lookup.admit(self.registry, request)
        return request

    def values(self) -> Any:
        return {}.values()
