"""What an adapter's limits let through, by a clock that the test holds."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support.world import World

from molehill.api.adapters.errors import BadLimitsError, LimitReachedError
from molehill.api.adapters.lease import Lease
from molehill.api.adapters.token_bucket import TokenBucket
from molehill.api.adapters.traffic_limits import NO_LIMITS, TrafficLimits, check_limits


class Clock:
    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def play(folder: Path, scenario: Callable[[World, Clock], Awaitable[None]]) -> None:
    clock = Clock()

    async def run() -> None:
        await asyncio.wait_for(scenario(World(folder, clock=clock), clock), 20)

    asyncio.run(run())


def admit(w: World, name: str, request: object | None = None) -> Lease:
    return w.registry.admit(w.served[name], request or object())


def refused(w: World) -> dict[tuple[str, str], float]:
    """Refusals by adapter and reason, where there are any."""
    return {
        (sample.labels["adapter"], sample.labels["reason"]): sample.value
        for metric in w.registry.events.collect()
        if metric.name == "molehill_adapter_limit_refusals"
        for sample in metric.samples
        if sample.value
    }


def test_a_bucket_is_overdrawn_and_filled_again() -> None:
    clock = Clock()
    bucket = TokenBucket(10.0, clock)
    assert (bucket.level, bucket.wait_seconds) == (10.0, 0)
    bucket.take(35)
    # Owes 25: after 2 s it still owes 5, after 2.5 s it has none, after 3 s it has 5.
    assert (bucket.level, bucket.wait_seconds) == (-25.0, 3)
    clock.seconds += 2.5
    assert (bucket.level, bucket.wait_seconds) == (0.0, 1)
    clock.seconds += 0.5
    assert (bucket.level, bucket.wait_seconds) == (5.0, 0)
    clock.seconds += 100
    assert bucket.level == 10.0


def test_after_the_wait_that_it_names_a_bucket_has_tokens() -> None:
    for owed in range(60):
        clock = Clock()
        bucket = TokenBucket(7.0, clock)
        bucket.take(7 + owed)
        seconds = bucket.wait_seconds
        clock.seconds += seconds - 1
        assert bucket.level <= 0
        clock.seconds += 1
        assert bucket.level > 0


def test_requests_over_the_limit_are_refused_until_one_ends(tmp_path: Path) -> None:
    async def scenario(w: World, _: Clock) -> None:
        await w.load("a", 1, limits=TrafficLimits(requests_in_flight=2))
        await w.load("b", 2)
        first, second = admit(w, "a"), admit(w, "a")
        shared = first.share()
        with pytest.raises(LimitReachedError, match="found 2 in flight, expected at most 2") as at:
            admit(w, "a")
        assert (at.value.kind, at.value.retry_after) == ("adapter_limit_reached", 1)
        # Of the same request, and of another adapter.
        admit(w, "a", first.request).release()
        admit(w, "b").release()
        first.release()
        with pytest.raises(LimitReachedError):
            admit(w, "a")
        shared.release()
        admit(w, "a").release()
        second.release()
        assert refused(w) == {("a", "requests_in_flight"): 2.0}

    play(tmp_path, scenario)


def test_tokens_over_the_rate_are_paid_before_the_next_request(tmp_path: Path) -> None:
    async def scenario(w: World, clock: Clock) -> None:
        await w.load("a", 1, limits=TrafficLimits(tokens_per_second=100))
        lease = admit(w, "a")
        lease.charge(60)
        admit(w, "a").release()
        lease.charge(290)
        with pytest.raises(LimitReachedError, match=r"'a': limits\.tokens_per_second: ") as at:
            admit(w, "a")
        assert at.value.retry_after == 3
        # What runs goes on, also where its request asks again.
        admit(w, "a", lease.request).release()
        clock.seconds += 3
        admit(w, "a").release()
        assert refused(w) == {("a", "tokens_per_second"): 1.0}
        lease.release()

    play(tmp_path, scenario)


def test_limits_are_the_names_whatever_weights_it_serves(tmp_path: Path) -> None:
    async def scenario(w: World, clock: Clock) -> None:
        limits = TrafficLimits(1, 10.0)
        await w.load("a", 1, limits=limits)
        old = admit(w, "a")
        old.charge(100)
        replaced = await w.load("a", 2, replace=True)
        assert replaced.status == "replaced"
        assert replaced.generation.status.traffic.limits == limits
        with pytest.raises(LimitReachedError, match="found 1 in flight"):
            admit(w, "a")
        old.release()
        with pytest.raises(LimitReachedError) as at:
            admit(w, "a")
        assert at.value.retry_after == 10
        await w.registry.unload("a")
        await w.load("a", 2)
        assert w.registry.names.current("a").status.traffic.limits == NO_LIMITS
        admit(w, "a").release()

    play(tmp_path, scenario)


def test_limits_change_without_a_load_of_weights(tmp_path: Path) -> None:
    async def scenario(w: World, _: Clock) -> None:
        await w.load("a", 1, limits=TrafficLimits(1, 10.0))
        lease, calls = admit(w, "a"), list(w.engine.calls)
        lease.charge(40)
        same = await w.load("a", 1, limits=TrafficLimits(1, 10.0))
        kept = await w.load("a", 1)
        changed = await w.load("a", 1, limits=TrafficLimits(None, 30.0))
        assert [same.status, kept.status, changed.status] == [
            "unchanged",
            "unchanged",
            "limits_changed",
        ]
        # 30 tokens are owed still, at three times the rate.
        with pytest.raises(LimitReachedError) as at:
            admit(w, "a")
        assert at.value.retry_after == 2
        lifted = await w.load("a", 1, limits=NO_LIMITS)
        assert (lifted.status, lifted.generation) == ("limits_changed", changed.generation)
        for other in [admit(w, "a") for _ in range(3)]:
            other.release()
        lease.charge(10)
        lease.release()
        assert w.engine.calls == calls

    play(tmp_path, scenario)


def test_a_refused_load_leaves_the_limits_as_they_were(tmp_path: Path) -> None:
    async def scenario(w: World, _: Clock) -> None:
        await w.load("a", 1, limits=TrafficLimits(1))
        w.engine.refusal = "it is broken"
        with pytest.raises(Exception, match="it is broken"):
            await w.load("a", 2, replace=True, limits=TrafficLimits(5))
        assert w.registry.names.current("a").status.traffic.limits == TrafficLimits(1)

    play(tmp_path, scenario)


def test_a_mix_by_request_is_held_to_the_limits_of_the_names_in_it(tmp_path: Path) -> None:
    async def scenario(w: World, _: Clock) -> None:
        await w.load("a", 1, limits=TrafficLimits(tokens_per_second=10))
        await w.load("b", 2, limits=TrafficLimits(requests_in_flight=1))
        weights = {"a": 0.5, "b": 1.0}
        await w.registry.load_mix("ab", weights)
        await w.registry.load_mix("limited", {"b": 3.0})
        await w.load("other", 3)
        # Equal to what a name serves, made anew, and one adapter alone.
        for mix in (weights, {"b": 2.0, "other": 1.0}, {"b": 1.0}):
            running = await w.registry.mixes.lease(mix, object())
            with pytest.raises(LimitReachedError, match=r"'b': limits\.requests_in_flight"):
                admit(w, "b")
            with pytest.raises(LimitReachedError):
                await w.registry.mixes.lease({"b": 1.0}, object())
            # A name of its own.
            admit(w, "ab").release()
            admit(w, "a").release()
            running.release()
            admit(w, "b").release()
        running = await w.registry.mixes.lease(weights, object())
        running.charge(10)
        running.release()
        with pytest.raises(LimitReachedError, match=r"'a': limits\.tokens_per_second"):
            admit(w, "a")
        admit(w, "b").release()

    play(tmp_path, scenario)


def test_limits_as_json() -> None:
    assert check_limits(None) == check_limits({}) == NO_LIMITS
    assert check_limits({"requests_in_flight": 3}) == TrafficLimits(3, None)
    assert check_limits({"tokens_per_second": 2.5, "requests_in_flight": None}) == TrafficLimits(
        None, 2.5
    )
    assert check_limits({"tokens_per_second": 7}) == TrafficLimits(None, 7.0)


@pytest.mark.parametrize("field", ["requests_in_flight", "tokens_per_second"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "0"),
        (-1, "-1"),
        (True, "True"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (10**10, "10000000000"),
        pytest.param(1 << 50_000, "a number of 50001 bits", id="huge"),
        ("4", "'4'"),
        ([4], r"\[4\]"),
    ],
)
def test_what_is_no_limit_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(BadLimitsError, match=rf"^limits\.{field}: found {message}, expected a "):
        check_limits({field: value})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "limits: found 3, expected requests_in_flight, tokens_per_second, tenant and"),
        ({"requests": 3}, "limits: found an unknown field 'requests', expected requests_in_flight"),
        ({"requests_in_flight": 2.5}, "limits.requests_in_flight: found 2.5, expected a whole"),
    ],
)
def test_what_are_no_limits_is_told(value: Any, message: str) -> None:
    with pytest.raises(BadLimitsError) as error:
        check_limits(value)
    assert str(error.value).startswith(message)
