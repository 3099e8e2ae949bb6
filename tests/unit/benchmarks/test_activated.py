"""The sums of the benchmark of activated adapters; a run of it needs a server and is no test."""

from molehill.benchmarks.activated import Turn, report


def turn(plain: float, activated: float) -> Turn:
    seconds = {"plain": plain, "activated": activated}
    chain = {kind: 5 * value for kind, value in seconds.items()}
    return Turn(1804, seconds, {"plain": 0, "activated": 1792}, chain, seconds)


def test_ratios_are_of_one_repetition_and_their_median_is_told() -> None:
    first, chain, _, *cached = report([turn(2.0, 0.1), turn(3.0, 0.1), turn(4.0, 0.4)])
    assert first == (
        "time to first token: plain 3.000 s, activated 0.100 s; plain / activated: median 20.0 "
        "(10.0 to 30.0, 3 repetitions)"
    )
    assert chain.startswith("chain of 5: plain 15.000 s, activated 0.500 s")
    assert cached == ["prompt of 1804 tokens, cached: plain 0, activated 1792"] * 3
