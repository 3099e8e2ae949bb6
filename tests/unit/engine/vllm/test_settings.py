"""Settings arrive at a worker as they left, or are refused by name."""

from typing import Any

import pytest

from molehill.engine.adapter.base_model import Limits
from molehill.engine.vllm.settings import Settings


def test_they_travel_as_plain_values() -> None:
    settings = Settings(memory=5, limits=Limits(rank=3), merge_tolerance=0.5, merged_base="folder")
    config = {"other": 1, **settings.to_config()}
    assert Settings.from_config(config) == settings
    assert Settings.from_config(None) == Settings.from_config({}) == Settings()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"mem": 1}, "mem: Unexpected keyword argument, found 1"),
        ({"memory": "much"}, "memory: Input should be a valid integer.*, found 'much'"),
        ({"limits": {"rang": 1}}, r"limits\.rang: Unexpected keyword argument, found 1"),
        ({"limits": {"rank": None}}, r"limits\.rank: Input should be a valid integer, found None"),
    ],
)
def test_another_name_or_type_is_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^additional_config\['molehill'\]: {named}$"):
        Settings.from_config({"molehill": given})
