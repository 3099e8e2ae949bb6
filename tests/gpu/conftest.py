"""What runs on a CUDA device only. Without one all of it is skipped."""

import pytest
from support import native


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    if not native.is_here():
        pytest.skip(native.NO_GPU)
