"""Which rows of Transformers' linears vLLM's have on each rank, and which linears it has as one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomConfig
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

from molehill.engine.vllm.model import projections
from molehill.engine.vllm.model.projections import FUSED_IN_TRANSFORMERS, canonical


def qkv(heads: int, kv_heads: int, size: int, rank: int = 0, ranks: int = 1) -> Any:
    """What vLLM's says of itself on a rank, without a process group."""
    linear = object.__new__(QKVParallelLinear)
    nn.Module.__init__(linear)
    linear.__dict__.update(
        total_num_heads=heads,
        num_heads=heads // ranks,
        total_num_kv_heads=kv_heads,
        num_kv_heads=max(1, kv_heads // ranks),
        num_kv_head_replicas=max(1, ranks // kv_heads),
        head_size=size,
        v_head_size=size,
        input_size=64,
        tp_rank=rank,
    )
    return linear


def merged(*sizes: int) -> Any:
    linear = object.__new__(MergedColumnParallelLinear)
    nn.Module.__init__(linear)
    linear.__dict__.update(output_sizes=sizes, input_size=64, tp_rank=0, tp_size=1)
    return linear


def rows(projection: projections.Projection) -> list[int]:
    return [row for part in projection.outputs for row in part]


class BloomForCausalLM(nn.Module):
    """By whose name vLLM's is known."""


def test_rows_by_group_of_heads_are_those_that_transformers_takes_apart() -> None:
    config = BloomConfig(n_head=4, hidden_size=8, attn_implementation="eager")  # type: ignore[call-arg]
    attention = BloomAttention(config, layer_idx=0)
    numbered = torch.arange(24).view(1, 1, 24)
    expected = torch.cat([part.flatten() for part in attention._reshape(numbered)])
    name = "h.0.self_attention.query_key_value"
    (projection,) = projections.of(name, qkv(4, 4, 2), BloomForCausalLM(), nn.Module())
    assert rows(projection) == expected.tolist()
    halves = [
        projections.of(name, qkv(4, 4, 2, rank, 2), BloomForCausalLM(), nn.Module())[0]
        for rank in range(2)
    ]
    assert sorted(rows(halves[0]) + rows(halves[1])) == list(range(24))
    assert rows(halves[1])[:4] == expected[4:8].tolist()


def test_a_key_that_is_the_value_too_has_its_rows_twice() -> None:
    attention: Any = nn.Module()
    attention.config, attention.is_sliding = SimpleNamespace(attention_k_eq_v=True), False
    model: Any = nn.Module()
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    query, key = projections.of("layers.0.self_attn.qkv_proj", qkv(4, 2, 8), model, attention)
    assert (query.site, query.start, query.width) == ("layers.0.self_attn.q_proj", 0, 32)
    assert (key.site, key.out_features, key.start) == ("layers.0.self_attn.k_proj", 16, 32)
    assert rows(key) == [*range(16), *range(16)]
    attention.is_sliding = True
    assert len(projections.of("layers.0.self_attn.qkv_proj", qkv(4, 2, 8), model, attention)) == 3


def test_an_original_may_be_several_of_vllms_parts() -> None:
    model: Any = nn.Module()
    model.packed_modules_mapping = {"in_proj_qkvz": ["in_proj_qkv", "in_proj_z"]}
    name = "layers.0.linear_attn.in_proj_qkvz"
    qkv_part, z_part = projections.of(name, merged(4, 4, 8, 8), model, nn.Module())
    assert (qkv_part.site.rpartition(".")[2], qkv_part.start, qkv_part.width) == (
        "in_proj_qkv",
        0,
        16,
    )
    assert (z_part.site.rpartition(".")[2], z_part.start, z_part.width) == ("in_proj_z", 16, 8)


@pytest.mark.parametrize("model_type", FUSED_IN_TRANSFORMERS)
def test_transformers_has_as_one_what_the_table_says(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, num_hidden_layers=1)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    linears = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(FUSED_IN_TRANSFORMERS[model_type]) <= linears
    assert linears.isdisjoint({"gate_proj", "up_proj"})


def test_names_are_those_of_transformers() -> None:
    assert canonical("model.layers.2.short_conv.in_proj") == "layers.2.conv.in_proj"
    assert canonical("model.layers.2.mamba.mamba.in_proj") == "layers.2.mamba.in_proj"
