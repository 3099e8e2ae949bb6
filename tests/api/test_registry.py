"""The order of events in the registry: races that a real engine cannot be made to run."""

import asyncio
import gc
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMNotFoundError
from vllm.lora.request import LoRARequest

from molehill.api.errors import (
    AlreadyLoadedError,
    BadNameError,
    EngineRefusedError,
    NotLoadedError,
)
from molehill.api.inflight import count_requests
from molehill.api.paths import Source
from molehill.api.registry import AdapterRegistry
from molehill.api.store import AdapterStore
from molehill.engine.adapter import Adapter
from molehill.engine.errors import AdapterNotFoundError, CorruptFileError
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Constant


def adapter(seed: int) -> Adapter:
    pair = Experts(torch.full((1, 4), float(seed)), torch.ones(4, 1), (1,))
    return Adapter("lora", {"layers.0.self_attn.q_proj": LinearMixture(pair, Constant((1.0,)))})


class FakeEngine:
    """Remembers what vLLM's engine client was asked for; answers can be held back or refused."""

    def __init__(self) -> None:
        self.loaded: dict[int, str] = {}
        self.calls: list[tuple[str, int]] = []
        self.refusal: Exception | None = None
        self.proceed = asyncio.Event()
        self.proceed.set()
        self.more = asyncio.Event()
        self.served: list[int] = []

    async def add_lora(self, lora_request: Any) -> bool:
        self.calls.append(("add", lora_request.lora_int_id))
        assert (Path(lora_request.lora_path) / "molehill.json").exists()
        await self.proceed.wait()
        if self.refusal is not None:
            raise self.refusal
        self.loaded[lora_request.lora_int_id] = lora_request.lora_name
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        self.calls.append(("remove", lora_id))
        return self.loaded.pop(lora_id, None) is not None

    async def generate(
        self, prompt: str, params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncGenerator[str, None]:
        self.served.append(lora_request.lora_int_id if lora_request else 0)
        yield "first"
        await self.more.wait()
        assert lora_request is None or lora_request.lora_int_id in self.loaded
        yield "last"

    encode = generate


class World:
    """A registry on a fake engine, whose adapters are files that hold a number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = FakeEngine()
        self.store = AdapterStore(folder / "store")
        self.served: dict[str, LoRARequest] = {}
        self.registry = AdapterRegistry(
            self.engine, self.read, self.store, self.served, base_models={"base"}
        )
        count_requests(self.engine, self.registry)

    def read(self, path: Path) -> Adapter:
        if not path.exists():
            raise AdapterNotFoundError(path, "nothing", "a file")
        return adapter(int(path.read_text()))

    def source(self, seed: int) -> Source:
        path = self.folder / f"adapter-{seed}"
        path.write_text(str(seed))
        return Source(path, f"label-{seed}")

    def in_store(self) -> list[str]:
        return sorted(path.name for path in self.store.root.iterdir())

    def generate(self, name: str) -> AsyncGenerator[str, None]:
        return self.engine.generate("p", None, "id", lora_request=self.served[name])


Scenario = Callable[[World], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Scenario], None]:
    """Runs a scenario; afterwards no task may be left that waits."""

    async def run(scenario: Scenario) -> None:
        await asyncio.wait_for(scenario(World(tmp_path)), 20)

    return lambda scenario: asyncio.run(run(scenario))


Play = Callable[[Scenario], None]


async def settle() -> None:
    """Lets all that can run, run."""
    for _ in range(50):
        await asyncio.sleep(0.001)


def test_the_name_serves_only_after_the_engine_has_loaded(play: Play) -> None:
    async def scenario(w: World) -> None:
        w.engine.proceed.clear()
        loading = asyncio.create_task(w.registry.load("a", w.source(1)))
        while not w.engine.calls:
            await asyncio.sleep(0.001)
        assert w.served == {}
        w.engine.proceed.set()
        assert (await loading).status == "loaded"
        assert w.served["a"].lora_int_id == 1
        assert w.served["a"].lora_path == str(w.store.root / adapter(1).digest)
        assert not w.served["a"].load_inplace

    play(scenario)


def test_replacing_swaps_before_it_frees(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.registry.load("a", w.source(1))
        assert (await w.registry.load("a", w.source(2), replace=True)).status == "replaced"
        assert w.engine.calls == [("add", 1), ("add", 2), ("remove", 1)]
        assert w.served["a"].lora_int_id == 2
        assert w.in_store() == [adapter(2).digest]

    play(scenario)


def test_ids_are_never_used_again(play: Play) -> None:
    async def scenario(w: World) -> None:
        for _ in range(3):
            await w.registry.load("a", w.source(1))
            await w.registry.unload("a")
        assert [lora_id for call, lora_id in w.engine.calls if call == "add"] == [1, 2, 3]

    play(scenario)


def test_two_loads_of_one_name_are_one_after_the_other(play: Play) -> None:
    async def scenario(w: World) -> None:
        results = await asyncio.gather(
            w.registry.load("a", w.source(1)),
            w.registry.load("a", w.source(1)),
            w.registry.load("a", w.source(2)),
            return_exceptions=True,
        )
        assert [getattr(result, "status", None) for result in results[:2]] == [
            "loaded",
            "unchanged",
        ]
        assert isinstance(results[2], AlreadyLoadedError)
        assert w.engine.calls == [("add", 1)]
        assert w.in_store() == [adapter(1).digest]

    play(scenario)


def test_a_load_and_an_unload_at_once_end_in_their_order(play: Play) -> None:
    async def scenario(w: World) -> None:
        await asyncio.gather(w.registry.load("a", w.source(1)), w.registry.unload("a"))
        assert (w.served, w.engine.loaded, w.in_store()) == ({}, {}, [])

    play(scenario)


def test_loads_of_other_names_do_not_wait_for_a_slow_engine(play: Play) -> None:
    async def scenario(w: World) -> None:
        w.engine.proceed.clear()
        slow = asyncio.create_task(w.registry.load("a", w.source(1)))
        while not w.engine.calls:
            await asyncio.sleep(0.001)
        other = asyncio.create_task(w.registry.load("b", w.source(2)))
        while len(w.engine.calls) < 2:
            await asyncio.sleep(0.001)
        w.engine.proceed.set()
        await asyncio.gather(slow, other)
        assert set(w.served) == {"a", "b"}

    play(scenario)


def test_an_engine_that_refuses_leaves_nothing_behind(play: Play) -> None:
    async def scenario(w: World) -> None:
        path = w.store.root / adapter(1).digest
        w.engine.refusal = RuntimeError(f"{path}: no room")
        with pytest.raises(EngineRefusedError, match=r"^label-1: no room$"):
            await w.registry.load("a", w.source(1))
        assert (w.served, w.registry.in_engine(), w.in_store()) == ({}, [], [])
        assert w.engine.calls == [("add", 1), ("remove", 1)]
        w.engine.refusal = None
        assert (await w.registry.load("a", w.source(1))).status == "loaded"

    play(scenario)


def test_a_refused_replacement_keeps_the_old_generation(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.registry.load("a", w.source(1))
        w.engine.refusal = RuntimeError("no room")
        with pytest.raises(EngineRefusedError):
            await w.registry.load("a", w.source(2), replace=True)
        assert w.served["a"].lora_int_id == 1
        assert w.engine.loaded == {1: "a"}
        assert w.in_store() == [adapter(1).digest]

    play(scenario)


def test_a_store_that_cannot_be_written_is_an_error_without_traces(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("molehill.engine.formats.native.write", full)

    async def scenario(w: World) -> None:
        with pytest.raises(EngineRefusedError, match="No space left"):
            await w.registry.load("a", w.source(1))
        assert (w.engine.calls, w.in_store()) == ([], [])

    play(scenario)


def test_errors_name_the_label_and_not_the_servers_path(play: Play) -> None:
    async def scenario(w: World) -> None:
        with pytest.raises(AdapterNotFoundError) as refusal:
            await w.registry.load("a", Source(w.folder / "missing", "label"))
        assert refusal.value.where == "label"

    play(scenario)


def test_unreadable_files_are_a_typed_error(play: Play) -> None:
    async def scenario(w: World) -> None:
        (w.folder / "folder").mkdir()
        with pytest.raises(CorruptFileError, match=r"^label: found Is a directory"):
            await w.registry.load("a", Source(w.folder / "folder", "label"))

    play(scenario)


def test_a_caller_that_goes_away_does_not_stop_a_load_halfway(play: Play) -> None:
    async def scenario(w: World) -> None:
        w.engine.proceed.clear()
        loading = asyncio.create_task(w.registry.load("a", w.source(1)))
        while not w.engine.calls:
            await asyncio.sleep(0.001)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        w.engine.proceed.set()
        await settle()
        assert w.served["a"].lora_int_id == 1

    play(scenario)


def test_an_unloaded_generation_is_freed_after_its_last_request(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.registry.load("a", w.source(1))
        streams = [w.generate("a"), w.generate("a")]
        for stream in streams:
            assert await anext(stream) == "first"
        generation = await w.registry.unload("a")
        assert generation.in_flight == 2
        assert w.served == {}
        await streams[0].aclose()
        await settle()
        assert w.engine.loaded == {1: "a"}
        w.engine.more.set()
        assert [output async for output in streams[1]] == ["last"]
        await settle()
        assert (w.engine.loaded, w.registry.in_engine(), w.in_store()) == ({}, [], [])

    play(scenario)


def test_a_request_resolved_before_an_unload_is_not_found(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.registry.load("a", w.source(1))
        resolved = w.served["a"]
        started = w.engine.generate("p", None, "id", lora_request=resolved)
        await w.registry.unload("a")
        with pytest.raises(VLLMNotFoundError):
            w.engine.generate("p", None, "id", lora_request=resolved)
        with pytest.raises(VLLMNotFoundError):
            await anext(started)
        assert w.engine.served == []

    play(scenario)


def test_a_request_resolved_before_a_replacement_runs_on_the_new_weights(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.registry.load("a", w.source(1))
        resolved = w.served["a"]
        await w.registry.load("a", w.source(2), replace=True)
        stream = w.engine.generate("p", None, "id", lora_request=resolved)
        assert await anext(stream) == "first"
        assert w.engine.served == [2]
        await stream.aclose()

    play(scenario)


def test_a_name_loaded_again_is_another_generation(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.registry.load("a", w.source(1))
        old = w.generate("a")
        await anext(old)
        await w.registry.unload("a")
        await w.registry.load("a", w.source(1))
        assert w.served["a"].lora_int_id == 2
        assert w.engine.loaded == {1: "a", 2: "a"}
        w.engine.more.set()
        assert [output async for output in old] == ["last"]
        await settle()
        assert w.engine.loaded == {2: "a"}
        assert w.in_store() == [adapter(1).digest]

    play(scenario)


def test_base_requests_are_not_touched(play: Play) -> None:
    async def scenario(w: World) -> None:
        w.engine.more.set()
        outputs = [output async for output in w.engine.generate("p", None, "id")]
        assert outputs == ["first", "last"]
        assert w.engine.served == [0]

    play(scenario)


def test_pooling_requests_are_counted_too(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.registry.load("a", w.source(1))
        stream = w.engine.encode("p", None, "id", lora_request=w.served["a"])
        await anext(stream)
        assert next(iter(w.registry)).in_flight == 1
        await stream.aclose()
        assert next(iter(w.registry)).in_flight == 0

    play(scenario)


def test_names_that_were_only_asked_for_take_no_memory(play: Play) -> None:
    async def scenario(w: World) -> None:
        for number in range(100):
            with pytest.raises(NotLoadedError):
                await w.registry.unload(f"name-{number}")
        gc.collect()
        assert len(w.registry._locks) == 0

    play(scenario)


def test_a_base_models_name_is_refused_before_anything_is_read(play: Play) -> None:
    async def scenario(w: World) -> None:
        with pytest.raises(BadNameError):
            await w.registry.load("base", Source(w.folder / "missing", "label"))

    play(scenario)
