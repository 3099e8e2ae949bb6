"""When a thing is tried again, by a clock that stands still until it is moved."""

import pytest

from molehill.api.adapters import backoff
from molehill.api.adapters.backoff import Backoff


def test_pauses_double_up_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(backoff.time, "monotonic", lambda: now)
    tries = Backoff(2.0, 7.0)
    assert (tries.is_due, tries.seconds_left) == (True, 0.0)
    assert [tries.postpone() for _ in range(4)] == [2.0, 4.0, 7.0, 7.0]
    assert (tries.is_due, tries.seconds_left) == (False, 7.0)
    now = 106.5
    assert (tries.is_due, tries.seconds_left) == (False, 0.5)
    now = 107.0
    assert tries.is_due
    tries.postpone()
    tries.reset()
    assert tries.is_due
    assert tries.postpone() == 2.0
