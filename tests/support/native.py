"""The Triton backend on a real GPU, in tests whose tensors are on the CPU."""

from dataclasses import replace

import torch
from torch import Tensor

from molehill.kernels.interface import LinearShape, Trace
from molehill.kernels.triton.backend import TritonBackend
from molehill.kernels.triton.launch_config import Capacity

NO_GPU = "no CUDA device on this machine"


def is_here() -> bool:
    return torch.cuda.is_available()


class NativeTritonBackend(TritonBackend):
    """Takes what it is given to the GPU and brings back what it has changed there."""

    def __init__(self, capacity: Capacity) -> None:
        super().__init__(torch.device("cuda"), capacity)

    def register_linear(self, shape: LinearShape) -> int:
        reduce = shape.reduce
        if reduce is not None:
            # Of several ranks in one process: a test adds the others' logits, on the CPU.
            shape = replace(shape, reduce=lambda logits: reduce(logits.cpu()).cuda())
        return super().register_linear(shape)

    def begin_linear(self, x: Tensor, handle: int) -> None:
        super().begin_linear(x.cuda(), handle)

    def finish_linear(self, out: Tensor, x: Tensor, handle: int) -> None:
        there = out.cuda()
        super().finish_linear(there, x.cuda(), handle)
        out.copy_(there)

    def ffn(self, h: Tensor, gate_up: Tensor, handle: int) -> None:
        there = h.cuda()
        super().ffn(there, gate_up.cuda(), handle)
        h.copy_(there)

    def activate(self, h: Tensor, gate_up: Tensor, handle: int) -> None:
        there = h.cuda()
        super().activate(there, gate_up.cuda(), handle)
        h.copy_(there)

    def trace(self, enabled: bool) -> list[Trace]:
        return [
            Trace(t.site, t.probabilities.cpu(), t.weights.cpu(), t.entropy.cpu())
            for t in super().trace(enabled)
        ]

    def captured(self) -> Tensor:
        return super().captured().cpu()
