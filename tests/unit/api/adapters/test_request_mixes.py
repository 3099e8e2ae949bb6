"""The order of events of mixes that requests ask for, beside a registry."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.world import ADMISSION, Play, Scenario, World, adapter, let_tasks_run

from molehill.api.adapters.admission import AdmissionLimits
from molehill.api.adapters.errors import (
    BadMixError,
    NotLoadedError,
    StoreError,
    TooManyMixesError,
)
from molehill.api.adapters.mix import BY_REQUEST
from molehill.api.adapters.source import Source
from molehill.engine.adapter.errors import ShapeError, UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native
from molehill.engine.transform.weighted_sum import Part, mix
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Constant, TopK

SITE = "layers.0.self_attn.q_proj"


def play_with(tmp_path: Path, most: int, scenario: Scenario) -> None:
    admission = AdmissionLimits(ADMISSION.adapters, ADMISSION.loads, mixes=most)
    world = World(tmp_path, admission=admission)
    asyncio.run(asyncio.wait_for(scenario(world), 20))


async def three(w: World) -> None:
    for seed, name in enumerate("abc", start=1):
        await w.load(name, seed)


def held(w: World) -> list[str]:
    """Digests that the store has beside a's, b's and c's."""
    parts = {adapter(seed).digest for seed in (1, 2, 3)}
    return sorted(set(w.in_store()) - parts)


def test_a_mix_is_the_weighted_sum_of_what_is_served(play: Play) -> None:
    async def scenario(w: World) -> None:
        await three(w)
        lease = await w.registry.mixes.lease({"b": 2.0, "a": -0.5}, object())
        mixed = native.read(lease.generation.content.path, w.limits)
        parts = sorted([(adapter(1), -0.5), (adapter(2), 2.0)], key=lambda part: part[0].digest)
        expected = mix([Part("", part, weight) for part, weight in parts])
        assert mixed.digest == lease.generation.digest == expected.digest
        assert (lease.generation.name, lease.generation.content.kind) == (BY_REQUEST, "mix")
        assert [generation.name for generation in w.registry] == ["a", "b", "c"]

    play(scenario)


def test_equal_mixes_are_one_generation_that_is_made_once(play: Play) -> None:
    async def scenario(w: World) -> None:
        await three(w)
        wanted = [{"a": 0.5, "b": 0.25}, {"b": 0.25, "a": 0.5}, {"b": 0.25, "c": 0, "a": 0.5}] * 3
        leases = await asyncio.gather(
            *(w.registry.mixes.lease(weights, object()) for weights in wanted)
        )
        (generation,) = {lease.generation for lease in leases}
        assert held(w) == [generation.digest]
        assert generation.lora_int_id == 4
        assert generation.status.in_flight == 9
        for lease in leases:
            lease.release()
        assert (await w.registry.mixes.lease(wanted[0], object())).generation is generation

    play(scenario)


def test_a_mix_of_one_with_weight_1_is_that_adapter(play: Play) -> None:
    async def scenario(w: World) -> None:
        await three(w)
        for weights in ({"a": 1.0}, {"a": 1.0, "b": 0.0}):
            lease = await w.registry.mixes.lease(weights, object())
            assert lease.generation is w.registry.get("a")
        assert (await w.registry.load_mix("again", {"a": 1.0})).generation.digest == adapter(
            1
        ).digest
        assert (len(w.registry.mixes), held(w)) == (0, [])

    play(scenario)


def test_a_load_gives_a_mix_a_name_that_requests_for_it_find(play: Play) -> None:
    async def scenario(w: World) -> None:
        await three(w)
        loaded = await w.registry.load_mix("ab", {"a": 0.5, "b": 0.5})
        assert loaded.status == "loaded"
        again = await w.registry.load_mix("ab", {"b": 0.5, "a": 0.5})
        assert (again.status, again.generation) == ("unchanged", loaded.generation)
        lease = await w.registry.mixes.lease({"b": 0.5, "a": 0.5}, object())
        assert lease.generation is loaded.generation
        # What becomes of the parts is nothing to it.
        await w.registry.unload("a")
        assert w.registry.get("ab") is loaded.generation
        assert (await w.registry.load_mix("b", {"b": 3.0})).status == "replaced"
        for generation in w.registry.alive():
            assert all(hold.request is not None for hold in generation.status.holds)

    play(scenario)


