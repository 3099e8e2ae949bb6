"""Ranks that load an adapter together or not at all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.distributed import ProcessGroup


class OtherRankError(RuntimeError):
    """This rank could have served the adapter, another one refused."""


class RankAgreement:
    """The tensor-parallel ranks of a worker's stage, or the pipeline stages of its rank.

    group: for tensors on the CPU; it is not used where there is one rank.
    """

    def __init__(self, ranks: int, group: ProcessGroup | None) -> None:
        self.ranks = ranks
        self._group = group

    @property
    def is_alone(self) -> bool:
        return self.ranks == 1

    @contextmanager
    def all_or_none(self, undo: Callable[[], object] | None = None) -> Iterator[None]:
        """Either the body succeeds on every rank, or it raises on every one: its own error where it
        failed, OtherRankError, with what another rank found, where only others did.

        undo: called before OtherRankError is raised.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failures = [None if error is None else str(error)]
        if not self.is_alone:
            failures *= self.ranks
            torch.distributed.all_gather_object(failures, failures[0], group=self._group)
        if error is not None:
            raise error
        found = next((text for text in failures if text is not None), None)
        if found is not None:
            if undo is not None:
                undo()
            raise OtherRankError(f"another rank could not load the adapter: {found}")
