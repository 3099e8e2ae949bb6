"""The gate weights of a step, at a fixed address: a captured graph writes them when it replays."""

from collections.abc import Sequence

import torch
from torch import Tensor

from molehill.kernels.triton.launch_config import Capacity, launch_config_for


class CapturedGates:
    """What the gate kernel traces, by linear: probabilities, then weights, of each router row."""

    def __init__(self, linears: int, capacity: Capacity, device: torch.device) -> None:
        self._gates = launch_config_for(capacity.tokens, capacity).max_gates
        self._memory = torch.zeros(linears, capacity.tokens, 2 * self._gates, device=device)

    def of(self, handle: int, tokens: int) -> Tensor:
        """What the kernel of one linear fills, float32 `[tokens, 2 gates]`."""
        return self._memory[handle, :tokens]

    def weights(self, handle: int, rows: Sequence[int], gate: int, experts: int) -> Tensor:
        """Those of one router, `[rows, experts]`. gate: its first router row."""
        columns = slice(self._gates + gate, self._gates + gate + experts)
        return self._memory[handle, list(rows), columns]
