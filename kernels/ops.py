"""The two custom ops that a model's forward calls, and the backend behind them.

Opaque to torch.compile. The layer is named by a one-element int64 CPU tensor, not by a Python
number, so that the graphs of all layers are the same graph.
"""

import torch
from torch import Tensor

from molehill.kernels.backend import Backend

_active: list[Backend] = []


def install(backend: Backend) -> None:
    """Makes `backend` the one behind the ops of this process, in place of any earlier one."""
    _active[:] = [backend]


@torch.library.custom_op("molehill::linear", mutates_args=("out",))
def linear(out: Tensor, x: Tensor, handle: Tensor) -> None:
    """Backend.linear as an op."""
    _active[0].linear(out, x, int(handle))


@torch.library.custom_op("molehill::ffn", mutates_args=("h",))
def ffn(h: Tensor, gate_up: Tensor, handle: Tensor) -> None:
    """Backend.ffn as an op."""
    _active[0].ffn(h, gate_up, int(handle))


@linear.register_fake
def _(out: Tensor, x: Tensor, handle: Tensor) -> None: ...


@ffn.register_fake
def _(h: Tensor, gate_up: Tensor, handle: Tensor) -> None: ...
