"""Where an activated adapter begins to act is where PEFT has it begin."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.golden import Case

from molehill.engine.adapter.invocation import invocation_offset

# Few enough ids for sequences to occur, overlap and repeat.
IDS = st.integers(0, 2)


@settings(deadline=None)
@given(prompt=st.lists(IDS, max_size=24), invocation=st.lists(IDS, min_size=1, max_size=4))
@example(prompt=[1, 1, 1], invocation=[1, 1])
@example(prompt=[1, 2], invocation=[1, 2, 0])
@example(prompt=[], invocation=[1])
def test_the_offset_is_pefts(prompt: list[int], invocation: list[int]) -> None:
    variants = pytest.importorskip("peft", reason="the dev extra is not installed").tuners.lora
    config = {"own": SimpleNamespace(alora_invocation_tokens=invocation)}
    ids = torch.tensor([prompt], dtype=torch.long)
    (from_the_end,) = variants.variants.calculate_alora_offsets(config, "own", ids)
    expected = None if from_the_end is None else len(prompt) - from_the_end
    assert invocation_offset(prompt, invocation) == expected


def test_the_golden_prompts_offsets() -> None:
    oracle = Case("alora").oracle
    result = [invocation_offset(p["prompt_token_ids"], [301, 17, 302]) for p in oracle["prompts"]]
    assert result == [p["invocation_start"] for p in oracle["prompts"]]
    assert {None, 0} < set(result)
