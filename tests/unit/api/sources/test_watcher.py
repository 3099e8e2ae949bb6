"""What a watched root serves, what it leaves alone, and what it tries again."""

import asyncio
import gc
import os
import shutil
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support.watched import Watched
from support.world import adapter, let_tasks_run
from vllm.exceptions import GracefulHTTPError

from molehill.api.adapters.admission import AdmissionLimits
from molehill.api.adapters.errors import NoEffectError
from molehill.api.adapters.source import local
from molehill.api.sources import watcher
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has to let_tasks_run, and nothing waits before it is tried again."""
    monkeypatch.setattr(watcher, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(watcher, "FIRST_PAUSE_SECONDS", 0.0)


def play(w: Watched, scenario: Callable[[Watched], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(scenario(w), 20)

    asyncio.run(run())


@pytest.mark.parametrize("odd", ["loop", "forbidden", "missing root", "bad name"])
def test_one_odd_entry_does_not_stop_the_others(
    tmp_path: Path, odd: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(w: Watched) -> None:
        if odd == "loop":
            (w.other / "x").symlink_to(w.other / "x")
        elif odd == "forbidden":
            (w.other / "lost+found").mkdir(mode=0)
        elif odd == "missing root":
            w.other.rmdir()
        else:
            w.put("bad name", 2)
        w.put("a", 1)
        w.put("b", 3)
        for _ in range(2):
            await w.watcher.poll()
        assert w.serves() == {"a": adapter(1).digest, "b": adapter(3).digest}
        warnings = [record for record in caplog.records if "not watched" in record.message]
        # The superuser may look into every directory.
        assert len(warnings) == (odd != "forbidden" or os.geteuid() != 0)

    play(Watched(tmp_path), scenario)


def test_names_of_files_need_not_be_text(tmp_path: Path) -> None:
    async def scenario(w: Watched) -> None:
        folder = w.put("a", 1)
        Path(os.fsdecode(bytes(folder) + b"/\xff")).touch()
        await w.watcher.poll()
        assert w.serves() == {"a": adapter(1).digest}

    play(Watched(tmp_path), scenario)


def test_a_root_that_comes_back_is_watched_again(tmp_path: Path) -> None:
    async def scenario(w: Watched) -> None:
        w.put("a", 1)
        w.root.rename(w.folder / "away")
        await w.watcher.poll()
        assert w.serves() == {}
        (w.folder / "away").rename(w.root)
        await w.watcher.poll()
        assert w.serves() == {"a": adapter(1).digest}

    play(Watched(tmp_path), scenario)


def test_a_bad_directory_is_read_once_and_forgotten_when_it_goes(tmp_path: Path) -> None:
    async def scenario(w: Watched) -> None:
        (w.put("a", 1) / native.WEIGHTS).write_bytes(b"half")
        for _ in range(3):
            await w.watcher.poll()
        assert (w.failures(), w.read_count) == ({"a": "corrupt_file"}, 1)
        w.put("a", 1)
        await w.watcher.poll()
        assert (w.failures(), w.serves()) == ({}, {"a": adapter(1).digest})
        (w.put("b", 2) / native.WEIGHTS).write_bytes(b"half")
        await w.watcher.poll()
        assert w.failures() == {"b": "corrupt_file"}
        shutil.rmtree(w.root / "b")
        shutil.rmtree(w.root / "a")
        await w.watcher.poll()
        # What serves goes on.
        assert (w.failures(), w.serves()) == ({}, {"a": adapter(1).digest})

    play(Watched(tmp_path), scenario)


def test_what_there_is_no_room_for_is_tried_again(tmp_path: Path) -> None:
    async def scenario(w: Watched) -> None:
        w.put("a", 1)
        w.engine.refusal = "no room"
        await w.watcher.poll()
        assert (w.failures(), w.serves()) == ({"a": "engine_refused"}, {})
        w.engine.refusal = ""
        await w.watcher.poll()
        assert (w.failures(), w.serves()) == ({}, {"a": adapter(1).digest})

    play(Watched(tmp_path), scenario)


def test_names_over_the_limit_are_served_when_one_is_free(tmp_path: Path) -> None:
    async def scenario(w: Watched) -> None:
        await w.load("client", 9)
        w.put("a", 1)
        await w.watcher.poll()
        assert w.failures() == {"a": "too_many_adapters"}
        await w.registry.unload("client")
        await w.watcher.poll()
        assert (w.failures(), list(w.serves())) == ({}, ["a"])

    play(Watched(tmp_path, admission=AdmissionLimits(adapters=1, loads=4)), scenario)


def test_a_busy_moment_is_no_failure(tmp_path: Path) -> None:
    async def scenario(w: Watched) -> None:
        w.put("a", 1)
        w.engine.proceed.clear()
        loads = [asyncio.create_task(w.load(f"c{n}", n)) for n in range(4)]
        await let_tasks_run()
        await w.watcher.poll()
        assert (w.failures(), w.serves()) == ({}, {})
        w.engine.proceed.set()
        await asyncio.gather(*loads)
        await w.watcher.poll()
        assert "a" in w.serves()

    play(Watched(tmp_path), scenario)


def test_a_pause_lies_between_two_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "FIRST_PAUSE_SECONDS", 1000.0)

    async def scenario(w: Watched) -> None:
        w.put("a", 1)
        w.engine.refusal = "no room"
        for _ in range(3):
            await w.watcher.poll()
        assert w.read_count == 1

    play(Watched(tmp_path), scenario)


def test_a_name_that_a_client_is_loading_is_not_taken_from_it(tmp_path: Path) -> None:
    async def scenario(w: Watched) -> None:
        w.put("a", 1)
        w.engine.proceed.clear()
        loading = asyncio.create_task(w.load("a", 2))
        await let_tasks_run()
        looking = asyncio.create_task(w.watcher.poll())
        await let_tasks_run()
        w.engine.proceed.set()
        await asyncio.gather(loading, looking)
        await w.watcher.poll()
        assert (w.serves(), w.failures()) == ({"a": adapter(2).digest}, {})
        # Deleted, the name is the directory's.
        await w.registry.unload("a")
        await w.watcher.poll()
        assert w.serves() == {"a": adapter(1).digest}

    play(Watched(tmp_path), scenario)


def test_a_watched_name_that_a_client_deletes_stays_deleted(tmp_path: Path) -> None:
    async def scenario(w: Watched) -> None:
        w.put("a", 1)
        await w.watcher.poll()
        await w.registry.unload("a")
        await w.watcher.poll()
        assert w.serves() == {}
        w.put("a", 2)
        await w.watcher.poll()
        assert w.serves() == {"a": adapter(2).digest}

    play(Watched(tmp_path), scenario)


def test_new_directories_take_no_slot_before_they_are_asked_for(tmp_path: Path) -> None:
    async def scenario(w: Watched) -> None:
        w.engine.more.set()
        for n in range(2):
            await w.load(f"hot{n}", n)
        w.put("a", 3)
        await w.watcher.poll()
        assert sorted(w.engine.loaded.values()) == ["hot0", "hot1"]
        assert [output async for output in w.generate("a")] == ["first", "last"]
        assert "a" in w.engine.loaded.values()
        # Other weights for it are tried out before they take its place.
        w.engine.refusal = "no room"
        w.put("a", 4)
        await w.watcher.poll()
        assert w.serves()["a"] == adapter(3).digest

    play(Watched(tmp_path, slots=2), scenario)


def test_what_is_brought_in_later_is_probed_then(tmp_path: Path) -> None:
    probed: list[str] = []

    async def probe(generation: Any) -> None:
        probed.append(generation.name)
        if generation.name == "faint":
            raise NoEffectError("'faint': found the base model's log-probabilities")

    async def scenario(w: Watched) -> None:
        w.engine.more.set()
        await w.load("hot", 1)
        w.put("a", 2)
        w.put("faint", 3)
        await w.watcher.poll()
        assert (set(w.serves()), probed) == ({"hot", "a", "faint"}, ["hot"])
        for _ in range(2):
            assert [output async for output in w.generate("a")] == ["first", "last"]
            assert [output async for output in w.generate("hot")] == ["first", "last"]
        assert probed == ["hot", "a"]
        with pytest.raises(GracefulHTTPError, match="base model's") as refusal:
            await anext(w.generate("faint"))
        assert refusal.value.http_status == 503
        await let_tasks_run()
        assert set(w.serves()) == w.served.keys() == {"hot", "a"}
        assert w.failures() == {"faint": "no_effect"}
        assert "faint" not in w.engine.loaded.values()
        assert w.in_store() == sorted([adapter(1).digest, adapter(2).digest])
        await w.watcher.poll()
        assert set(w.serves()) == {"hot", "a"}

    play(Watched(tmp_path, slots=1, probe=probe), scenario)


@pytest.mark.slow
def test_a_failure_keeps_no_adapter_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[weakref.ref[Adapter]] = []
    # Pytest keeps what is logged.
    monkeypatch.setattr(watcher.logger, "disabled", True)

    def full(written: Adapter, *_: Any) -> None:
        read.append(weakref.ref(written))
        raise OSError(28, "No space left on device")

    async def scenario(w: Watched) -> None:
        w.put("a", 1)
        monkeypatch.setattr(native, "write", full)
        await w.watcher.poll()
        assert w.failures() == {"a": "store_failed"}
        # Past the event that woke this task with the error.
        await let_tasks_run()
        gc.collect()
        assert [reference() for reference in read] == [None]

    play(Watched(tmp_path), scenario)


def test_a_name_that_serves_by_now_has_not_failed(tmp_path: Path) -> None:
    async def scenario(w: Watched) -> None:
        source = w.source(1)
        await w.registry.load("a", "label", local(source))
        w.registry.names.fail("a", "a", ValueError("too late"))
        assert w.failures() == {}
        assert await w.registry.dismiss("a") is None

    play(Watched(tmp_path), scenario)
