"""Which engines of several are asked for a request's routing."""

import asyncio
from types import SimpleNamespace
from typing import Any

from molehill.api.vllm.engine_watch import EngineWatch
from molehill.api.vllm.request_engines import Placements
from molehill.engine.vllm.routing_capture import ASKED


class Client:
    """As vLLM's of three engines: gives requests to the engine that they name."""

    core_engines = (b"0", b"1", b"2")

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    def get_core_engine_for_request(self, request: Any) -> bytes:
        return self.core_engines[request.data_parallel_rank]

    async def _call_utility_async(self, _: str, method: str, *args: Any, engine: bytes) -> Any:
        self.asked.append(engine)
        return [(method, engine)]


def request(rank: int, arguments: dict[str, Any] | None) -> Any:
    parameters = SimpleNamespace(extra_args=arguments)
    return SimpleNamespace(data_parallel_rank=rank, sampling_params=parameters)


def test_the_engines_that_samples_were_given_to_are_asked() -> None:
    async def scenario() -> None:
        client = Client()
        engine = SimpleNamespace(engine_core=client, errored=False)
        placements = Placements(engine, EngineWatch(engine, 3))
        one, other = placements.of("one"), placements.of("other")
        # Nobody knows yet.
        assert len(await one.collective_rpc("ask")) == 3
        for rank, key in ((2, "one"), (0, "other"), (1, "other")):
            given = client.get_core_engine_for_request(request(rank, {ASKED: {"key": key}}))
            assert given == client.core_engines[rank]
        client.asked.clear()
        assert await one.collective_rpc("ask") == [("ask", b"2")]
        assert await other.collective_rpc("ask") == [("ask", b"0"), ("ask", b"1")]
        assert client.asked == [b"2", b"0", b"1"]

    asyncio.run(scenario())


def test_what_others_say_of_themselves_is_nobodys() -> None:
    async def scenario() -> None:
        client = Client()
        engine = SimpleNamespace(engine_core=client, errored=False)
        placements = Placements(engine, EngineWatch(engine, 3))
        asking = placements.of("one")
        for arguments in (None, {}, {ASKED: "1"}, {ASKED: {"key": ["one"]}}, {ASKED: {"key": "x"}}):
            assert client.get_core_engine_for_request(request(1, arguments)) == b"1"
        client.get_core_engine_for_request(
            SimpleNamespace(data_parallel_rank=1, sampling_params=None)
        )
        assert asking.ranks == set()

    asyncio.run(scenario())


def test_a_client_of_one_engine_is_left_alone() -> None:
    async def scenario() -> None:
        async def collective_rpc(method: str, args: tuple[Any, ...]) -> list[Any]:
            return [method, args]

        engine = SimpleNamespace(
            engine_core=SimpleNamespace(), errored=False, collective_rpc=collective_rpc
        )
        asking = Placements(engine, EngineWatch(engine)).of("one")
        assert await asking.collective_rpc("ask", args=(1,)) == ["ask", (1,)]

    asyncio.run(scenario())
