"""What a restart takes up, in which order, and what it never forgets."""

import asyncio
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.restarts import Server, play
from support.world import adapter, is_reading, let_tasks_run

from molehill.api.adapters.admission import AdmissionLimits
from molehill.api.adapters.errors import NotLoadedError
from molehill.api.adapters.load_options import LoadOptions
from molehill.api.adapters.traffic_limits import NO_LIMITS, TrafficLimits
from molehill.api.sources.manifest import Entry, Manifest
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native


def test_a_restarted_server_is_not_ready_until_all_is_loaded(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1, pinned=True, limits=TrafficLimits(3, 2.5))
        await first.load("b", 2)
        served = first.serves()
        second = first.restarted()
        second.world.engine.proceed.clear()
        restoring = asyncio.create_task(second.restore.run())
        while not second.world.engine.calls:
            await asyncio.sleep(0.001)
        assert not second.restore.ready
        second.world.engine.proceed.set()
        await restoring
        assert second.restore.ready
        assert second.serves() == served
        statuses = [generation.status for generation in second.world.registry]
        assert [status.slot.pinned for status in statuses] == [True, False]
        assert [status.traffic.limits for status in statuses] == [TrafficLimits(3, 2.5), NO_LIMITS]
        assert [status.note for status in statuses] == [None, None]

    play(scenario())


def test_a_mix_outlives_its_parts_and_a_restart(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1)
        await first.load("b", 2)
        made = await first.world.registry.load_mix("ab", {"a": 0.5, "b": 2.0})
        await first.world.registry.unload("b")
        second = first.restarted()
        await second.restore.run()
        assert (
            second.serves()
            == first.serves()
            == {"a": adapter(1).digest, "ab": made.generation.digest}
        )
        assert second.remembers() == first.remembers()
        assert second.remembers()["ab"].mix == made.generation.status.source.mix
        third = second.restarted()
        shutil.rmtree(third.world.store.path(made.generation.digest))
        await third.restore.run()
        assert third.serves() == {"a": adapter(1).digest}
        assert "lost the copy of this mix" in third.world.registry.failures["ab"].message

    play(scenario())


def test_a_server_without_a_manifest_is_ready_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = Server(tmp_path)
        await server.restore.run()
        assert server.restore.ready
        assert server.serves() == {}

    play(scenario())


def test_more_adapters_than_slots_are_taken_up_on_disk(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path, slots=2)
        for n in range(4):
            await first.load(f"a{n}", n, pinned=n == 3)
        second = first.restarted()
        second.world.engine.more.set()
        await second.restore.run()
        assert second.serves() == first.serves()
        assert sorted(second.world.engine.loaded.values()) == ["a1", "a3"]
        assert [output async for output in second.world.generate("a2")] == ["first", "last"]

    play(scenario())


def test_what_was_not_taken_up_yet_is_not_forgotten_meanwhile(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1)
        await first.load("b", 2)
        second = first.restarted()
        await second.load("c", 3)
        assert set(second.remembers()) == {"a", "b", "c"}
        assert set(second.restarted().remembers()) == {"a", "b", "c"}

    play(scenario())


def test_what_a_client_has_loaded_since_is_newer(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1)
        second = first.restarted()
        await second.load("a", 2)
        await second.restore.run()
        assert second.serves() == {"a": adapter(2).digest}
        assert second.remembers()["a"].generation == adapter(2).digest

    play(scenario())


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_a_lost_copy_comes_from_the_source(tmp_path: Path, damage: str) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1)
        copy = first.world.store.path(adapter(1).digest)
        if damage == "missing":
            shutil.rmtree(copy)
        else:
            (copy / native.WEIGHTS).write_bytes(b"half")
        second = first.restarted()
        await second.restore.run()
        assert second.serves() == {"a": adapter(1).digest}
        assert native.read(copy, second.world.limits).digest == adapter(1).digest

    play(scenario())


def test_a_source_that_changed_does_not_stand_in_for_a_lost_copy(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1)
        shutil.rmtree(first.world.store.path(adapter(1).digest))
        shutil.rmtree(first.root / "1")
        native.write(adapter(2), first.root / "1")
        server = first
        for _ in range(2):
            server = server.restarted()
            await server.restore.run()
            await let_tasks_run()
            assert server.restore.ready
            assert server.serves() == {}
            assert "expected" in server.world.registry.failures["a"].message
            # It may come back: the next start tries again.
            assert set(server.remembers()) == {"a"}
        await server.world.registry.dismiss("a")
        assert server.remembers() == {}

    play(scenario())


