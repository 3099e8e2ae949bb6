"""Stands in for the streams of a device, where a test's device has none."""

from collections.abc import Callable

from torch import Tensor


class OneStream:
    """Streams of a device or mode that has but one."""

    def run(self, base: Callable[[], Tensor], beside: Callable[[], None]) -> Tensor:
        y = base()
        beside()
        return y
