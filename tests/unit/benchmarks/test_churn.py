"""The churn benchmark's sums; a run of it needs a server and is no test."""

import pytest

pytest.importorskip("httpx", reason="the dev extra is not installed")

from molehill.benchmarks import churn
from molehill.benchmarks.client import PROMPT, Client, KnownAnswer, decided


def test_gaps_that_reach_out_of_a_spell_do_not_count():
    streams = churn.SteadyStreams(client=None)
    # (end, seconds): before, across the start, within, across the end.
    streams.gaps = [(1.0, 0.5), (2.2, 0.5), (2.6, 0.4), (4.9, 0.9), (5.1, 0.2)]
    assert streams.between(2.0, 5.0) == [0.4, 0.9]


def test_a_percentile_is_one_of_the_values_or_between_two():
    values = [float(n) for n in range(1, 102)]
    assert churn.percentile(values, 50) == 51
    assert churn.percentile(values, 99) == 100


@pytest.fixture
def measured():
    return {
        "itl": [{"ratio": 1.1}, {"ratio": 1.3}, {"ratio": 1.2}],
        "first_token_seconds": [0.5, 0.7, 0.6],
        "throughput": [{"ratio": 0.97, "registered": 1000}, {"ratio": 1.01, "registered": 1000}],
        "requests": {
            "requests": 90,
            "failed": 2,
            "why": {"500": 2},
            "tokens_compared": 321,
            "rounds": 7,
        },
        "adapter_bytes": 10_000_000,
    }


def test_the_report_says_what_was_found_beside_what_must_be_reached(measured):
    latency, first, speed, failed = churn.report(measured)
    assert "median 1.200, best 1.100, worst 1.300 of 3 (at most 1.25)" in latency
    assert "10.0 MB" in first
    assert "median 0.600 s, best 0.500, worst 0.700 of 3 (under 1.0 s)" in first
    assert "1000 registered / 1: median 0.9900, best 1.0100, worst 0.9700 of 2" in speed
    assert "2 of 90 in 7 rounds of churn (at most 0) {'500': 2}, 321 tokens compared" in failed


def test_prompts_differ():
    client = Client(http=None, base="base")
    prompts = {tuple(client.body("base", 1)["prompt"]) for _ in range(400)}
    assert len(prompts) == 400
    assert all(len(prompt) == PROMPT for prompt in prompts)


def test_every_limit_that_is_not_reached_is_named(measured):
    assert churn.missed(measured, quick=False) == ["failed"]
    measured["itl"][1:] = [{"ratio": 1.3}, {"ratio": 1.26}]
    measured["throughput"][1]["ratio"] = 0.98
    measured["first_token_seconds"] = [1.1, 1.1, 0.1]
    names = ["itl_ratio", "first_token_seconds", "throughput_ratio", "failed"]
    assert churn.missed(measured, quick=False) == names


def test_a_quick_run_fails_by_its_failures_alone(measured):
    measured["first_token_seconds"] = [9.0]
    assert churn.missed(measured, quick=True) == ["failed"]
    measured["requests"]["failed"] = 0
    assert churn.missed(measured, quick=True) == []


def test_an_answer_is_known_up_to_the_first_near_tie():
    likely = [{"a": -0.1, "b": -0.1 - lead} for lead in (2.0, 0.6, 0.4, 3.0)]
    assert decided([5, 6, 7, 8], likely) == [5, 6]
    known = KnownAnswer([1], [5, 6])
    assert known.agrees([5, 6, 9, 9])
    assert not known.agrees([5, 7, 7, 8])
