"""The benchmark of two tenants: its sums; a run of it needs a server and is no test."""

from collections import Counter

import pytest

pytest.importorskip("httpx", reason="the dev extra is not installed")

from molehill.benchmarks import tenants
from molehill.benchmarks.tenants import Spell, compared


def spell(first, gap, **flood):
    statuses = Counter({int(status.removeprefix("s")): count for status, count in flood.items()})
    return Spell([first] * 3, [gap] * 3, statuses)


def results(limited):
    return {
        "without limits": [compared(spell(0.1, 0.05), spell(0.9, 0.2, s200=40))],
        "with limits": [compared(spell(0.1, 0.05), one) for one in limited],
    }


def test_ratios_stand_beside_what_they_must_reach():
    limited = [spell(0.11, 0.06, s200=4, s429=9), spell(0.14, 0.07), spell(0.12, 0.06)]
    measured = results(limited)
    lines = tenants.report(measured)
    assert "without limits: p99 time to first token beside the flood / alone: 9.00," in lines[0]
    assert "alone: 1.20 (at most 1.5), 120 / 100 ms, median of 3" in lines[3]
    assert "alone: 1.20 (at most 1.5), 60 / 50 ms, median of 3" in lines[4]
    assert lines[5] == "with limits: of the flood 4 served, 9 refused"
    assert tenants.missed(measured) == []


def test_what_is_missed_is_named():
    assert tenants.missed(results([spell(0.16, 0.05)])) == ["first"]
    assert tenants.missed(results([spell(0.1, 0.09)])) == ["gaps"]
