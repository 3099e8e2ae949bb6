"""What a vLLM linear holds of the linears of the original model, as Transformers has them.

vLLM puts linears side by side (q, k and v), may have their rows in another order than Transformers,
and may have one linear's rows twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from molehill.engine.adapter import module_names

# How many of vLLM's parts each original is, where some are more than one: q, k and v, and z of
# Qwen3.5's gated delta net.
_PARTS_OF_ORIGINALS = {"in_proj_qkvz": (3, 1)}
# By model type, what Transformers has as one linear and vLLM's packed_modules_mapping as several.
FUSED_IN_TRANSFORMERS: Mapping[str, Sequence[str]] = {
    "glm": ("gate_up_proj",),
    "glm4": ("gate_up_proj",),
    "glm4v_text": ("gate_up_proj",),
    "glm_ocr_text": ("gate_up_proj",),
}
# Models whose query_key_value has the q, k and v of each group of heads side by side in
# Transformers, and all q, all k and all v in vLLM.
_BY_GROUP_OF_HEADS = frozenset({"FalconForCausalLM", "BloomForCausalLM"})
# What vLLM calls modules that Transformers has by other names.
_RENAMED = {".short_conv.": ".conv.", ".mamba.mamba.": ".mamba."}


@dataclass(frozen=True)
class Projection:
    """One linear of the original model inside a (possibly fused) vLLM linear, on this rank.

    site: canonical name. in_features, out_features: of the whole original, not of this rank.
    outputs: ranges of the original's outputs that this rank computes, in vLLM's order; they lie
    side by side from column `start` of the linear. inputs: the range of its inputs that this rank
    sees.
    """

    site: str
    in_features: int
    out_features: int
    outputs: tuple[range, ...]
    inputs: range
    start: int

    @property
    def width(self) -> int:
        """Columns of the linear."""
        return sum(map(len, self.outputs))


def canonical(name: str) -> str:
    """A module's name as Transformers has it, without what precedes the decoder layers:
    `layers.3.self_attn.qkv_proj`."""
    for ours, theirs in _RENAMED.items():
        name = name.replace(ours, theirs)
    return module_names.canonical(name)


def of(
    name: str, module: LinearBase, model: nn.Module, parent: nn.Module
) -> tuple[Projection, ...]:
    """The originals in a linear, in the order of its columns.

    name: canonical. model: what it is part of, which says what is packed. parent: the module that
    it is an attribute of.
    """
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    above, _, leaf = name.rpartition(".")
    prefix = f"{above}." if above else ""
    parts = _parts(module)
    names = packed.get(leaf, [leaf])
    groups = _PARTS_OF_ORIGINALS.get(leaf, (1,) * len(parts))
    if len(names) != len(groups) or sum(groups) != len(parts):
        # The original model has it fused too (Phi-3).
        names, groups = [leaf], (len(parts),)
    inputs = _inputs(module)
    projections, column, first = [], 0, 0
    for original, count in zip(names, groups, strict=True):
        outputs, total = _side_by_side(parts[first : first + count])
        projection = Projection(
            f"{prefix}{original}", module.input_size, total, outputs, inputs, column
        )
        projections.append(projection)
        column, first = column + projection.width, first + count
    if type(model).__name__ in _BY_GROUP_OF_HEADS and isinstance(module, QKVParallelLinear):
        (projection,) = projections
        return (replace(projection, outputs=_by_group_of_heads(module)),)
    if _value_is_key(parent, projections):
        return _with_key_as_value(projections)
    return tuple(projections)


def whole(name: str, module: LinearBase, model_type: str) -> Projection | None:
    """The linear as the one that Transformers has in its place; None if it has several.

    model_type: of the text model's config.
    """
    if name.rpartition(".")[2] not in FUSED_IN_TRANSFORMERS.get(model_type, ()):
        return None
    outputs, total = _side_by_side(_parts(module))
    return Projection(name, module.input_size, total, outputs, _inputs(module), 0)


def _inputs(module: LinearBase) -> range:
    if isinstance(module, RowParallelLinear):
        return _nth(module.tp_rank, module.input_size_per_partition)
    return range(module.input_size)


def _side_by_side(parts: Sequence[tuple[int, range]]) -> tuple[tuple[range, ...], int]:
    """This rank's outputs of one linear that is made of all parts, and how many it has in all."""
    offsets = [0, *accumulate(total for total, _ in parts)]
    outputs = tuple(
        range(offset + part.start, offset + part.stop)
        for offset, (_, part) in zip(offsets, parts, strict=False)
    )
    return outputs, offsets[-1]


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


def _by_group_of_heads(module: QKVParallelLinear) -> tuple[range, ...]:
    """This rank's heads, q, k and v, where each group of the original is its heads of q, then one
    of k, then one of v."""
    in_group = module.total_num_heads // module.total_num_kv_heads
    first = module.tp_rank // module.num_kv_head_replicas * module.num_kv_heads
    groups = range(first, first + module.num_kv_heads)
    heads = _nth(module.tp_rank, module.num_heads)
    places = [head // in_group * (in_group + 2) + head % in_group for head in heads]
    places += [group * (in_group + 2) + in_group for group in groups]
    places += [group * (in_group + 2) + in_group + 1 for group in groups]
    return tuple(_nth(place, module.head_size) for place in places)


def _value_is_key(attention: nn.Module, projections: Sequence[Projection]) -> bool:
    """Whether the original has no v_proj and takes what k_proj gives: Gemma 4's full attention with
    `attention_k_eq_v`, for which vLLM has k_proj's rows twice (gemma4.py)."""
    config = getattr(attention, "config", None)
    if not getattr(config, "attention_k_eq_v", False) or len(projections) != 3:
        return False
    return not getattr(attention, "is_sliding", True)


def _with_key_as_value(projections: Sequence[Projection]) -> tuple[Projection, ...]:
    query, key, _ = projections
    return query, replace(key, outputs=key.outputs * 2)


def _nth(index: int, size: int) -> range:
    return range(index * size, (index + 1) * size)
