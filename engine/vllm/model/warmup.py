"""Launches what a GPU backend has, over all kinds of steps, before any request can wait for it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from molehill.kernels.interface import (
    UNSERVED,
    ActivatingBackend,
    Backend,
    FfnShape,
    LinearShape,
    Run,
)


def token_counts(most: int) -> list[int]:
    """Steps of every kind from 1 to `most` tokens, ascending.

    Kernels are compiled anew for an integer that is 1 or a multiple of 16, and launched otherwise
    for short steps than for long ones, with limits at powers of two or multiples of 16: so each
    power of two, its neighbours, and a multiple of 16 and one that is none between two of them.
    """
    counts = {most, most - 1, most - most % 16}
    power = 1
    while power <= most:
        counts |= {power - 1, power, power + 1, power + 16, power + power // 2, power + 7}
        power *= 2
    return sorted(count for count in counts if 1 <= count <= most)


def run(
    backend: Backend,
    linears: Mapping[int, LinearShape],
    ffns: Mapping[int, FfnShape],
    most: int,
) -> None:
    """Applies the mixtures of unserved rows to zeros, for which a GPU backend launches what it
    launches for any adapter. By handle, in one order on all ranks: some sum over them.

    most: tokens of the longest step. Needs the inputs and outputs of such a step, which are freed.
    """
    room = _Room(linears, ffns, most)
    of_gate_up = {shape.gate_up: handle for handle, shape in ffns.items()}
    with torch.inference_mode():
        for tokens in token_counts(most):
            backend.begin_step([Run(UNSERVED, 0, tokens)])
            for handle, shape in linears.items():
                out = room.out(tokens, shape.out_features)
                backend.linear(out, room.x(tokens, shape.in_features), handle)
                if handle in of_gate_up:
                    ffn = of_gate_up[handle]
                    h = room.x(tokens, ffns[ffn].intermediate)
                    if ffns[ffn].activation is None:
                        backend.ffn(h, out, ffn)
                    else:
                        assert isinstance(backend, ActivatingBackend), "as it was registered"
                        backend.activate(h, out, ffn)
        backend.begin_step([])


class _Room:
    """Zeros for the widest input and output, at the alignment of torch's allocations."""

    def __init__(
        self, linears: Mapping[int, LinearShape], ffns: Mapping[int, FfnShape], most: int
    ) -> None:
        shapes = list(linears.values())
        widths = [shape.in_features for shape in shapes]
        widths += [shape.intermediate for shape in ffns.values()]
        outputs = max(shape.out_features for shape in shapes)
        dtype, device = shapes[0].dtype, shapes[0].device
        self._x: Tensor = torch.zeros(most * max(widths), dtype=dtype, device=device)
        self._out: Tensor = torch.zeros(most * outputs, dtype=dtype, device=device)

    def x(self, tokens: int, width: int) -> Tensor:
        return self._x[: tokens * width].view(tokens, width)

    def out(self, tokens: int, width: int) -> Tensor:
        return self._out[: tokens * width].view(tokens, width)
