import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def golden() -> Path:
    """`tiny-llama` and `cases/<name>`."""
    return Path(__file__).parent / "data" / "golden"