def test_a_source_that_changed_is_reported_and_what_was_loaded_is_served(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        for n in (1, 2, 3):
            await first.load(f"a{n}", n)
        for n in (1, 2):
            shutil.rmtree(first.root / str(n))
        native.write(adapter(9), first.root / "1")
        second = first.restarted()
        await second.restore.run()
        assert second.serves() == first.serves()
        notes = {g.name: g.status.note or "" for g in second.world.registry}
        assert "other content" in notes["a1"]
        assert "cannot be read" in notes["a2"]
        assert notes["a3"] == ""

    play(scenario())


def test_copies_that_nobody_remembers_are_deleted(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1)
        root = first.world.store.root
        for name in ("0" * 64, f".{'1' * 64}-half", "somebody-elses"):
            (root / name).mkdir()
        first.restarted()
        left = {path.name for path in root.iterdir()}
        assert left == {adapter(1).digest, "manifest.json", "somebody-elses"}

    play(scenario())


def test_a_busy_moment_is_waited_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1)
        second = first.restarted()
        second.world.engine.proceed.clear()
        loads = [asyncio.create_task(second.load(f"c{n}", 10 + n)) for n in range(4)]
        await let_tasks_run()
        restoring = asyncio.create_task(second.restore.run())
        await let_tasks_run()
        assert not second.restore.ready
        assert "a" in {loading.name for loading in second.world.registry.loading()}
        second.world.engine.proceed.set()
        await asyncio.gather(restoring, *loads)
        assert second.serves().items() > first.serves().items()
        assert (second.world.registry.failures, second.world.registry.loading()) == ({}, [])
        # Nor does it look like clients that were refused.
        events = [m for m in second.world.registry.events.collect() if "refused" in m.name]
        assert [sample for metric in events for sample in metric.samples] == []

    play(scenario())


def test_what_a_client_is_loading_is_not_overwritten(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1, pinned=True)
        second = first.restarted()
        second.world.engine.proceed.clear()
        loading = asyncio.create_task(second.load("a", 2))
        await let_tasks_run()
        restoring = asyncio.create_task(second.restore.run())
        await let_tasks_run()
        second.world.engine.proceed.set()
        await asyncio.gather(loading, restoring)
        assert second.serves() == {"a": adapter(2).digest}
        assert second.world.registry.failures == {}
        assert second.remembers()["a"].generation == adapter(2).digest

    play(scenario())


def test_a_name_that_is_deleted_before_its_turn_is_not_loaded_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        for n, name in enumerate("abc"):
            await first.load(name, n)
        second = first.restarted()
        registry = second.world.registry
        assert [loading.name for loading in registry.loading()] == ["a", "b", "c"]
        assert (await registry.dismiss("a")).name == "a"
        with pytest.raises(NotLoadedError):
            await registry.unload("b")
        assert set(second.remembers()) == {"c"}
        await second.restore.run()
        assert set(second.serves()) == set(second.remembers()) == {"c"}
        assert await registry.dismiss("c") is None

    play(scenario())


def test_a_name_that_is_deleted_between_its_copy_and_its_source_is_not_loaded(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1)
        (first.world.store.path(adapter(1).digest) / native.WEIGHTS).write_bytes(b"half")
        second = first.restarted()
        async with second.world.registry.intake.read_budget:
            restoring = asyncio.create_task(second.restore.run())
            await let_tasks_run()
            dismissing = asyncio.create_task(second.world.registry.dismiss("a"))
            await let_tasks_run()
            assert not dismissing.done()
        await restoring
        assert (await dismissing) is not None
        assert (second.serves(), second.remembers()) == ({}, {})
        assert second.world.registry.failures == {}

    play(scenario())


def test_a_fault_while_sources_are_looked_at_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        for n in (1, 2):
            await first.load(f"a{n}", n)
            shutil.rmtree(first.root / str(n))
            native.write(adapter(9), first.root / str(n))
        second = first.restarted()
        reading = []

        def read(path: Path, *_: Any) -> Adapter:
            reading.append(is_reading(second.world.registry.intake.read_budget))
            if path.name == "1":
                raise RuntimeError("a fault")
            return second.world.read(path)

        monkeypatch.setattr(second.restore, "_read", read)
        await second.restore.run()
        assert second.restore.ready
        notes = {generation.name: generation.status.note for generation in second.world.registry}
        assert notes["a1"] is None
        assert "other content" in (notes["a2"] or "")
        # One adapter at a time is in memory, whoever reads it.
        assert reading == [True, True]
        # The same weights from a source that holds them now: nothing is left to say.
        native.write(adapter(2), second.root / "elsewhere")
        fetch = second.sources.fetch("elsewhere")
        await second.world.registry.load("a2", "elsewhere", fetch)
        assert second.world.registry.get("a2").status.note is None

    play(scenario())


