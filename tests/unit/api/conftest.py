"""Scenarios of an adapter registry, played in a world of their own."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from support.world import Play, Scenario, World


@pytest.fixture
def play_in(tmp_path: Path) -> Callable[[int, Scenario], None]:
    """Runs a scenario in a world of so many slots; afterwards no task may be left that waits."""

    async def run(slots: int, scenario: Scenario) -> None:
        await asyncio.wait_for(scenario(World(tmp_path, slots)), 20)

    return lambda slots, scenario: asyncio.run(run(slots, scenario))


@pytest.fixture
def play(play_in: Callable[[int, Scenario], None]) -> Play:
    return lambda scenario: play_in(4, scenario)
