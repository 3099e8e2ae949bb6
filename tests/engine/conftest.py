"""One engine for all tests of a module."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.engines import engine


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    with engine() as llm:
        yield llm
