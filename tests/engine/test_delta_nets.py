"""Bases with gated delta nets, whose kernels vLLM has in bfloat16 only on CPU."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import mixtures, tiny_models, warm
from support.asking import ask_each
from support.engines import KV_CACHE_BYTES, engine
from support.oracle import peft_lora
from torch import nn

# Of the standard deviation of log-probabilities: the engine computes in bfloat16, Transformers in
# float32. 0.013 and 0.021 were seen.
TOLERANCE = 0.05
# Of top-k: where two probabilities are close, bfloat16 chooses other experts than float32.
CHOSEN = 0.15
# Linears with a mixture: of delta nets, and of attention.
MIXED = ("out_proj", "q_proj", "o_proj")
WITH_FFNS = ("qwen3_5_text",)


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
        # Or vLLM asks for most of the machine's memory first.
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "worker_cls": "molehill.engine.vllm.worker.Worker",
    }
    with warm.start(), pytest.raises(RuntimeError):
        LLM(model=str(tiny_models.build("qwen3_5_text", tmp_path)), **options)
    sentence = (
        "--dtype: found float32, expected bfloat16: vLLM's CPU kernels for the gated delta net "
        "of qwen3_5_text take nothing else"
    )
    assert sentence in log.read_text()


@dataclass(frozen=True)
class Adapted:
    """An adapter, and the base on Transformers with it."""

    path: Path
    oracle: nn.Module


@pytest.fixture(scope="module")
def adapted(model: Path, tmp_path_factory: Any) -> Mapping[str, Adapted]:
    """PEFT's LoRA on every linear, those of the delta net among them, and mixtures: a soft DynMoLE
    on linears of both kinds of layers, MixLoRA where the base has FFNs."""
    directory: Path = tmp_path_factory.mktemp("adapters")
    lora = peft_lora(tiny_models.load(model), "all-linear", (), directory / "lora")
    made = {"lora": Adapted(directory / "lora", lora)}
    base = tiny_models.load(model)
    # With another seed bfloat16 may choose other experts of Qwen3-Next itself: 0.076 was seen.
    recipes = {"dynmole": mixtures.dynmole(base, MIXED, seed=6, threshold=0.0)}
    if tiny_models.model_type(model) in WITH_FFNS:
        recipes["mixlora"] = mixtures.mixlora(base, "o_proj", seed=6)
    for name, recipe in recipes.items():
        oracle = tiny_models.load(model)
        for site, module in recipe.modules.items():
            oracle.set_submodule(site, module)
        made[name] = Adapted(recipe.save(directory / name), oracle)
    return made


def test_adapters_in_one_batch_agree_with_the_oracle(
    model: Path, llm: Any, adapted: Mapping[str, Adapted]
) -> None:
    """Beside the base."""
    from vllm.lora.request import LoRARequest

    names = list(adapted)
    requests = {
        name: LoRARequest(name, number, str(adapted[name].path))
        for number, name in enumerate(names, start=1)
    }
    for request in requests.values():
        llm.llm_engine.add_lora(request)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in (7, 33)]
    asked = [("base", prompts[0]), *((name, prompt) for name in names for prompt in prompts)]
    base, *others = ask_each(
        llm, [prompt for _, prompt in asked], [requests.get(name) for name, _ in asked], 2
    )
    for reply, (name, prompt) in zip(others, asked[1:], strict=True):
        with torch.inference_mode():
            expected = adapted[name].oracle(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        error = reply.logits.log_softmax(-1) - expected
        bound = CHOSEN if name == "mixlora" else TOLERANCE
        assert error.std() < bound * expected.std(), name
    for reply in others[:: len(prompts)]:
        moved = reply.logits.log_softmax(-1) - base.logits.log_softmax(-1)
        assert moved.std() > 10 * TOLERANCE * base.logits.std()
