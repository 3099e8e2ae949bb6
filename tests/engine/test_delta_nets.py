"""Bases with gated delta nets, whose kernels vLLM has in bfloat16 only on CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models, warm
from support.asking import ask_each
from support.engines import engine
from support.oracle import peft_lora

# Of the standard deviation of log-probabilities: the engine computes in bfloat16, Transformers in
# float32. 0.013 and 0.021 were seen.
TOLERANCE = 0.05


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
        expected = logits.log_softmax(-1)
        error = reply.logits.log_softmax(-1) - expected
        assert error.std() < TOLERANCE * expected.std()


@pytest.mark.slow
def test_a_worker_refuses_another_dtype_before_the_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import LLM

    log = tmp_path / "log"
    monkeypatch.setenv(warm.LOG, str(log))

    options = {
        "dtype": "float32",
        "enable_lora": True,
        "enforce_eager": True,
        "max_model_len": 64,
        "worker_cls": "molehill.engine.vllm.worker.Worker",
    }
    with warm.start(), pytest.raises(RuntimeError):
        LLM(model=str(tiny_models.build("qwen3_5_text", tmp_path)), **options)
    sentence = (
        "--dtype: found float32, expected bfloat16: vLLM's CPU kernels for the gated delta net "
        "of qwen3_5_text take nothing else"
    )
    assert sentence in log.read_text()


@pytest.fixture(scope="module")
def adapted(model: Path, tmp_path_factory: Any) -> tuple[Path, Any]:
    """PEFT's LoRA on every linear, those of the delta net among them, and PEFT's model with it."""
    directory = tmp_path_factory.mktemp("lora")
    return directory, peft_lora(tiny_models.load(model), "all-linear", (), directory)


def test_lora_on_every_linear_agrees_with_peft(
    model: Path, llm: Any, adapted: tuple[Path, Any]
) -> None:
    """Beside the base in one batch."""
    from vllm.lora.request import LoRARequest

    path, oracle = adapted
    request = LoRARequest("lora", 1, str(path))
    llm.llm_engine.add_lora(request)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in (7, 33)]
    base, *others = ask_each(llm, [prompts[0], *prompts], [None, request, request], 2)
    for reply, prompt in zip(others, prompts, strict=True):
        with torch.inference_mode():
            expected = oracle(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        error = reply.logits.log_softmax(-1) - expected
        assert error.std() < TOLERANCE * expected.std()
    moved = others[0].logits.log_softmax(-1) - base.logits.log_softmax(-1)
    assert moved.std() > 10 * TOLERANCE * base.logits.std()
