"""The two custom ops in front of a Python backend, which a model's forward calls.

Opaque to torch.compile. The layer is named by a one-element int64 CPU tensor, not by a Python
number, so that the graphs of all layers are the same graph. A backend may bring ops of its own.
"""

import torch
from torch import Tensor

from molehill.kernels.backend import Backend

_active: list[Backend] = []
_library = torch.library.Library("molehill", "DEF")
_library.define("linear(Tensor(a!) out, Tensor x, Tensor handle) -> ()")
_library.define("ffn(Tensor(a!) h, Tensor gate_up, Tensor handle) -> ()")


def install(backend: Backend) -> None:
    """Makes `backend` the one behind the ops of this process, in place of any earlier one."""
    _active[:] = [backend]


def _linear(out: Tensor, x: Tensor, handle: Tensor) -> None:
    _active[0].linear(out, x, int(handle))


def _ffn(h: Tensor, gate_up: Tensor, handle: Tensor) -> None:
    _active[0].ffn(h, gate_up, int(handle))


def _nothing(out: Tensor, x: Tensor, handle: Tensor) -> None:
    """What a traced graph sees: `out` changes, nothing is returned."""


for _name, _body in (("linear", _linear), ("ffn", _ffn)):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"molehill::{_name}", _nothing, lib=_library)
