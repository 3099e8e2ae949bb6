"""Finds the linears and FFNs of a loaded vLLM model, and what each holds of the original model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import LinearBase

from molehill.engine.vllm.model import projections
from molehill.engine.vllm.model.projections import Projection, canonical

# What some of vLLM's models call otherwise than Transformers does (gpt-oss), by the model's own
# table of a checkpoint's names: (table, the checkpoint's, vLLM's).
_RENAMED = (
    ("orig_to_new_substr", ".self_attn.", ".attn."),
    ("orig_to_new_suffix", ".embed_tokens.weight", ".embedding.weight"),
)


@dataclass(frozen=True)
class Linear:
    """A vLLM linear and its original projections, in the order of its columns.

    whole: all of it as one projection, where Transformers has it so and vLLM's names take it apart.
    """

    name: str
    module: LinearBase
    projections: tuple[Projection, ...]
    whole: Projection | None = None

    @property
    def in_features(self) -> int:
        return len(self.projections[0].inputs)

    @property
    def out_features(self) -> int:
        last = self.projections[-1]
        return last.start + last.width

    @property
    def sites(self) -> tuple[Projection, ...]:
        """All that an adapter may change in it."""
        return self.projections if self.whole is None else (*self.projections, self.whole)

    @property
    def input_is_sharded(self) -> bool:
        return self.in_features != self.projections[0].in_features


@dataclass(frozen=True)
class Ffn:
    """A gated FFN (`layers.3.mlp`): its module, the names of its linears and of its activation."""

    site: str
    module: nn.Module
    gate_up: str
    down: str
    activation_child: str
    activation: str


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by its canonical name, as Transformers has it."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    renamed = [
        (theirs, original)
        for table, original, theirs in _RENAMED
        if getattr(mapper, table, {}).get(original) == theirs
    ]
    for name, module in model.named_modules():
        parameter = f"{name}.weight"
        for theirs, original in renamed:
            parameter = parameter.replace(theirs, original, 1)
        yield canonical(parameter.removesuffix(".weight")), module


def find_linears(model: nn.Module, dtype: torch.dtype, model_type: str) -> list[Linear]:
    """Every linear that an adapter can change, in the model's order.

    dtype: the model's. model_type: of its text model's config. The router of an MoE block is one
    where it is multiplied as any linear is; a convolution's weights, which vLLM keeps in a linear
    too, are none.
    """
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    linears = []
    for name, module in named_modules(model):
        if not isinstance(module, LinearBase) or _is_convolution(module):
            continue
        if isinstance(module, GateLinear) and _has_kernels(module, dtype):
            continue
        inside = projections.of(name, module, model, parents[module])
        linears.append(Linear(name, module, inside, projections.whole(name, module, model_type)))
    return linears


def _is_convolution(module: LinearBase) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 3


def _has_kernels(router: GateLinear, dtype: torch.dtype) -> bool:
    """Whether vLLM may run a router in kernels that go round its linear method, or in another dtype
    than the model's: its `allow_{kernel}_gemm`, of which one only allows others."""
    flags = {name for name, value in vars(router).items() if name.startswith("allow_") and value}
    return bool(flags - {"allow_specialized_router_gemm"}) or router.params_dtype != dtype


def find_ffns(linears: list[Linear], model: nn.Module) -> list[Ffn]:
    """Every FFN made of a fused gate/up linear, a multiplying activation, and a down linear."""
    by_name = {linear.name: linear for linear in linears}
    ffns = []
    for site, module in named_modules(model):
        gate_up, down = f"{site}.gate_up_proj", f"{site}.down_proj"
        child, activation = _activation(module)
        if gate_up in by_name and down in by_name and activation:
            ffns.append(Ffn(site, module, gate_up, down, child, activation))
    return ffns


def _activation(module: nn.Module) -> tuple[str, str]:
    """(child's name, its Transformers name) of an FFN's activation; empty if it is another one."""
    for name, child in module.named_children():
        if type(child) is SiluAndMul:
            return name, "silu"
        if type(child) is GeluAndMul:
            return name, "gelu_pytorch_tanh" if child.approximate == "tanh" else "gelu"
    return "", ""


class _ActivationReached(Exception):
    """Ends the forward that `activates_gate_up` tries."""


class _Stub(nn.Module):
    """Stands in an FFN for a child of it."""

    def __init__(self, run: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> object:
        return self.run(x)


def activates_gate_up(ffn: Ffn) -> bool:
    """Whether an FFN's forward gives its activation just what its gate_up linear returned, so that
    nobody sees what lies between the two. It is tried, with stubs for the two."""
    returned, x = torch.empty(1, 2), torch.empty(1, 1)
    read: list[Tensor] = []

    def activate(gate_up: Tensor) -> object:
        read.append(gate_up)
        raise _ActivationReached

    stubs = {
        ffn.gate_up.rpartition(".")[2]: _Stub(lambda _: (returned, None)),
        ffn.activation_child: _Stub(activate),
    }
    children = {name: getattr(ffn.module, name) for name in stubs}
    try:
        for name, stub in stubs.items():
            setattr(ffn.module, name, stub)
        ffn.module.forward(x)
    except Exception:
        # Whatever stops it: the activation was reached before, or it is not known what it reads.
        pass
    finally:
        for name, child in children.items():
            setattr(ffn.module, name, child)
    return len(read) == 1 and read[0] is returned
