"""The sums of the benchmark of activated adapters; a run of it needs a server and is no test."""

from molehill.benchmarks.activated import BLOCK, Chains, FirstTokens, lengths, report


def seconds(plain: float, activated: float) -> dict[str, float]:
    return {"plain": plain, "activated": activated}


def test_ratios_are_of_one_repetition_and_their_median_is_told() -> None:
    cached = {"plain": 0, "activated": 1792}
    turns = [seconds(2.0, 0.1), seconds(3.0, 0.1), seconds(4.0, 0.4)]
    first, chain, summed, *prompts = report(
        [FirstTokens(1804, turn, cached) for turn in turns],
        [Chains(seconds(15.0, 0.5), seconds(14.0, 0.7))],
    )
    assert first == (
        "time to first token: plain 3.000 s, activated 0.100 s; plain / activated: median 20.0 "
        "(10.0 to 30.0, 3 repetitions)"
    )
    assert chain.startswith("chain of 5: plain 15.000 s, activated 0.500 s; ")
    assert "median 20.0 (20.0 to 20.0, 1 repetitions)" in summed
    assert prompts == ["prompt of 1804 tokens, cached: plain 0, activated 1792"] * 3
    assert report([], []) == []


def test_documents_are_spread_over_a_block() -> None:
    result = lengths(1800, 4, BLOCK)
    assert sum(result) / 4 == 1800
    assert len({length % BLOCK for length in result}) == 4
    assert max(result) - min(result) < BLOCK
    assert lengths(1800, 0, BLOCK) == []
