"""vLLM's requests for adapters: how one is made, and where vLLM looks them up."""

from typing import Any

from vllm.lora.request import LoRARequest

from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.followers.followed_adapters import FollowedAdapters
from molehill.api.vllm import model_lookup
from molehill.api.vllm.request_scope import request_scope


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

    def peek(self, name: str | None) -> Any:
        """What a request that names this model runs on, without admitting it; None where that is
        the base. A mix has none of what its parts have, whichever of them the request names."""
        return model_lookup.mix_for(name) or super().get(name or "")

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


class FollowedRequests(dict[str, Any]):
    """ServedRequests of a process that has no registry: each request finds what the owner has
    admitted it to, and nothing else."""

    def __init__(self, followed: FollowedAdapters) -> None:
        super().__init__()
        self._followed = followed

    def peek(self, name: str | None) -> Any:
        """See ServedRequests."""
        return self._asked(name)

    def __contains__(self, name: object) -> bool:
        return self._asked(name) is not None

    def __getitem__(self, name: str) -> Any:
        request = self._asked(name)
        if request is None:
            raise KeyError(name)
        model_lookup.admit(self._followed, request)
        return request

    def _asked(self, name: object) -> Any:
        request = request_scope.get()
        return None if request is None else self._followed.request_of(name, request.request)
