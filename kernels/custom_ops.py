"""The custom ops in front of a Python backend and of MoeBlocks, which a model's forward calls.

Opaque to torch.compile. The layer is named by a one-element int64 CPU tensor, not by a Python
number, so that the graphs of all layers are the same graph. A backend may bring ops of its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from molehill.kernels.interface import Backend

Experts = Callable[[Tensor, Tensor, Tensor, int], Tensor]

_active: list[Backend] = []
_experts: list[Experts] = []
_library = torch.library.Library("molehill", "DEF")
_library.define("linear(Tensor(a!) out, Tensor x, Tensor handle) -> ()")
_library.define("ffn(Tensor(a!) h, Tensor gate_up, Tensor handle) -> ()")
_library.define("experts(Tensor x, Tensor weights, Tensor chosen, Tensor handle) -> Tensor")


def install(backend: Backend) -> None:
    """Makes `backend` the one behind the ops of this process, in place of any earlier one."""
    _active[:] = [backend]


def install_experts(run: Experts) -> None:
    """Makes `run(x, weights, chosen, handle)` what stands behind the op `experts`."""
    _experts[:] = [run]


def _linear(out: Tensor, x: Tensor, handle: Tensor) -> None:
    _active[0].linear(out, x, int(handle))


def _ffn(h: Tensor, gate_up: Tensor, handle: Tensor) -> None:
    _active[0].ffn(h, gate_up, int(handle))


def _nothing(out: Tensor, x: Tensor, handle: Tensor) -> None:
    """What a traced graph sees: `out` changes, nothing is returned."""


for _name, _body in (("linear", _linear), ("ffn", _ffn)):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"molehill::{_name}", _nothing, lib=_library)


def _run_experts(x: Tensor, weights: Tensor, chosen: Tensor, handle: Tensor) -> Tensor:
    return _experts[0](x, weights, chosen, int(handle))


def _like_x(x: Tensor, weights: Tensor, chosen: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(x)


_library.impl("experts", _run_experts, "CompositeExplicitAutograd")
torch.library.register_fake("molehill::experts", _like_x, lib=_library)
