"""One router of a slot, and where its choice is in a captured row (molehill.kernels.capture)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RoutedSite:
    """One router of a slot. heads: that decide one by one, 1 of a router that reads all of its
    input. most: experts that one decision has at most. column: the first of its heads * experts in
    a captured row."""

    name: str
    experts: int
    heads: int
    most: int
    column: int

    @property
    def stop(self) -> int:
        """The column after its last."""
        return self.column + self.heads * self.experts
