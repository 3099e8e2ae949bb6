"""The count of tokens that are at least as likely, against the one that vLLM compiles."""

import pytest
import torch
from vllm.v1.sample.ops.logprobs import batched_count_greater_than

from molehill.engine.vllm.token_ranks import count_at_least


@pytest.mark.parametrize("rows", [1, 5])
def test_it_is_the_count_that_vllm_compiles(rows: int) -> None:
    """Equal values and values that are no numbers among them."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 300, generator=generator).round(decimals=1)
    x[0, 7], x[0, 9] = float("nan"), float("-inf")
    values = x.gather(1, torch.arange(rows).unsqueeze(1) + 5)
    definition = batched_count_greater_than._torchdynamo_orig_callable
    counted = count_at_least(x, values)
    assert counted.dtype == torch.int64
    assert torch.equal(counted, definition(x, values))


def test_nothing_is_at_least_what_is_no_number() -> None:
    assert count_at_least(torch.ones(1, 4), torch.full((1, 1), float("nan"))).tolist() == [0]
