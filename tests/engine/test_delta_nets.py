"""Bases with gated delta nets, whose kernels vLLM has in bfloat16 only on CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from asking import ask_each
from engines import engine

# Of log-probabilities in bfloat16, whose steps are 1/32 where the logits are.
TOLERANCE = 0.25


@pytest.fixture(scope="module", params=["qwen3_5_text", "qwen3_next"])
def model(request: Any, tmp_path_factory: Any) -> Path:
    return tiny_models.build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[Any]:
    with engine(model=str(model), dtype="bfloat16", enforce_eager=True) as llm:
        yield llm


def test_the_base_starts_without_torchvision_and_agrees_with_transformers(
    model: Path, llm: Any
) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in (5, 33)]
    oracle = tiny_models.load(model)
    for reply, prompt in zip(ask_each(llm, prompts, [None, None], 8), prompts, strict=True):
        assert len(reply.tokens) == 8
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt])).logits[0, -1]
        expected, found = logits.log_softmax(-1), reply.logits.log_softmax(-1)
        assert (expected - found).abs().max() < TOLERANCE


def test_another_dtype_is_refused_before_the_model_loads(model: Path, capfd: Any) -> None:
    with (
        pytest.raises(RuntimeError),
        engine(model=str(model), dtype="float32", enforce_eager=True),
    ):
        pass
    kind = tiny_models.model_type(model)
    sentence = (
        "--dtype: found float32, expected bfloat16: vLLM's CPU kernels for the gated delta net "
        f"of {kind} take nothing else"
    )
    assert sentence in "".join(capfd.readouterr())
