"""Adapters that nobody thought of, hot-loaded into one engine: it gives the reference's logits."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import dora_experts
from support.asking import ask_each
from support.golden import TINY_LLAMA
from support.random_adapters import adapters, random
from torch import Tensor
from transformers import AutoModelForCausalLM

from molehill.engine import formats
from molehill.engine.adapter.errors import NothingBoundError
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import check
from molehill.engine.formats import native
from molehill.engine.hf.reference import attach
from molehill.engine.hf.shapes import base_model
from molehill.kernels.interface import Trace

HEAD = 32
BASE = base_model(TINY_LLAMA)
PROMPTS = [[303, 316, 288, 262, 352], [17, 5, 300, 301], [9, 400, 401, 77, 500, 3, 42]]
# Of the largest logit: two float32 implementations, four layers.
TOLERANCE = 2e-4
_ids = count(1000)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def store(tmp_path_factory: Any) -> Path:
    return Path(tmp_path_factory.mktemp("adapters"))


@torch.no_grad()
def logits_of(model: Any, prompt: list[int]) -> Tensor:
    result: Tensor = model(torch.tensor([prompt]), use_cache=False).logits[0]
    return result


def expected(model: Any, adapter: Adapter | None, prompt: list[int]) -> tuple[Tensor, bool]:
    """The reference's logits, and whether no routing in them hangs on rounding."""
    if adapter is None:
        return logits_of(model, prompt), True
    trace: dict[str, list[Trace]] = {}
    with attach(model, adapter, trace):
        logits = logits_of(model, prompt)
    decided = all(_decisive(adapter, entry) for entries in trace.values() for entry in entries)
    return logits, decided and bool(logits.isfinite().all())


def _decisive(adapter: Adapter, entry: Trace) -> bool:
    policy = adapter.sites[entry.site].policy
    logits = entry.probabilities.log().clamp(min=-80)
    for seed in range(3):
        noisy = logits + random(*logits.shape, seed=seed, scale=5e-5)
        moved = policy.route(torch.softmax(noisy, -1)).weights - entry.weights
        if moved.abs().max() > 1e-2:
            return False
    return True


@pytest.fixture
def loaded(llm: Any) -> Iterator[Any]:
    """`loaded(directory)`: a LoRARequest of an adapter that is unloaded afterwards."""
    from vllm.lora.request import LoRARequest

    ids: list[int] = []

    def load(directory: Path) -> Any:
        ids.append(next(_ids))
        request = LoRARequest(f"random{ids[-1]}", ids[-1], str(directory))
        assert llm.llm_engine.add_lora(request)
        return request

    yield load
    for lora_id in ids:
        assert llm.llm_engine.remove_lora(lora_id)


def effective(adapter: Adapter) -> bool:
    try:
        check(adapter, formats.DEFAULT_LIMITS)
    except NothingBoundError:
        return False
    return True


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    adapters=st.lists(adapters(BASE, HEAD).filter(effective), min_size=1, max_size=3),
    order=st.permutations(range(8)),
)
def test_random_adapters_in_one_batch_give_the_references_logits(
    llm: Any, model: Any, store: Path, adapters: list[Adapter], order: list[int]
) -> None:
    from vllm.lora.request import LoRARequest

    everyone: list[Adapter | None] = [None, *adapters]
    cases = [(everyone[i % len(everyone)], PROMPTS[i % len(PROMPTS)]) for i in order]
    answers = [expected(model, adapter, prompt) for adapter, prompt in cases]
    assume(all(decided for _, decided in answers))
    requests: dict[int, Any] = {id(None): None}
    for adapter in adapters:
        lora_id = next(_ids)
        native.write(adapter, store / str(lora_id))
        request = LoRARequest(f"random{lora_id}", lora_id, str(store / str(lora_id)))
        assert llm.llm_engine.add_lora(request)
        requests[id(adapter)] = request
    llm.reset_prefix_cache()
    replies = ask_each(
        llm,
        [prompt for _, prompt in cases],
        [requests[id(adapter)] for adapter, _ in cases],
        tokens=1,
        prompt_logits=True,
    )
    for request in filter(None, requests.values()):
        assert llm.llm_engine.remove_lora(request.lora_int_id)
    for reply, (logits, _) in zip(replies, answers, strict=True):
        assert reply.prompt_logits is not None
        result = torch.cat([reply.prompt_logits, reply.logits.unsqueeze(0)])
        error = (result - logits).abs().max().item()
        assert error <= TOLERANCE * logits.abs().max().item()


def test_experts_that_are_dora_give_pefts_logits(llm: Any, loaded: Any, tmp_path: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    oracle = dora_experts.make(source)
    request = loaded(oracle.save(tmp_path / "dora"))
    replies = ask_each(llm, PROMPTS, [request, None, request], prompt_logits=True)
    for i in (0, 2):
        logits = logits_of(oracle.model, PROMPTS[i])
        result = torch.cat([replies[i].prompt_logits, replies[i].logits.unsqueeze(0)])
        assert (result - logits).abs().max() <= TOLERANCE * logits.abs().max()
        assert replies[i].tokens[0] == logits[-1].argmax()
