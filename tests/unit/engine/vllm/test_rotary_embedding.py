"""Rotary embeddings on CPU of queries whose heads are a dimension of their own."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.platforms import current_platform

from molehill.engine.vllm import rotary_embedding

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="vLLM has its CPU kernel on CPU only"
)
TOKENS, HEADS, KEYS, SIZE, BESIDE = 5, 4, 2, 16, 8


@pytest.fixture
def rope(monkeypatch: pytest.MonkeyPatch, neox: bool) -> Iterator[Any]:
    monkeypatch.setattr(RotaryEmbedding, "forward_cpu", RotaryEmbedding.forward_cpu)
    rotary_embedding.install()
    rotary_embedding.install()
    with set_current_vllm_config(VllmConfig()):
        yield RotaryEmbedding(SIZE, SIZE, 64, 10000.0, neox, torch.float32)


def turned(x: Tensor, positions: Tensor, neox: bool) -> Tensor:
    """The definition, of `[tokens, heads, size]`: each pair is a complex number, turned by its
    position times its frequency. Pairs are halves apart, or neighbours."""
    frequencies = 10000.0 ** (-torch.arange(0, SIZE, 2) / SIZE)
    turn = torch.exp(1j * positions[:, None, None] * frequencies)
    pairs = x.unflatten(-1, (2, -1)).mT if neox else x.unflatten(-1, (-1, 2))
    after = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (after.mT if neox else after).flatten(-2)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("part", [False, True], ids=["whole heads", "a part of each head"])
def test_each_head_is_turned_by_its_own_token(rope: Any, neox: bool, part: bool) -> None:
    """In place, as MLA's queries, which are a part of each head's numbers, are."""
    generator = torch.Generator().manual_seed(1)
    width = SIZE + BESIDE if part else SIZE
    heads = torch.randn(TOKENS, HEADS, width, generator=generator)
    keys = torch.randn(TOKENS, KEYS, SIZE, generator=generator)
    positions = torch.tensor([3, 0, 1, 2, 9])
    expected = [turned(x[..., -SIZE:], positions, neox) for x in (heads, keys)]
    query, key = heads[..., -SIZE:], keys
    before = heads[..., :-SIZE].clone()
    answered = rope.forward_cpu(positions, query, key)
    for changed, returned, right in zip((query, key), answered, expected, strict=True):
        torch.testing.assert_close(changed, right)
        assert torch.equal(returned, changed)
    assert torch.equal(heads[..., :-SIZE], before)


@pytest.mark.parametrize("neox", [True, False])
def test_heads_in_one_dimension_are_still_the_kernels(
    rope: Any, neox: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rope, "forward_native", None)
    query = torch.randn(TOKENS, HEADS * SIZE, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(TOKENS)
    expected = turned(query.unflatten(-1, (HEADS, SIZE)), positions, neox).flatten(-2)
    answered, none = rope.forward_cpu(positions, query, None)
    torch.testing.assert_close(answered, expected)
    assert none is None