def test_mixes_that_are_not_in_use_make_room_and_names_never_do(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await three(w)
        await w.registry.load_mix("named", {"a": 3.0, "b": 3.0})
        mixes = w.registry.mixes

        async def ask(weight: float) -> Any:
            return await mixes.lease({"a": weight, "b": 1.0}, object())

        first, second = await ask(0.1), await ask(0.2)
        with pytest.raises(TooManyMixesError, match="found 2 in use"):
            await ask(0.3)
        first.release()
        second.release()
        # The first is now the one that was used last.
        (await ask(0.1)).release()
        third = await ask(0.3)
        await let_tasks_run()
        assert list(mixes) == [first.generation, third.generation]
        assert second.generation.digest not in w.in_store()
        assert w.registry.get("named") is not None
        assert {"a", "b", "c", "named"} == set(w.served)

    play_with(tmp_path, 2, scenario)


def test_many_mixes_at_once_stay_within_the_bound(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await three(w)

        async def ask(n: int) -> bool:
            try:
                lease = await w.registry.mixes.lease({"a": n + 0.5, "b": 1.0}, object())
            except TooManyMixesError:
                return False
            assert len(w.registry.mixes) <= 3
            await asyncio.sleep(0.001)
            lease.release()
            return True

        served = await asyncio.gather(*(ask(n) for n in range(20)))
        assert sum(served) >= 3
        # Who is told to retry gets it.
        for n in range(20):
            while not await ask(n):
                await let_tasks_run()
        await let_tasks_run()
        assert len(held(w)) == len(w.registry.mixes) <= 3

    play_with(tmp_path, 3, scenario)


def test_a_server_may_take_none(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await three(w)
        with pytest.raises(BadMixError, match="takes none by request"):
            await w.registry.mixes.lease({"a": 0.5}, object())
        assert (await w.registry.load_mix("half", {"a": 0.5})).status == "loaded"

    play_with(tmp_path, 0, scenario)


@pytest.mark.parametrize("way", ["replace", "unload"])
def test_a_part_that_goes_takes_its_mixes_along_when_they_end(play: Play, way: str) -> None:
    async def scenario(w: World) -> None:
        await three(w)
        weights = {"a": 0.5, "b": 0.5}
        running = await w.registry.mixes.lease(weights, object())
        other = await w.registry.mixes.lease({"b": 0.5, "c": 0.5}, object())
        if way == "replace":
            await w.load("a", 4, replace=True)
        else:
            await w.registry.unload("a")
        await let_tasks_run()
        assert running.generation.status.draining
        assert list(w.registry.mixes) == [other.generation]
        assert running.generation.digest in w.in_store()
        if way == "replace":
            newer = await w.registry.mixes.lease(weights, object())
            assert newer.generation.digest != running.generation.digest
        else:
            with pytest.raises(NotLoadedError, match="found 'a', expected"):
                await w.registry.mixes.lease(weights, object())
        running.release()
        await let_tasks_run()
        assert running.generation.digest not in w.in_store()

    play(scenario)


def test_all_unknown_names_are_told(play: Play) -> None:
    async def scenario(w: World) -> None:
        await three(w)
        with pytest.raises(NotLoadedError, match="found 'x', 'base', expected names of served"):
            await w.registry.mixes.lease({"x": 1.0, "a": 1.0, "base": 0.0}, object())

    play(scenario)


def test_a_request_that_is_gone_leaves_no_hold(play: Play) -> None:
    async def scenario(w: World) -> None:
        await three(w)
        asking = asyncio.create_task(w.registry.mixes.lease({"a": 0.5, "b": 1.0}, object()))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        while not len(w.registry.mixes):
            await asyncio.sleep(0.001)
        await let_tasks_run()
        assert all(not generation.status.holds for generation in w.registry.alive())

    play(scenario)


def other(policy: Any, **more: Any) -> Adapter:
    pair = Experts(torch.ones(2, 4), torch.ones(4, 2), (1, 1))
    router = None if isinstance(policy, Constant) else torch.ones(2, 4)
    return Adapter("other", {SITE: LinearMixture(pair, policy, router)}, **more)


@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        (other(TopK(1)), UnsupportedError, r"found a mixture that reads the token \(TopK\)"),
        (
            other(Constant((1.0, 1.0)), invocation_tokens=(5,)),
            UnsupportedError,
            r"alora_invocation_tokens: found \[5\], expected none",
        ),
    ],
)
def test_what_does_not_add_up_is_refused_by_name_and_nothing_stays(
    play: Play, part: Adapter, kind: type[Exception], message: str
) -> None:
    async def scenario(w: World) -> None:
        await three(w)
        native.write(part, w.folder / "other")
        await w.load("bad", Source(w.folder / "other", "other"))
        before = w.in_store()
        for asked in (
            w.registry.mixes.lease({"a": 1.0, "bad": 0.5}, object()),
            w.registry.load_mix("mixed", {"a": 1.0, "bad": 0.5}),
        ):
            with pytest.raises(kind, match=f"^bad: .*{message}"):
                await asked
        lone = await w.registry.mixes.lease({"bad": 1.0}, object())
        assert lone.generation is w.registry.get("bad")
        lone.release()
        assert (w.in_store(), len(w.registry.mixes)) == (before, 0)
        assert all(not generation.status.holds for generation in w.registry.alive())

    play(scenario)


def test_parts_of_other_widths_are_refused(play: Play) -> None:
    async def scenario(w: World) -> None:
        await three(w)
        wide = Experts(torch.ones(1, 5), torch.ones(4, 1), (1,))
        native.write(
            Adapter("lora", {SITE: LinearMixture(wide, Constant((1.0,)))}), w.folder / "wide"
        )
        await w.load("wide", Source(w.folder / "wide", "wide"))
        with pytest.raises(ShapeError, match=r"found width (4|5)"):
            await w.registry.mixes.lease({"a": 1.0, "wide": 0.5}, object())

    play(scenario)


def test_weights_of_equal_adapters_that_cancel_out_are_refused(play: Play) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        await w.load("same", 1)
        with pytest.raises(BadMixError, match="cancel out"):
            await w.registry.mixes.lease({"a": 0.5, "same": -0.5}, object())

    play(scenario)


def test_a_part_whose_copy_is_lost_is_named(play: Play) -> None:
    async def scenario(w: World) -> None:
        await three(w)
        shutil.rmtree(w.store.path(adapter(2).digest))
        with pytest.raises(StoreError, match=r"^b: its copy in the store is damaged"):
            await w.registry.mixes.lease({"a": 1.0, "b": 0.5}, object())
        (await w.registry.mixes.lease({"a": 1.0, "c": 0.5}, object())).release()

    play(scenario)


@pytest.mark.parametrize("way", ["replace", "unload"])
def test_a_part_that_goes_while_its_mix_is_made_takes_it_along(play: Play, way: str) -> None:
    """Whoever asked before has its answer from it; then nothing of it is left."""

    async def scenario(w: World) -> None:
        await three(w)
        async with w.registry.intake.read_budget:
            asking = asyncio.create_task(w.registry.mixes.lease({"a": 0.5, "b": 0.5}, object()))
            await let_tasks_run()
            if way == "unload":
                await w.registry.unload("a")
            else:
                replacing = asyncio.create_task(w.load("a", 4, replace=True))
                await let_tasks_run()
        lease = await asking
        if way == "replace":
            await replacing
        await let_tasks_run()
        assert lease.generation.status.draining
        assert (list(w.registry.mixes), lease.generation.digest in w.in_store()) == ([], True)
        lease.release()
        await let_tasks_run()
        assert set(w.registry.alive()) == set(w.registry)
        assert set(w.in_store()) == {generation.digest for generation in w.registry}

    play(scenario)
