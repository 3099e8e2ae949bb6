"""The custom ops in front of a Python backend, of MoeBlocks, of ClassifiedLinears and of
Vocabulary, which a model's forward calls.

Opaque to torch.compile. `linear` comes after the base's own GEMM, `base_linear` runs that too;
`ffn` comes after the base's activation, `activation` is in its place. The layer is named by a
one-element int64 CPU tensor, not by a Python number, so that the graphs of all layers are the same
graph. A backend may bring ops of its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from molehill.kernels.interface import Backend

RunExperts = Callable[[Tensor, Tensor, Tensor, int], Tensor]
RunLinears = Callable[[Tensor, Tensor | None, int], Tensor]
RunEmbedding = Callable[[Tensor, Tensor], None]
RunActivation = Callable[[Tensor, int], Tensor]
RunClassified = Callable[[Tensor, Tensor, int], None]

_active: list[Backend] = []
_experts: list[RunExperts] = []
_linears: list[RunLinears] = []
_embedding: list[RunEmbedding] = []
_activations: list[RunActivation] = []
_classified: list[RunClassified] = []
_library = torch.library.Library("molehill", "DEF")
_library.define("linear(Tensor(a!) out, Tensor x, Tensor handle) -> ()")
_library.define("ffn(Tensor(a!) h, Tensor gate_up, Tensor handle) -> ()")
_library.define("base_linear(Tensor x, Tensor? bias, Tensor handle, SymInt out_features) -> Tensor")
_library.define("embedding(Tensor(a!) out, Tensor ids) -> ()")
_library.define("classified(Tensor(a!) out, Tensor x, Tensor handle) -> ()")
_library.define("activation(Tensor(a!) gate_up, Tensor handle) -> Tensor")
_library.define("experts(Tensor x, Tensor weights, Tensor chosen, Tensor handle) -> Tensor")


def install(backend: Backend) -> None:
    """Makes `backend` the one behind the ops of this process, in place of any earlier one."""
    _active[:] = [backend]


def install_experts(run: RunExperts) -> None:
    """Makes `run(x, weights, chosen, handle)` what stands behind the op `experts`."""
    _experts[:] = [run]


def install_linears(run: RunLinears) -> None:
    """Makes `run(x, bias, handle)` what stands behind the op `base_linear`: a linear of the base
    with its mixtures, `y [..., out]` in the dtype of x `[..., in]`."""
    _linears[:] = [run]


def install_embedding(run: RunEmbedding) -> None:
    """Makes `run(out, ids)` what stands behind the op `embedding`: changes what the base's lookup
    made of token ids `[T]`, `out [T, hidden]`."""
    _embedding[:] = [run]


def install_activations(run: RunActivation) -> None:
    """Makes `run(gate_up, handle)` what stands behind the op `activation`: h `[..., I]` of an FFN
    from gate_up `[..., 2 I]`, which it may change."""
    _activations[:] = [run]


def install_classified(run: RunClassified) -> None:
    """Makes `run(out, x, handle)` what stands behind the op `classified`: adds to a linear's
    `out [T, out]` what experts make of x `[T, in]` by gate weights that a classifier gave."""
    _classified[:] = [run]


def _linear(out: Tensor, x: Tensor, handle: Tensor) -> None:
    _active[0].linear(out, x, int(handle))


def _ffn(h: Tensor, gate_up: Tensor, handle: Tensor) -> None:
    _active[0].ffn(h, gate_up, int(handle))


def _nothing(out: Tensor, x: Tensor, handle: Tensor) -> None:
    """What a traced graph sees: `out` changes, nothing is returned."""


def _add_classified(out: Tensor, x: Tensor, handle: Tensor) -> None:
    _classified[0](out, x, int(handle))


for _name, _body in (("linear", _linear), ("ffn", _ffn), ("classified", _add_classified)):
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"molehill::{_name}", _nothing, lib=_library)


def _run_experts(x: Tensor, weights: Tensor, chosen: Tensor, handle: Tensor) -> Tensor:
    return _experts[0](x, weights, chosen, int(handle))


def _like_x(x: Tensor, weights: Tensor, chosen: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(x)


_library.impl("experts", _run_experts, "CompositeExplicitAutograd")
torch.library.register_fake("molehill::experts", _like_x, lib=_library)


def _run_linear(x: Tensor, bias: Tensor | None, handle: Tensor, out_features: int) -> Tensor:
    y = _linears[0](x, bias, int(handle))
    # As the traced graph was told. Some of vLLM's GEMMs return a part of a wider output.
    return y.contiguous()


def _of_width(x: Tensor, bias: Tensor | None, handle: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_library.impl("base_linear", _run_linear, "CompositeExplicitAutograd")
torch.library.register_fake("molehill::base_linear", _of_width, lib=_library)


def _embed(out: Tensor, ids: Tensor) -> None:
    _embedding[0](out, ids)


def _nothing_looked_up(out: Tensor, ids: Tensor) -> None:
    """What a traced graph sees: `out` changes, nothing is returned."""


_library.impl("embedding", _embed, "CompositeExplicitAutograd")
torch.library.register_fake("molehill::embedding", _nothing_looked_up, lib=_library)


def _run_activation(gate_up: Tensor, handle: Tensor) -> Tensor:
    return _activations[0](gate_up, int(handle))


def _of_half_width(gate_up: Tensor, handle: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


_library.impl("activation", _run_activation, "CompositeExplicitAutograd")
torch.library.register_fake("molehill::activation", _of_half_width, lib=_library)
