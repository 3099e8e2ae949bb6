"""The order of events in the registry: races that a real engine cannot be made to run."""

import asyncio
import errno
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.world import Play, World, adapter, let_tasks_run

from molehill.api.adapters.errors import (
    AlreadyLoadedError,
    BadNameError,
    BusyError,
    EngineRefusedError,
    GenerationMismatchError,
    NotLoadedError,
    OutOfMemoryError,
    SourceChangedError,
    StoreError,
    TooManyAdaptersError,
)
from molehill.api.adapters.source import Source, fingerprint
from molehill.engine.adapter.errors import AdapterNotFoundError, CorruptFileError
from molehill.engine.adapter.layout import Layout
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native


def test_the_name_serves_only_after_the_engine_has_loaded(play: Play) -> None:
    async def scenario(w: World) -> None:
        w.engine.proceed.clear()
        loading = asyncio.create_task(w.load("a", 1))
        while not w.engine.calls:
            await asyncio.sleep(0.001)
        assert w.served == {}
        # The load holds it, and is no request.
        (generation,) = w.registry.alive()
        assert (len(generation.status.holds), generation.status.in_flight) == (1, 0)
        w.engine.proceed.set()
        assert (await loading).status == "loaded"
        assert w.served["a"].lora_int_id == 1
        assert w.served["a"].lora_path == str(w.store.root / adapter(1).digest)
        assert not w.served["a"].load_inplace

    play(scenario)


