"""The rows of a step that are one slot's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from molehill.kernels.interface import Run

Rows = slice | Tensor


def run_rows(runs: Sequence[Run], slot: int, most: int, device: torch.device) -> Rows:
    """Of `most` that there are; a slice where they lie in one run."""
    spans = [(min(run.start, most), min(run.stop, most)) for run in runs if run.slot == slot]
    if len(spans) == 1:
        return slice(*spans[0])
    return torch.cat([torch.arange(*ends) for ends in spans]).to(device)
