"""Which workers' answers tell a request's routing."""

from molehill.api.vllm.routed_calls import of_stages, usage_of
from molehill.engine.vllm.protocol import Routes, RoutesReply, RoutingUsage


def reply(stage: int, *parts: Routes, tokens: int = 0) -> RoutesReply:
    usage = RoutingUsage(tokens, tokens * 2, tokens * 3, tokens * 4)
    return RoutesReply(stage, ((f"layers.{stage}", 0),), 2, list(parts), usage)


def test_the_engine_that_has_the_request_tells_its_routing() -> None:
    """Of two engines of two stages of two ranks, the second has it."""
    known = Routes(0, b"experts", b"weights")
    nothing = [reply(stage) for stage in (0, 0, 1, 1)]
    there = [reply(stage, known) for stage in (0, 0, 1, 1)]
    chosen = of_stages([*nothing, *there])
    assert [id(result) for result in chosen] == [id(there[0]), id(there[2])]


def test_two_engines_that_have_one_sample_each_tell_both() -> None:
    """Of two stages of two ranks each."""
    replies = [
        reply(stage, Routes(index, b"", b""), tokens=5 + index)
        for index in (1, 0)
        for stage in (0, 0, 1, 1)
    ]
    chosen = of_stages(replies)
    assert [id(result) for result in chosen] == [id(replies[i]) for i in (0, 2, 4, 6)]
    assert usage_of(chosen) == RoutingUsage(11, 44, 66, 88)


def test_a_bill_counts_a_token_once_and_every_stages_routers() -> None:
    known = Routes(0, b"", b"")
    usage = usage_of([reply(stage, known, tokens=5) for stage in (0, 1)])
    assert usage == RoutingUsage(5, 20, 30, 40)
    assert usage_of([]) == RoutingUsage()
