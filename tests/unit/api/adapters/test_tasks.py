"""Work that nobody awaits: whatever ends it is seen."""

import asyncio
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from support import warm
from support.health import Engine
from support.restarts import Server, play
from support.watched import Watched
from support.world import World, adapter, let_tasks_run

from molehill.api import app as plugin
from molehill.api.adapters.errors import EngineRefusedError
from molehill.api.http import vllm_routes
from molehill.api.sources import watcher
from molehill.api.sources.restore import Restore
from molehill.api.sources.roots import AdapterRoots
from molehill.api.vllm.engine_watch import EngineWatch


def counted(world: World, name: str) -> dict[str, float]:
    """By the label's value."""
    return {
        next(iter(sample.labels.values())): sample.value
        for metric in world.registry.events.collect()
        for sample in metric.samples
        if sample.name == f"molehill_{name}_total"
    }


def test_a_restart_that_breaks_off_is_told_and_reports_what_it_did_not_come_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        for n, name in enumerate("ab"):
            await first.load(name, n)
        second = first.restarted()

        async def fault(*_: Any) -> None:
            raise AssertionError("a fault of ours")

        monkeypatch.setattr(Restore, "_restore", fault)
        await second.restore.run()
        # It serves, and says what it does not serve; it is not waited for in vain.
        assert second.restore.ready
        failures = second.world.registry.failures
        assert {name: failure.kind for name, failure in failures.items()} == {
            "a": "internal_error",
            "b": "internal_error",
        }
        assert "a fault of ours" in caplog.text
        assert counted(second.world, "task_failures")["restart"] == 1
        assert set(second.remembers()) == {"a", "b"}

    play(scenario())


def test_a_manifest_that_cannot_be_written_for_whatever_reason_undoes_no_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        server = Server(tmp_path)
        await server.load("a", 1)

        def no_thread(*_: Any) -> bool:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(server.manifest, "write", no_thread)
        await server.load("a", 2)
        assert server.serves() == {"a": adapter(2).digest}
        # What it took the place of is gone.
        assert server.world.engine.loaded == {2: "a"}

    play(scenario())


def test_a_copy_that_cannot_be_freed_is_counted_and_undoes_no_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)

        async def stuck(_: str) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(w.registry.intake, "release", stuck)
        assert (await w.load("a", 2, replace=True)).status == "replaced"
        samples = [s for m in w.registry.events.collect() for s in m.samples]
        failed = {s.name: s.value for s in samples}["molehill_adapter_free_failures_total"]
        assert failed == 1

    asyncio.run(asyncio.wait_for(scenario(World(tmp_path)), 20))


@pytest.mark.parametrize("refused", [True, False])
def test_a_load_whose_client_has_gone_is_counted_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, refused: bool
) -> None:
    async def scenario(w: World) -> None:
        w.engine.proceed.clear()
        loading = asyncio.create_task(w.load("a", 1))
        while not w.engine.calls:
            await asyncio.sleep(0.001)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        w.engine.refusal = "no room at all" if refused else ""
        w.engine.proceed.set()
        await let_tasks_run()
        expected = {EngineRefusedError.kind: 1.0} if refused else {}
        assert counted(w, "adapter_loads_refused") == expected
        samples = [s for m in w.registry.events.collect() for s in m.samples]
        loads = {s.name: s.value for s in samples}["molehill_adapter_load_seconds_count"]
        assert loads == (not refused)
        assert ("no room at all" in caplog.text) == refused
        # A refusal is no fault of the server's.
        assert counted(w, "task_failures")["registry"] == 0

    asyncio.run(asyncio.wait_for(scenario(World(tmp_path)), 20))


def test_looks_that_fail_are_counted_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "PERIOD_SECONDS", 0.001)
    monkeypatch.setattr(watcher, "QUIET_SECONDS", 0.0)

    async def scenario(w: Watched) -> None:
        def fault(_: AdapterRoots) -> Any:
            raise AssertionError("a fault of ours")

        w.put("a", 1)
        with monkeypatch.context() as patched:
            patched.setattr(AdapterRoots, "entries", fault)
            watching = asyncio.create_task(w.watcher.run())
            while counted(w, "task_failures")["watch"] < 2:
                await asyncio.sleep(0.001)
        while not w.serves():
            await asyncio.sleep(0.001)
        watching.cancel()

    asyncio.run(asyncio.wait_for(scenario(Watched(tmp_path)), 20))


def test_a_question_that_is_given_up_is_not_cut_short_and_its_failure_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        proceed = asyncio.Event()

        async def collective_rpc(method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
            await proceed.wait()
            raise RuntimeError("a worker's fault")

        engine = SimpleNamespace(collective_rpc=collective_rpc, errored=False)
        asking = asyncio.create_task(EngineWatch(engine).collective_rpc("molehill_stats"))
        await let_tasks_run()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        proceed.set()
        await let_tasks_run()
        assert "a worker's fault" in caplog.text

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_server_whose_background_has_failed_says_so_where_readiness_is_asked() -> None:
    async def ended() -> "asyncio.Task[None]":
        async def fault() -> None:
            raise AssertionError("/a/path/of/the/server")

        task = asyncio.create_task(fault())
        await asyncio.wait({task})
        return task

    app = FastAPI()
    app.include_router(vllm_routes.router)
    app.state.engine_client = Engine(dead=False)
    app.state.molehill = SimpleNamespace(restore=SimpleNamespace(ready=False))
    app.state.molehill_task = asyncio.run(ended())
    answer = TestClient(app).get("/health/ready")
    # Nobody need ask again: it is not a matter of time.
    assert (answer.status_code, answer.headers.get("Retry-After")) == (503, None)
    assert "AssertionError" in answer.json()["error"]["message"]
    assert "path" not in answer.text


def fail_in_the_background() -> None:
    async def fault() -> None:
        raise AssertionError("a fault of ours")

    async def main() -> None:
        task = plugin.start(fault())
        await asyncio.sleep(60)
        task.cancel()

    asyncio.run(main())


@pytest.mark.slow
def test_a_process_whose_background_fails_ends(tmp_path: Path) -> None:
    """Nothing else would ever make it ready, or load what appears in its roots."""
    process = warm.run(fail_in_the_background, tmp_path / "log")
    process.wait(240)
    said = (tmp_path / "log").read_text()
    assert process.returncode == -signal.SIGTERM, said
    assert "a fault of ours" in said