def test_what_a_client_said_of_the_files_is_remembered(tmp_path: Path) -> None:
    """Who says how a source is read says it for the next server too, should the copy be lost."""

    async def scenario() -> None:
        first = Server(tmp_path)
        native.write(adapter(1), first.root / "1")
        fetch = first.sources.fetch("1", "grouped_by_expert", True, 0)
        await first.world.registry.load("a", "1", fetch)
        assert first.world.layouts == ["grouped_by_expert"]
        assert first.remembers()["a"].lora_b_layout == "grouped_by_expert"
        digest = first.serves()["a"]
        os.utime(first.root / "1" / native.CONFIG)
        second = first.restarted()
        await second.restore.run()
        # The store's copy has the experts in order; the source, looked at again, has not.
        assert second.world.layouts == [None, "grouped_by_expert"]
        assert (second.world.residuals, second.world.non_granular) == ([False, True], [None, 0])
        third = second.restarted()
        shutil.rmtree(third.world.store.path(digest))
        await third.restore.run()
        assert third.serves() == {"a": digest}
        assert third.world.layouts[0] == "grouped_by_expert"
        assert (third.world.residuals[0], third.world.non_granular[0]) == (True, 0)
        assert third.remembers()["a"].asked == ("grouped_by_expert", True, 0)

    play(scenario())


def test_what_becomes_of_prompts_that_activate_nothing_is_remembered(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        native.write(replace(adapter(1), invocation_tokens=(5,)), first.root / "1")
        for name, when in (("a", "base"), ("b", None)):
            options = LoadOptions(when_not_invoked=when)
            await first.world.registry.load(name, "1", first.sources.fetch("1"), options)
        second = first.restarted()
        await second.restore.run()
        result = {g.name: g.status.when_not_invoked for g in second.world.registry}
        assert result == {"a": "base", "b": "refuse"}

    play(scenario())


def test_a_restart_that_changes_nothing_writes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        for name in "ba":
            await first.load(name, 1)
        written = first.manifest.path.stat().st_ino
        second = first.restarted()
        await second.restore.run()
        assert first.manifest.path.stat().st_ino == written
        await second.world.registry.unload("a")
        assert first.manifest.path.stat().st_ino != written
        assert set(second.remembers()) == {"b"}

    play(scenario())


class CountingManifest(Manifest):
    """One whose disk takes its time."""

    writes = 0

    def write(self, entries: list[Entry]) -> bool:
        self.writes += 1
        time.sleep(0.02)
        return super().write(entries)


def test_changes_that_come_together_are_written_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_restore.Manifest", CountingManifest)

    async def scenario() -> None:
        server = Server(tmp_path, admission=AdmissionLimits(adapters=100, loads=100))
        names = [f"a{n}" for n in range(30)]
        await asyncio.gather(*(server.load(name, 1) for name in names))

        async def unload(name: str) -> None:
            await server.world.registry.unload(name)
            assert name not in server.remembers()

        manifest: Any = server.manifest
        manifest.writes = 0
        await asyncio.gather(*(unload(name) for name in names))
        assert server.remembers() == {}
        assert manifest.writes <= 3

    play(scenario())


def test_a_manifest_that_the_disk_does_not_take_is_counted_and_caught_up_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = Server(tmp_path)
        obstacle = server.manifest.path.with_suffix(".partial")
        obstacle.mkdir()
        await server.load("a", 1)
        assert (set(server.serves()), server.remembers()) == ({"a"}, {})
        failed = {
            sample.name: sample.value
            for metric in server.world.registry.events.collect()
            for sample in metric.samples
        }
        assert failed["molehill_manifest_write_failures_total"] == 1
        os.rmdir(obstacle)
        await server.load("b", 2)
        assert set(server.remembers()) == {"a", "b"}

    play(scenario())


def test_what_was_never_probed_is_probed_after_the_restart(tmp_path: Path) -> None:
    probed = []

    async def probe(generation: Any) -> None:
        probed.append(generation.name)

    async def scenario() -> None:
        first = Server(tmp_path, slots=1, probe=probe)
        await first.load("a", 1)
        await first.load("b", 2, eager=False)
        second = first.restarted()
        second.world.engine.more.set()
        await second.restore.run()
        assert (list(second.serves()), probed) == (["a", "b"], ["a"])
        for _ in range(2):
            for name in "ba":
                assert [output async for output in second.world.generate(name)]
        assert probed == ["a", "b"]

    play(scenario())
