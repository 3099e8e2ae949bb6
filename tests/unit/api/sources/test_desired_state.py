"""What a server makes of its adapters file, and of what becomes of that."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.desired import Followed
from support.world import adapter, let_tasks_run

from molehill.api.adapters.admission import AdmissionLimits
from molehill.api.adapters.errors import NoEffectError
from molehill.api.adapters.load_options import LoadOptions
from molehill.api.adapters.source import Source, local
from molehill.api.adapters.traffic_limits import NO_LIMITS, TrafficLimits
from molehill.api.http.schemas import everything, of_adapters_file
from molehill.api.metrics.desired import DesiredCollector
from molehill.api.metrics.prometheus import exposition
from molehill.api.sources import desired_state, operator_file
from molehill.api.sources.manifest import Manifest
from molehill.api.sources.restore import Restore

SYNCER = """
vLLMLoRAConfig:
  ensureExist: {models: [%s]}
  ensureNotExist: {models: [%s]}
"""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits before it is looked at or tried again."""
    monkeypatch.setattr(operator_file, "FILE_SECONDS", 0.0)
    monkeypatch.setattr(operator_file, "URL_SECONDS", 0.0)
    monkeypatch.setattr(desired_state, "FIRST_PAUSE_SECONDS", 0.0)


def play(make: Callable[[], Followed], scenario: Callable[[Followed], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(scenario(make()), 20)

    asyncio.run(run())


def test_what_is_wanted_is_served_replaced_and_taken_away(tmp_path: Path) -> None:
    async def scenario(f: Followed) -> None:
        await f.load("client", 9)
        f.write(f.entry("a", 1), f.entry("b", 2, pinned=True))
        assert not f.file.ready
        await f.until(lambda: f.file.ready)
        assert f.states() == {"a": "converged", "b": "converged"}
        assert f.serves() == {n: adapter(s).digest for n, s in (("client", 9), ("a", 1), ("b", 2))}
        assert f.registry.get("b").status.slot.pinned
        # Other weights for one, another source of the same for the other.
        f.write(f.entry("a", 3), f.entry("b", 2, source=f.put_as(12)))
        await f.until(lambda: f.states() == {"a": "converged", "b": "converged"})
        assert f.serves()["a"] == adapter(3).digest
        assert f.serves()["b"] == adapter(12).digest
        assert not f.registry.get("b").status.slot.pinned
        f.write(f.entry("b", 2, source="source-12"))
        await f.until(lambda: "a" not in f.serves())
        f.write()
        await f.until(lambda: list(f.serves()) == ["client"])
        assert f.file.ready

    play(lambda: Followed(tmp_path / "f"), scenario)


def test_what_others_do_to_a_wanted_name_is_undone(tmp_path: Path) -> None:
    async def scenario(f: Followed) -> None:
        f.write(f.entry("a", 1))
        await f.until(lambda: f.file.ready)
        await f.registry.unload("a")
        assert f.states() == {"a": "pending"}
        await f.until(lambda: "a" in f.serves())
        await f.load("a", 5, replace=True)
        await f.until(lambda: f.states() == {"a": "converged"})
        assert f.serves()["a"] == adapter(1).digest
        reads = f.read_count
        await f.registry.pin("a", True)
        assert f.states() == {"a": "pending"}
        await f.until(lambda: f.states() == {"a": "converged"})
        assert (f.registry.get("a").status.slot.pinned, f.read_count) == (False, reads)

    play(lambda: Followed(tmp_path / "f"), scenario)


def test_limits_are_as_the_file_says(tmp_path: Path) -> None:
    async def scenario(f: Followed) -> None:
        limits = {"requests_in_flight": 2, "tokens_per_second": 8.0}
        f.write(f.entry("a", 1, limits=limits, pinned=None), f.entry("b", 2))
        await f.until(lambda: f.file.ready)
        served = f.registry.get("a")
        assert served.status.traffic.limits == TrafficLimits(2, 8.0)
        # What clients make of them is undone, and no file is read for it.
        await f.registry.pin("a", True)
        reads, calls = f.read_count, list(f.engine.calls)
        for name in "ab":
            await f.registry.limit(name, TrafficLimits(9))
        assert f.states() == {"a": "pending", "b": "pending"}
        await f.until(lambda: f.states() == {"a": "converged", "b": "converged"})
        assert served.status.traffic.limits == TrafficLimits(2, 8.0)
        assert f.registry.get("b").status.traffic.limits == NO_LIMITS
        assert (f.read_count, f.engine.calls, served.status.slot.pinned) == (reads, calls, True)
        f.write(f.entry("a", 1, limits=None, pinned=None), f.entry("b", 2, limits={"x": 1}))
        await f.until(lambda: f.states() == {"a": "converged", "b": "failed"})
        assert "limits: found an unknown field 'x'" in f.errors()["b"]
        assert served.status.traffic.limits == NO_LIMITS
        # The LoRA syncer's file says nothing of them.
        await f.registry.limit("a", TrafficLimits(4))
        f.path.write_text(SYNCER % ("{id: a, source: source-1}", ""))
        await f.until(lambda: f.states() == {"a": "converged"})
        assert f.registry.get("a") is served
        assert served.status.traffic.limits == TrafficLimits(4)

    play(lambda: Followed(tmp_path / "f"), scenario)


def test_a_name_that_a_client_gave_is_the_files_once_it_wants_it(tmp_path: Path) -> None:
    async def scenario(f: Followed) -> None:
        await f.load("a", 1)
        f.write(f.entry("a", 1))
        await f.until(lambda: f.states() == {"a": "converged"})
        assert [info.wanted_by for info in everything(f.registry)] == ["adapters_file"]
        f.write()
        await f.until(lambda: f.serves() == {})

    play(lambda: Followed(tmp_path / "f"), scenario)


def test_a_bad_entry_harms_no_other(tmp_path: Path) -> None:
    async def scenario(f: Followed) -> None:
        f.write(f.entry("a", 1))
        await f.until(lambda: f.file.ready)
        (f.root / "bad").mkdir()
        f.write(
            f.entry("a", 1),
            f.entry("b", 2),
            f.entry("wrong", 3, digest=adapter(4).digest),
            f.entry("right", 4, digest=adapter(4).digest),
            {"name": "gone", "source": "nowhere"},
            {"name": "bad", "source": "bad"},
            {"name": "base", "source": "source-1"},
            {"name": "outside", "source": "/etc"},
            {"name": "typo", "sauce": "source-1"},
        )
        await f.until(lambda: "pending" not in f.states().values())
        assert set(f.serves()) == {"a", "b", "right"}
        report = f.errors()
        assert set(report) == {"wrong", "gone", "bad", "base", "outside", "typo"}
        result, expected = adapter(3).digest, adapter(4).digest
        assert report["wrong"] == f"source-3: found {result}, expected {expected}"
        assert "sauce: found an unknown field" in (report["typo"] or "")
        assert all(str(f.folder) not in (text or "") for text in report.values())
        assert {info.name for info in everything(f.registry) if info.error} == {
            *("wrong", "gone", "bad", "base", "outside")
        }
        shown = of_adapters_file(f.file)
        assert (shown.converged, shown.error, len(shown.data)) == (False, None, 9)
        # Put right at its source, or in the file.
        f.put("nowhere", 7)
        f.write(f.entry("a", 1), {"name": "gone", "source": "nowhere"})
        await f.until(lambda: f.states() == {"a": "converged", "gone": "converged"})
        # A try of what it wants no more may have to end first.
        await f.until(lambda: not f.failures())
        assert of_adapters_file(f.file).converged

    play(
        lambda: Followed(tmp_path / "f", admission=AdmissionLimits(adapters=20, loads=2)), scenario
    )


def test_a_name_in_a_bad_entry_stays_as_it_is(tmp_path: Path) -> None:
    async def scenario(f: Followed) -> None:
        f.write(f.entry("a", 1), f.entry("b", 2))
        await f.until(lambda: f.file.ready)
        f.write({"name": "a"}, f.entry("b", 2))
        await f.look()
        assert (set(f.serves()), f.states()) == ({"a", "b"}, {"a": "failed", "b": "converged"})
        # A name that cannot be read may be anybody's.
        f.write({"nmae": "a", "source": "source-1"})
        await f.look()
        assert set(f.serves()) == {"a", "b"}
        f.write(f.entry("a", 1), f.entry("a", 2))
        await f.until(lambda: "b" not in f.serves())
        assert (f.serves(), f.states()) == ({"a": adapter(1).digest}, {"a": "failed"})

    play(lambda: Followed(tmp_path / "f"), scenario)


def test_a_refused_replacement_leaves_what_serves(tmp_path: Path) -> None:
    async def scenario(f: Followed) -> None:
        f.write(f.entry("a", 1))
        await f.until(lambda: f.file.ready)
        f.write(f.entry("a", 2, digest=adapter(1).digest))
        # The name serves that very digest: nothing is read.
        await f.look()
        assert f.states() == {"a": "converged"}
        f.write(f.entry("a", 2, digest=adapter(3).digest))
        await f.until(lambda: f.states() == {"a": "failed"})
        assert f.serves() == {"a": adapter(1).digest}
        assert f.file.ready

    play(lambda: Followed(tmp_path / "f"), scenario)


@pytest.mark.parametrize("fault", ["gone", "half", "empty", "large", "directory"])
def test_a_file_that_says_nothing_changes_nothing(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_file, "MOST_BYTES", 4096)

    async def scenario(f: Followed) -> None:
        f.write(f.entry("a", 1))
        await f.until(lambda: f.file.ready)
        good = f.path.read_bytes()
        f.path.unlink()
        if fault == "directory":
            f.path.mkdir()
        elif fault != "gone":
            texts = {"half": good[:-4], "empty": b"", "large": b"# \n" * 4096}
            f.path.write_bytes(texts[fault])
        await f.look()
        assert (f.serves(), f.states()) == ({"a": adapter(1).digest}, {"a": "converged"})
        shown = of_adapters_file(f.file)
        assert (shown.converged, shown.read == f.file.read_at) == (False, True)
        assert f.file.read_at is not None
        assert f.file.read_failures >= 1
        assert (shown.error or "").startswith("--adapters-file: ")
        assert str(f.folder) not in (shown.error or "")
        if fault == "directory":
            f.path.rmdir()
        f.path.write_bytes(good)
        await f.until(lambda: f.file.error is None)
        assert of_adapters_file(f.file).converged

    play(lambda: Followed(tmp_path / "f"), scenario)


def test_a_file_that_is_not_there_yet_keeps_a_new_server_waiting(tmp_path: Path) -> None:
    async def scenario(f: Followed) -> None:
        await f.look()
        assert (f.file.ready, f.file.read_at) == (False, None)
        f.write()
        await f.until(lambda: f.file.ready)

    play(lambda: Followed(tmp_path / "f"), scenario)


def test_a_mounted_config_map_is_exchanged_by_its_links(tmp_path: Path) -> None:
    async def scenario(f: Followed) -> None:
        f.entry("a", 1), f.entry("b", 2)
        for number, name in enumerate("ab", start=1):
            folder = f.folder / f"..{number}"
            folder.mkdir()
            (folder / "adapters.yaml").write_text(f"- {{name: {name}, source: source-{number}}}")
        (f.folder / "..data").symlink_to("..1")
        f.path.symlink_to("..data/adapters.yaml")
        await f.until(lambda: f.states() == {"a": "converged"})
        (f.folder / "..tmp").symlink_to("..2")
        os.replace(f.folder / "..tmp", f.folder / "..data")
        await f.until(lambda: list(f.serves()) == ["b"])

    play(lambda: Followed(tmp_path / "f"), scenario)


def test_the_syncers_file_takes_away_only_what_it_names(tmp_path: Path) -> None:
    async def scenario(f: Followed) -> None:
        f.put_as(1)
        await f.load("client", 8)
        await f.load("other", 9)
        f.path.write_text(SYNCER % ("{id: a, source: source-1}", "{id: client, source: x}"))
        await f.until(lambda: set(f.serves()) == {"a", "other"})
        await f.load("client", 8)
        await f.until(lambda: "client" not in f.serves())
        await f.registry.pin("a", True)
        await f.look()
        assert (f.states(), f.registry.get("a").status.slot.pinned) == ({"a": "converged"}, True)

    play(lambda: Followed(tmp_path / "f"), scenario)


def test_what_comes_by_the_command_line_is_left_to_it(tmp_path: Path) -> None:
    async def scenario(f: Followed) -> None:
        start = replace(f.source(5), remembered=False)
        await f.registry.load("started", "started", local(start), LoadOptions())
        text = SYNCER % ("", "{id: started, source: x}")
        f.path.write_text(text)
        await f.look()
        assert "started" in f.serves()
        f.write(f.entry("started", 1))
        await f.until(lambda: f.states() == {"started": "failed"})
        assert "which --adapter serves" in (f.errors()["started"] or "")
        assert f.serves() == {"started": adapter(5).digest}
        assert [info.wanted_by for info in everything(f.registry)] == ["command_line"]

    play(lambda: Followed(tmp_path / "f"), scenario)


def test_a_name_that_has_to_wait_holds_up_no_other(tmp_path: Path) -> None:
    async def scenario(f: Followed) -> None:
        f.write(f.entry("a", 1))
        await f.until(lambda: f.file.ready)
        arrives = threading.Event()

        @contextmanager
        def slow_source() -> Iterator[Source]:
            arrives.wait(30)  # Longer than the scenario may take.
            yield f.source(5)

        slow = asyncio.create_task(f.registry.load("a", "slow", slow_source(), LoadOptions()))
        await let_tasks_run()
        f.write(f.entry("b", 2))
        await f.until(lambda: "b" in f.serves())
        # It is to be unloaded, behind the client's load.
        assert "a" in f.serves()
        arrives.set()
        await slow
        await f.look()
        # It is the client's now.
        assert f.serves()["a"] == adapter(5).digest

    play(lambda: Followed(tmp_path / "f"), scenario)


def test_a_new_server_waits_for_what_may_pass_and_not_for_what_is_wrong(tmp_path: Path) -> None:
    async def scenario(f: Followed) -> None:
        f.write(f.entry("a", 1), {"name": "gone", "source": "nowhere"})
        f.engine.refusal = "no room"
        await f.until(lambda: f.states() == {"a": "failed", "gone": "failed"})
        assert not f.file.ready
        f.engine.refusal = ""
        await f.until(lambda: f.file.ready)
        assert "a" in f.serves()
        await f.until(lambda: f.states() == {"a": "converged", "gone": "failed"})

    play(lambda: Followed(tmp_path / "f"), scenario)


def test_the_heaviest_come_first_and_one_pause_lies_between_two_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desired_state, "FIRST_PAUSE_SECONDS", 1000.0)

    async def scenario(f: Followed) -> None:
        f.write(f.entry("a", 1), f.entry("b", 2, weight=2), f.entry("c", 3, weight=0.5))
        await f.until(lambda: "pending" not in f.states().values())
        assert list(f.serves()) == ["b"]
        assert f.errors().keys() == {"a", "c"}
        await f.registry.unload("b")
        await f.look()
        # The others wait their pause out, the one that was served does not.
        assert list(f.serves()) == ["b"]

    play(lambda: Followed(tmp_path / "f", admission=AdmissionLimits(adapters=1, loads=1)), scenario)


def test_what_turns_out_to_have_no_effect_is_tried_out_the_next_time(tmp_path: Path) -> None:
    async def probe(generation: Any) -> None:
        if generation.name == "faint":
            raise NoEffectError("'faint': found the base model's log-probabilities")

    async def scenario(f: Followed) -> None:
        f.engine.more.set()
        await f.load("hot", 1)
        f.write(f.entry("faint", 3))
        await f.until(lambda: "faint" in f.serves())
        with pytest.raises(Exception, match="base model's"):
            await anext(f.generate("faint"))
        await let_tasks_run()
        await f.until(lambda: f.states() == {"faint": "failed"})
        for _ in range(3):
            await f.look()
            assert (list(f.serves()), f.failures()) == (["hot"], {"faint": "no_effect"})
        f.write()
        await f.until(lambda: f.failures() == {})

    play(lambda: Followed(tmp_path / "f", slots=1, probe=probe), scenario)


def test_a_restarted_server_knows_what_came_from_the_file(tmp_path: Path) -> None:
    def restart(f: Followed) -> Restore:
        return Restore(f.registry, f.store, f.sources, f.read, Manifest(f.store.root))

    async def first(f: Followed) -> None:
        restart(f)
        await f.registry.load("client", "source-8", f.sources.fetch(f.put_as(8)))
        f.write(f.entry("a", 1), f.entry("b", 2, digest=adapter(2).digest), f.entry("c", 3))
        await f.until(lambda: f.file.ready)
        f.store.claim.release()

    async def second(f: Followed) -> None:
        took_up = restart(f)
        await took_up.run()
        assert set(f.serves()) == {"client", "a", "b", "c"}
        # Of b the file says the digest, so that its source is not needed.
        for path in sorted((f.root / "source-2").iterdir()):
            path.unlink()
        await f.until(lambda: f.file.ready)
        assert f.states() == {"a": "converged", "b": "converged"}
        assert set(f.serves()) == {"client", "a", "b"}

    folder = tmp_path / "f"
    play(lambda: Followed(folder), first)
    (folder / "adapters.yaml").write_text(
        f"[{{name: a, source: source-1}}, {{name: b, source: source-2, "
        f"digest: {adapter(2).digest}}}]"
    )
    for path in ("root", "other"):
        (folder / path).rename(folder / f"{path}-kept")

    def again() -> Followed:
        f = Followed(folder)
        f.root.rmdir()
        (folder / "root-kept").rename(f.root)
        return f

    play(again, second)


def test_metrics_tell_states_age_and_failures(tmp_path: Path) -> None:
    async def scenario(f: Followed) -> None:
        f.write(f.entry("a", 1), {"name": "gone", "source": "nowhere"}, {"name": "typo"})
        await f.until(lambda: "pending" not in f.states().values())
        f.path.write_text("{")
        await f.look()
        text = exposition(DesiredCollector(f.file)).decode()
        samples = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        age = samples.pop(("molehill_adapters_file_age_seconds",))
        assert age >= 0
        assert samples.pop(("molehill_adapters_file_failures_total",)) >= 1
        assert samples == {
            ("molehill_desired_adapters", "converged"): 1,
            ("molehill_desired_adapters", "pending"): 0,
            ("molehill_desired_adapters", "failed"): 2,
        }

    play(lambda: Followed(tmp_path / "f"), scenario)