def test_replacing_swaps_before_it_frees(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        assert (await w.load("a", 2, replace=True)).status == "replaced"
        assert w.engine.calls == [("install", 1), ("install", 2), ("uninstall", 1)]
        assert w.served["a"].lora_int_id == 2
        assert w.in_store() == [adapter(2).digest]

    play(scenario)


def test_ids_are_never_used_again(play: Play) -> None:
    async def scenario(w: World) -> None:
        for _ in range(3):
            await w.load("a", 1)
            await w.registry.unload("a")
        assert [lora_id for call, lora_id in w.engine.calls if call == "install"] == [1, 2, 3]

    play(scenario)


def test_two_loads_of_one_name_are_one_after_the_other(play: Play) -> None:
    async def scenario(w: World) -> None:
        results = await asyncio.gather(
            w.load("a", 1),
            w.load("a", 1),
            w.load("a", 2),
            return_exceptions=True,
        )
        assert [getattr(result, "status", None) for result in results[:2]] == [
            "loaded",
            "unchanged",
        ]
        assert isinstance(results[2], AlreadyLoadedError)
        assert w.engine.calls == [("install", 1)]
        assert w.in_store() == [adapter(1).digest]

    play(scenario)


def test_a_load_and_an_unload_at_once_end_in_their_order(play: Play) -> None:
    async def scenario(w: World) -> None:
        await asyncio.gather(w.load("a", 1), w.registry.unload("a"))
        assert (w.served, w.engine.loaded, w.in_store()) == ({}, {}, [])

    play(scenario)


def test_base_and_served_adapters_never_wait_for_a_load(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("served", 1)
        w.engine.proceed.clear()
        w.engine.more.set()
        slow = asyncio.create_task(w.load("slow", 2))
        while len(w.engine.calls) < 2:
            await asyncio.sleep(0.001)
        assert [output async for output in w.generate("served")] == ["first", "last"]
        assert [output async for output in w.engine.generate("p", None, "id")] == ["first", "last"]
        assert not slow.done()
        w.engine.proceed.set()
        await slow

    play(scenario)


def test_an_engine_that_refuses_leaves_nothing_behind(play: Play) -> None:
    async def scenario(w: World) -> None:
        path = w.store.root / adapter(1).digest
        w.engine.refusal = f"{path}: no room"
        with pytest.raises(EngineRefusedError, match=r"^label-1: no room$"):
            await w.load("a", 1)
        assert (w.served, w.registry.alive(), w.in_store()) == ({}, [], [])
        assert w.engine.calls == [("install", 1), ("uninstall", 1)]
        w.engine.refusal = ""
        assert (await w.load("a", 1)).status == "loaded"

    play(scenario)


def test_a_refused_replacement_keeps_the_old_generation(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        w.engine.refusal = "no room"
        with pytest.raises(EngineRefusedError):
            await w.load("a", 2, replace=True)
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
        with pytest.raises(StoreError, match="No space left"):
            await w.load("a", 1)
        assert (w.engine.calls, w.in_store()) == ([], [])

    play(scenario)


class Unlucky(World):
    """Something happens while an adapter is read."""

    def read(
        self,
        path: Path,
        lora_b_layout: Layout | None = None,
        base_is_residual: bool = False,
        non_granular_after: int | None = None,
    ) -> Adapter:
        if path.name == "exhausting":
            torch.empty(1 << 60)
        result = super().read(path / "molehill" if path.name == "touched" else path, lora_b_layout)
        if path.name == "touched":
            (path / "more").touch()
        return result


class Unlinked(World):
    """A file goes between two reads of it."""

    def read(
        self,
        path: Path,
        lora_b_layout: Layout | None = None,
        base_is_residual: bool = False,
        non_granular_after: int | None = None,
    ) -> Adapter:
        (path / native.WEIGHTS).unlink()
        (path / native.WEIGHTS).stat()
        raise AssertionError


def test_a_file_that_goes_while_it_is_read_is_a_change(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        path = w.folder / "source"
        native.write(adapter(1), path)
        source = Source(path, "label", fingerprint(path), shared=True)
        with pytest.raises(SourceChangedError, match=r"^label: "):
            await w.load("a", source)

    asyncio.run(asyncio.wait_for(scenario(Unlinked(tmp_path)), 20))


def test_files_that_change_while_they_are_read_are_not_served(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        path = w.folder / "touched"
        native.write(adapter(1), path / "molehill")
        source = Source(path, "label", fingerprint(path), shared=True)
        with pytest.raises(SourceChangedError, match=r"^label: "):
            await w.load("a", source)
        assert (w.served, w.engine.calls, w.in_store()) == ({}, [], [])
        # Nobody else writes to what was fetched.
        assert (await w.load("a", replace(source, shared=False))).status == "loaded"

    asyncio.run(asyncio.wait_for(scenario(Unlucky(tmp_path)), 20))


def test_an_adapter_that_there_is_no_memory_to_read_is_refused(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        with pytest.raises(OutOfMemoryError, match=r"^label: "):
            await w.load("a", Source(w.folder / "exhausting", "label"))
        assert (w.served, w.in_store()) == ({}, [])
        assert (await w.load("a", 1)).status == "loaded"

    asyncio.run(asyncio.wait_for(scenario(Unlucky(tmp_path)), 20))


class Exhausted(World):
    """There is no memory where an adapter is read, as the system says it."""

    def read(
        self,
        path: Path,
        lora_b_layout: Layout | None = None,
        base_is_residual: bool = False,
        non_granular_after: int | None = None,
    ) -> Adapter:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_a_system_without_memory_is_not_a_damaged_adapter(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        with pytest.raises(OutOfMemoryError, match=r"^label: "):
            await w.load("a", Source(w.folder / "adapter", "label"))

    asyncio.run(asyncio.wait_for(scenario(Exhausted(tmp_path)), 20))


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "no memory")], ids=repr)
def test_an_adapter_that_there_is_no_memory_to_fetch_is_refused(
    play: Play, error: Exception
) -> None:
    @contextmanager
    def fetch() -> Iterator[Source]:
        raise error
        yield

    async def scenario(w: World) -> None:
        with pytest.raises(OutOfMemoryError, match=r"^label: "):
            await w.registry.load("a", "label", fetch())

    play(scenario)


def test_errors_name_the_label_and_not_the_servers_path(play: Play) -> None:
    async def scenario(w: World) -> None:
        with pytest.raises(AdapterNotFoundError) as refusal:
            await w.load("a", Source(w.folder / "missing", "label"))
        assert refusal.value.where == "label"

    play(scenario)


def test_unreadable_files_are_a_typed_error(play: Play) -> None:
    async def scenario(w: World) -> None:
        (w.folder / "folder").mkdir()
        with pytest.raises(CorruptFileError, match=r"^label: found Is a directory"):
            await w.load("a", Source(w.folder / "folder", "label"))

    play(scenario)


def test_a_caller_that_goes_away_does_not_stop_a_load_halfway(play: Play) -> None:
    async def scenario(w: World) -> None:
        w.engine.proceed.clear()
        loading = asyncio.create_task(w.load("a", 1))
        while not w.engine.calls:
            await asyncio.sleep(0.001)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        w.engine.proceed.set()
        await let_tasks_run()
        assert w.served["a"].lora_int_id == 1

    play(scenario)


@pytest.mark.slow
def test_names_that_were_only_asked_for_take_no_memory(play: Play) -> None:
    async def scenario(w: World) -> None:
        for number in range(100):
            with pytest.raises(NotLoadedError):
                await w.registry.unload(f"name-{number}")
        gc.collect()
        assert len(w.registry.names._locks) == 0

    play(scenario)


def test_a_base_models_name_is_refused_before_anything_is_read(play: Play) -> None:
    async def scenario(w: World) -> None:
        with pytest.raises(BadNameError):
            await w.load("base", Source(w.folder / "missing", "label"))

    play(scenario)


def test_a_swap_needs_the_generation_that_the_deployer_saw(play: Play) -> None:
    async def scenario(w: World) -> None:
        first, second = adapter(1).digest, adapter(2).digest
        with pytest.raises(
            GenerationMismatchError, match=f"found generation none, expected {first}"
        ):
            await w.load("a", 1, expected=first)
        assert (await w.load("a", 1, expected=None)).status == "loaded"
        with pytest.raises(
            GenerationMismatchError, match=f"found generation {first}, expected none"
        ):
            await w.load("a", 2, expected=None)
        with pytest.raises(GenerationMismatchError):
            await w.load("a", 2, expected=second, replace=True)
        assert (await w.load("a", 2, expected=first, replace=True)).status == "replaced"
        with pytest.raises(GenerationMismatchError):
            await w.registry.unload("a", first)
        await w.registry.unload("a", second)
        assert w.in_store() == []

    play(scenario)


def test_of_two_deployers_that_saw_the_same_generation_one_wins(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        swaps = [w.load("a", n, expected=adapter(1).digest, replace=True) for n in (2, 3)]
        results = await asyncio.gather(*swaps, return_exceptions=True)
        assert results[0].status == "replaced"
        assert isinstance(results[1], GenerationMismatchError)

    play(scenario)


def test_loads_over_the_limit_are_told_to_come_back(play: Play) -> None:
    async def scenario(w: World) -> None:
        w.engine.proceed.clear()
        loads = [asyncio.create_task(w.load(f"a{n}", n)) for n in range(4)]
        await let_tasks_run()
        assert {loading.name for loading in w.registry.loading()} == {"a0", "a1", "a2", "a3"}
        with pytest.raises(BusyError) as refusal:
            await w.load("b", 5)
        assert refusal.value.retry_after == 1
        w.engine.proceed.set()
        await asyncio.gather(*loads)
        assert w.registry.loading() == []
        assert (await w.load("b", 5)).status == "loaded"

    play(scenario)


def test_more_names_than_allowed_are_refused_before_anything_is_read(play: Play) -> None:
    async def scenario(w: World) -> None:
        for n in range(5):
            await w.load(f"a{n}", n)
        with pytest.raises(TooManyAdaptersError):
            await w.load("b", Source(w.folder / "missing", "label"))
        assert (await w.load("a0", 9, replace=True)).status == "replaced"
        await w.registry.unload("a1")
        assert (await w.load("b", 1)).status == "loaded"

    play(scenario)


@pytest.mark.slow
def test_hundreds_of_cycles_leave_nothing_behind(play: Play) -> None:
    async def scenario(w: World) -> None:
        for n in range(300):
            await w.load("a", n % 2)
            await w.registry.unload("a")
        assert (w.registry.alive(), w.in_store(), w.engine.loaded) == ([], [], {})

    play(scenario)
