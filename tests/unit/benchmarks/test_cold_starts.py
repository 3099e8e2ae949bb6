"""The benchmark of cold starts: its sums; a run of it needs a server and is no test."""

import pytest

pytest.importorskip("httpx", reason="the dev extra is not installed")

from molehill.benchmarks.cold_starts import report


def test_what_the_simulation_is_fed_with_is_what_a_tier_takes_more_than_the_one_before():
    by_tier = {"worker": [0.1, 0.3, 0.1], "host": [0.15, 0.14, 0.2], "disk": [0.4]}
    lines = report(by_tier, {"directory": [0.5], "upload": [0.7, 0.9]})
    assert lines[0] == "first token from worker    median    100 ms (100 to 300, 3 times)"
    assert lines[-2] == "load from upload    median    800 ms (700 to 900, 2 times)"
    assert lines[-1] == "--read-ms 250 --install-ms 50"
