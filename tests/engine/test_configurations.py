"""The golden cases under other engine configurations give what the plain one gives."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import activated, dora_experts, vocabulary
from support.architectures import EXTRA_VOCAB, ids_of_prompts
from support.asking import ask, ask_each, assert_golden, every_prompt
from support.engines import engine
from support.golden import SERVED, TINY_LLAMA, VOCABULARY, Case, Prompt, greatest_difference
from support.oracle import answer
from support.routed import assert_routing_of_golden_cases
from transformers import AutoModelForCausalLM

from molehill.engine.vllm.settings import Settings


@dataclass(frozen=True)
class Configuration:
    """options of `LLM`, and environment variables that its workers inherit."""

    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


# Of which the second rank has the tokens that an adapter adds.
ROOM = {"hf_overrides": {"vocab_size": VOCABULARY + EXTRA_VOCAB}}
TORCH = {"additional_config": Settings("torch", extra_vocab=EXTRA_VOCAB).to_config()}
CHUNKS = {"enable_chunked_prefill": True, "max_num_batched_tokens": 24}
TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
A_CORE_EACH = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}

CONFIGURATIONS = {
    "chunked prefill, C++ without vector instructions": Configuration(
        CHUNKS, {"MOLEHILL_CPU_ISA": "portable"}
    ),
    "chunked prefill, torch backend": Configuration({**CHUNKS, **TORCH}),
    "tensor parallel": Configuration(TWO_RANKS, A_CORE_EACH),
    "tensor parallel, torch backend": Configuration({**TWO_RANKS, **TORCH}, A_CORE_EACH),
}
# Each half of the first is in another test; test_residence has both, with fewer adapters. The
# other's kernels have tests of their own.
LONG = {"tensor parallel, torch backend", "chunked prefill, C++ without vector instructions"}


DORA_PROMPT = [303, 316, 288, 262, 352, 17, 5]


@pytest.fixture(scope="module")
def dora() -> dora_experts.Oracle:
    source = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    return dora_experts.make(source)


@pytest.fixture(scope="module")
def plain() -> Any:
    """The base on Transformers."""
    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()


@torch.no_grad()
def assert_dora(llm: Any, oracle: dora_experts.Oracle, directory: Path) -> None:
    """Magnitudes of experts inside an FFN: the norms are of each rank's own rows."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest("dora-experts", 90, str(oracle.save(directory)))
    (reply,) = ask_each(llm, [DORA_PROMPT], [request], tokens=1)
    logits = oracle.model(torch.tensor([DORA_PROMPT])).logits[0, -1]
    assert greatest_difference(reply.logits, logits) <= 2e-4 * logits.abs().max()


@dataclass(frozen=True)
class OnVocabulary:
    """Adapters of support.vocabulary by name, and what PEFT answers."""

    adapters: dict[str, Path]
    prompts: list[Prompt]


@pytest.fixture(scope="module")
def on_vocabulary(tmp_path_factory: Any) -> OnVocabulary:
    folder = tmp_path_factory.mktemp("vocabulary")
    adapters = {name: folder / name for name in ("on-both", "saved", "grown-saved")}
    prompts = []
    for name, path in adapters.items():
        oracle = vocabulary.author(TINY_LLAMA, path, name)
        added = [VOCABULARY, VOCABULARY + 1] if name in vocabulary.GROWN else []
        prompts += [answer(oracle, name, [*added, *ids], 12) for ids in ids_of_prompts(5)[:2]]
    return OnVocabulary(adapters, prompts)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration_matches_the_reference(
    name: str,
    authored: Any,
    dora: dora_experts.Oracle,
    plain: Any,
    on_vocabulary: OnVocabulary,
    monkeypatch: Any,
    tmp_path: Path,
) -> None:
    if name in LONG and os.environ.get("MOLEHILL_LONG_TESTS") != "1":
        pytest.skip("a long test; MOLEHILL_LONG_TESTS=1 runs it")
    configuration = CONFIGURATIONS[name]
    for variable, value in configuration.environment.items():
        monkeypatch.setenv(variable, value)
    # The first two prompts of the base and of every method, in one batch.
    prompts = every_prompt()[: 2 * (1 + len(SERVED))]
    prompts += activated.golden_prompts()
    # Some have the name of a golden case.
    others = {f"authored-{name}": made.path for name, made in authored.items()}
    others["alora"] = Case("alora").path
    prompts += [
        replace(prompt, case=f"authored-{name}")
        for name, made in authored.items()
        for prompt in made.prompts
    ]
    others |= on_vocabulary.adapters
    prompts += on_vocabulary.prompts
    settings = {"additional_config": Settings(extra_vocab=EXTRA_VOCAB).to_config()}
    options = {**settings, **ROOM, **configuration.options}
    with engine(**options, max_loras=50) as llm:
        assert_golden(ask(llm, prompts, others=others), prompts)
        assert_dora(llm, dora, tmp_path / "dora")
        assert_routing_of_golden_cases(llm, plain)
