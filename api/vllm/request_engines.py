"""Which engines of several run a request that asks for its routing: those alone know of it."""

from typing import Any
from weakref import WeakValueDictionary

from molehill.api.vllm.engine_watch import EngineWatch
from molehill.engine.vllm.routing_capture import ASKED


class RequestEngines:
    """The workers of the engines that run the samples of one request. Implements `Engine`.

    ranks: of those engines; while there are none, all are asked.
    """

    def __init__(self, workers: EngineWatch) -> None:
        self._workers = workers
        self.ranks: set[int] = set()

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        """One answer per worker; raises as EngineWatch.collective_rpc."""
        return await self._workers.collective_rpc(method, args=args, ranks=self.ranks)


class Placements:
    """Follows to which engine vLLM's client gives each request, where there are several."""

    def __init__(self, engine_client: Any, workers: EngineWatch) -> None:
        self._workers = workers
        self._asking: WeakValueDictionary[str, RequestEngines] = WeakValueDictionary()
        # A client of one engine chooses none.
        if hasattr(engine_client.engine_core, "get_core_engine_for_request"):
            self._follow(engine_client.engine_core)

    def of(self, key: str) -> RequestEngines:
        """Of the request that will ask under `key`."""
        self._asking[key] = asking = RequestEngines(self._workers)
        return asking

    def _follow(self, client: Any) -> None:
        choose = client.get_core_engine_for_request

        def chosen(request: Any) -> Any:
            engine = choose(request)
            asked = (getattr(request.sampling_params, "extra_args", None) or {}).get(ASKED)
            # Of the base anybody may say anything there.
            key = asked.get("key") if isinstance(asked, dict) else None
            asking = self._asking.get(key) if isinstance(key, str) else None
            if asking is not None:
                asking.ranks.add(client.core_engines.index(engine))
            return engine

        client.get_core_engine_for_request = chosen
