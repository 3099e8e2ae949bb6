"""The C++ backend in its variants."""

from collections.abc import Sequence
from contextlib import contextmanager
from functools import cache

import torch

from molehill.kernels.cpu import CpuBackend
from molehill.kernels.cpu.backend import ISAS
from molehill.kernels.interface import LinearPiece, LinearShape, SlotWeights


@cache
def usable_isas():
    """Instruction sets that this processor runs; the first call may compile the library."""
    result = []
    for isa in ISAS:
        try:
            result.append(CpuBackend(isa=isa).isa)
        except ValueError:
            continue
    return result


@contextmanager
def thread_count(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


def one_linear(inputs: int, out: int, pieces: Sequence[LinearPiece], dtype, isa=None):
    backend = CpuBackend(isa=isa)
    handle = backend.register_linear(LinearShape("linear", inputs, out, dtype))
    backend.store(0, SlotWeights({handle: pieces}, {}))
    return backend, handle
