"""Memory for adapters that follows their real rank rows.

One buffer, allocated once at a fixed address, so that CUDA graphs hold while adapters come and go.
A matrix of rank rows (A and a router by in-width, B transposed by out-width) owns one contiguous
extent; an adapter's extents are reserved all at once or not at all. Not by torch's allocator: its
blocks lie anywhere, while kernels take offsets from one address that a graph has captured.

Example, in units of ALIGNMENT bytes: of 10 free units, `reserve` of 6 and 3 leaves the run [9, 10).
Releasing the 6 leaves [0, 6) and [9, 10); a 4 then fits, a 7 does not although 7 are free; once
the 3 is released too, the whole is one run again.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from molehill.kernels.interface import CapacityError

# Bytes. Starts and sizes of extents are multiples, so that rows can be read in whole cache lines.
ALIGNMENT = 256


class ArenaFullError(CapacityError):
    """An adapter that does not fit in what is free.

    needed: bytes of the whole adapter. free, largest: free bytes in all and in one run. budget:
    bytes of the arena.
    """

    def __init__(self, needed: int, free: int, largest: int, budget: int) -> None:
        self.needed, self.free, self.largest, self.budget = needed, free, largest, budget
        room = f"at most {free} of {budget} (largest run {largest})"
        super().__init__("adapter memory", f"{needed} bytes", room)

    def __reduce__(self) -> tuple[type["ArenaFullError"], tuple[int, int, int, int]]:  # type: ignore[override]
        return type(self), (self.needed, self.free, self.largest, self.budget)


class Extent(NamedTuple):
    """Bytes `[start, start + size)` of an arena."""

    start: int
    size: int


class FreeList:
    """Free runs of `[0, size)`: best fit, neighbours joined on release."""

    def __init__(self, size: int) -> None:
        self.free = 0
        self._by_size: list[tuple[int, int]] = []
        self._size_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}
        self._insert(0, size)

    @property
    def largest(self) -> int:
        return self._by_size[-1][0] if self._by_size else 0

    @property
    def runs(self) -> list[Extent]:
        """The free runs by their start."""
        return [Extent(start, self._size_at[start]) for start in sorted(self._size_at)]

    def allocate(self, size: int) -> int | None:
        """Start of a run of `size`, cut from the smallest that is large enough; None if none is."""
        i = bisect_left(self._by_size, (size, 0))
        if i == len(self._by_size):
            return None
        free, start = self._by_size[i]
        self._remove(start)
        self._insert(start + size, free - size)
        return start

    def free_run(self, start: int, size: int) -> None:
        """Puts a run back. It must have been taken, as a whole, and not been given back."""
        before = self._start_before.get(start)
        if before is not None:
            start, size = before, size + self._remove(before)
        if start + size in self._size_at:
            size += self._remove(start + size)
        self._insert(start, size)

    def _insert(self, start: int, size: int) -> None:
        if size:
            insort(self._by_size, (size, start))
            self._size_at[start] = size
            self._start_before[start + size] = start
            self.free += size

    def _remove(self, start: int) -> int:
        size = self._size_at.pop(start)
        del self._start_before[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        self.free -= size
        return size


class Reservation:
    """Extents taken for one adapter. A `with` block commits at its end and aborts on an error."""

    def __init__(self, arena: "Arena", extents: tuple[Extent, ...]) -> None:
        self.extents = extents
        self._arena = arena
        self._open = True

    @property
    def num_bytes(self) -> int:
        return sum(extent.size for extent in self.extents)

    def commit(self) -> None:
        """From here on only `Arena.release` frees the extents."""
        self._open = False

    def abort(self) -> None:
        """Frees the extents, unless they were committed or aborted before."""
        if self._open:
            self._open = False
            self._arena.release(self.extents)

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if error is None:
            self.commit()
        else:
            self.abort()


class Arena:
    """`budget` bytes on `device`, rounded down to ALIGNMENT.

    Raises ValueError for a budget under one ALIGNMENT.
    """

    def __init__(self, budget: int, device: torch.device) -> None:
        self.budget = budget // ALIGNMENT * ALIGNMENT
        if self.budget <= 0:
            raise ValueError(f"adapter memory: found {budget} bytes, expected at least {ALIGNMENT}")
        self._bytes = torch.zeros(self.budget, dtype=torch.uint8, device=device)
        self._free = FreeList(self.budget)

    @property
    def free_bytes(self) -> int:
        return self._free.free

    @property
    def largest_free(self) -> int:
        return self._free.largest

    def reserve(self, sizes: Sequence[int]) -> Reservation:
        """Takes one extent per size in bytes, in that order; of size 0 where nothing is needed.

        Raises ArenaFullError, and takes nothing, unless all of them fit.
        """
        rounded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        needed, free, largest = sum(rounded), self.free_bytes, self.largest_free
        taken: dict[int, Extent] = {}
        # Large ones first: they have the fewest runs to choose from.
        for i in sorted(range(len(rounded)), key=lambda i: -rounded[i]):
            start = self._free.allocate(rounded[i]) if rounded[i] else 0
            if start is None:
                self.release(tuple(taken.values()))
                raise ArenaFullError(needed, free, largest, self.budget)
            taken[i] = Extent(start, rounded[i])
        return Reservation(self, tuple(taken[i] for i in range(len(rounded))))

    def release(self, extents: Sequence[Extent]) -> None:
        """Frees committed extents. What runs on the device may still read them: later writes must
        be ordered behind it on the same stream."""
        for start, size in extents:
            if size:
                self._free.free_run(start, size)

    def view(self, dtype: torch.dtype) -> Tensor:
        """The whole buffer as a flat tensor; extent starts in elements are `start // itemsize`."""
        return self._bytes.view(dtype)

    def rows(self, extent: Extent, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
        """The matrix `[rows, width]` at the start of an extent, to be written."""
        first = extent.start // dtype.itemsize
        return self.view(dtype)[first : first + shape[0] * shape[1]].view(shape)
