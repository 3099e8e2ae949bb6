"""Finds the linears and FFNs of a loaded vLLM model, and what each holds of the original model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from molehill.engine.adapter import module_names

# What some of vLLM's models call otherwise than Transformers does (gpt-oss), by the model's own
# table of a checkpoint's names: (table, the checkpoint's, vLLM's).
_RENAMED = (
    ("orig_to_new_substr", ".self_attn.", ".attn."),
    ("orig_to_new_suffix", ".embed_tokens.weight", ".embedding.weight"),
)


@dataclass(frozen=True)
class Projection:
    """One linear of the original model inside a (possibly fused) vLLM linear, on this rank.

    site: canonical name. in_features, out_features: of the whole original, not of this rank.
    outputs: ranges of the original's outputs that this rank computes; they lie side by side from
    column `start` of the linear. inputs: the range of its inputs that this rank sees.
    """

    site: str
    in_features: int
    out_features: int
    outputs: tuple[range, ...]
    inputs: range
    start: int


@dataclass(frozen=True)
class Linear:
    """A vLLM linear and its original projections, in the order of its columns."""

    name: str
    module: LinearBase
    projections: tuple[Projection, ...]

    @property
    def in_features(self) -> int:
        return len(self.projections[0].inputs)

    @property
    def out_features(self) -> int:
        last = self.projections[-1]
        return last.start + sum(map(len, last.outputs))

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


def canonical(name: str) -> str:
    """A module's name without what precedes the decoder layers: `layers.3.self_attn.qkv_proj`."""
    return module_names.canonical(name)


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


def find_linears(model: nn.Module, dtype: torch.dtype) -> list[Linear]:
    """Every linear that an adapter can change, in the model's order.

    dtype: the model's. The router of an MoE block is one where it is multiplied as any linear is.
    """
    packed = getattr(model, "packed_modules_mapping", {})
    return [
        Linear(name, module, _projections(name, module, packed))
        for name, module in named_modules(model)
        if isinstance(module, LinearBase)
        and not (isinstance(module, GateLinear) and _has_kernels(module, dtype))
    ]


def _has_kernels(router: GateLinear, dtype: torch.dtype) -> bool:
    """Whether vLLM may run a router in kernels that go round its linear method, or in another dtype
    than the model's: its `allow_{kernel}_gemm`, of which one only allows others."""
    flags = {name for name, value in vars(router).items() if name.startswith("allow_") and value}
    return bool(flags - {"allow_specialized_router_gemm"}) or router.params_dtype != dtype


def _projections(
    name: str, module: LinearBase, packed: Mapping[str, list[str]]
) -> tuple[Projection, ...]:
    parent, _, leaf = name.rpartition(".")
    parts = _parts(module)
    inputs = range(module.input_size)
    if isinstance(module, RowParallelLinear):
        width = module.input_size_per_partition
        inputs = range(module.tp_rank * width, (module.tp_rank + 1) * width)
    names = packed.get(leaf, [leaf])
    starts = [0, *accumulate(len(outputs) for _, outputs in parts)]
    if len(names) != len(parts):
        # The original model has it fused too (Phi-3): one projection over all parts.
        offsets = [0, *accumulate(total for total, _ in parts)]
        outputs = tuple(
            range(offset + part.start, offset + part.stop)
            for offset, (_, part) in zip(offsets, parts, strict=False)
        )
        return (Projection(name, module.input_size, offsets[-1], outputs, inputs, 0),)
    return tuple(
        Projection(
            f"{parent}.{original}" if parent else original,
            module.input_size,
            total,
            (outputs,),
            inputs,
            start,
        )
        for original, (total, outputs), start in zip(names, parts, starts, strict=False)
    )


def _parts(module: LinearBase) -> list[tuple[int, range]]:
    """(outputs of the whole original, this rank's range of them) of each part, by column."""
    if isinstance(module, QKVParallelLinear):
        heads = [
            (module.total_num_heads, module.num_heads, module.head_size, 1),
            *(
                (module.total_num_kv_heads, module.num_kv_heads, size, module.num_kv_head_replicas)
                for size in (module.head_size, module.v_head_size)
            ),
        ]
        return [
            (total * size, _nth(module.tp_rank // replicas, local * size))
            for total, local, size, replicas in heads
        ]
    if isinstance(module, MergedColumnParallelLinear):
        return [(n, _nth(module.tp_rank, n // module.tp_size)) for n in module.output_sizes]
    if isinstance(module, ColumnParallelLinear):
        return [(module.output_size, _nth(module.tp_rank, module.output_size_per_partition))]
    return [(module.output_size, range(module.output_size))]


def _nth(index: int, size: int) -> range:
    return range(index * size, (index + 1) * size)


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
