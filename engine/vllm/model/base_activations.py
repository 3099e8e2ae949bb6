"""The base's FFN activations inside molehill's own op: in a step with rows of adapters their launch
is that of the gate_up linear's mixtures too; one without has the base's own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from molehill.kernels import custom_ops
from molehill.kernels.interface import ActivatingBackend, BaseActivation, FfnShape, Run


class BaseActivations:
    """What the op `molehill::activation` runs."""

    def __init__(self, backend: ActivatingBackend) -> None:
        self._backend = backend
        self._activations: dict[int, Callable[[Tensor], Tensor]] = {}
        self._of_base: dict[BaseActivation, Callable[[Tensor], Tensor]] = {}
        self._is_plain = True
        self.op: Callable[..., Any] = torch.ops.molehill.activation.default
        custom_ops.install_activations(self.run)

    def add(self, handle: int, activation: BaseActivation, module: Any) -> None:
        """The activation of a registered FFN. module: vLLM's.

        FFNs of one kind share a function: its compiled code is looked up once for each object.
        """
        if activation not in self._of_base:
            self._of_base[activation] = _of_base(module)
        self._activations[handle] = self._of_base[activation]

    def begin_step(self, runs: Sequence[Run]) -> None:
        """Announces the next forward, as to the backend."""
        self._is_plain = not runs

    def warm_up(self, shapes: Sequence[tuple[FfnShape, torch.dtype, torch.device]]) -> None:
        """Compiles what plain steps run, before any graph is captured. shapes: the FFNs that have
        been added."""
        self._is_plain = True
        with torch.inference_mode():
            for shape, dtype, device in shapes:
                assert shape.activation is not None, "an FFN registered with its activation"
                gate_up = torch.zeros(2, 2 * shape.intermediate, dtype=dtype, device=device)
                # One row is compiled apart from any other number.
                for rows in (gate_up, gate_up[:1]):
                    self._of_base[shape.activation](rows)

    def run(self, gate_up: Tensor, handle: int) -> Tensor:
        """h `[..., I]` of gate_up `[..., 2 I]`, which may change."""
        if self._is_plain:
            return self._activations[handle](gate_up)
        h = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
        self._backend.activate(h.flatten(0, -2), gate_up.flatten(0, -2), handle)
        return h


def describe(name: str, module: Any) -> BaseActivation:
    """Of a vLLM activation, by its Transformers name: vLLM's kernels round before they multiply,
    what its compiler makes of the definition in torch does not."""
    return BaseActivation(name, is_rounded=module.enabled())


def _of_base(module: Any) -> Callable[[Tensor], Tensor]:
    """One launch of the base's, with the bits that its graph would have: vLLM's kernel, or its
    definition in torch, compiled by itself because no graph is compiled around it."""
    if module.enabled():
        run: Callable[[Tensor], Tensor] = module.forward
        return run
    compiled: Callable[[Tensor], Tensor] = module.maybe_compile(module.forward_native)
    return compiled
