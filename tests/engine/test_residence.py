"""An adapter merged into the base weights, every other request on the weights as they were."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.asking import IDS, Reply, ask, ask_worker, assert_golden, every_prompt
from support.engines import engine
from support.golden import SERVED, TINY_LLAMA, Case, Prompt, greatest_difference

from molehill.engine import formats
from molehill.engine.formats import native
from molehill.engine.hf.reference import attach
from molehill.engine.transform.merge import merge_static, merged_weight, plain_sites
from molehill.engine.vllm import protocol
from molehill.engine.vllm.model import merged_base_loader
from molehill.kernels.mixture import Experts


@contextmanager
def merged_engine(case: str, folder: Path, **options: Any) -> Iterator[Any]:
    """An engine with the static part of a golden adapter in its weights."""
    molehill = {"merged_base": str(written(case, folder)), **options.pop("molehill", {})}
    with engine(additional_config={"molehill": molehill}, **options) as llm:
        yield llm


def written(case: str, folder: Path) -> Path:
    native.write(merge_static(formats.read(Case(case).path))[0], folder / case)
    return folder / case


@pytest.fixture(scope="module")
def merged(tmp_path_factory: Any) -> Iterator[Any]:
    with merged_engine("lora", tmp_path_factory.mktemp("resident")) as llm:
        yield llm


def test_base_resident_and_every_other_adapter_give_the_oracles(merged: Any) -> None:
    """All in one batch: the resident runs plainly, the others subtract it, inside FFNs too."""
    prompts = low_rank(every_prompt())
    assert_golden(ask(merged, prompts), prompts)
    stats = ask_worker(merged, protocol.STATS, protocol.StatsRequest()).adapters
    ids = {name: number for name, number in IDS.items() if name != "mov"}
    assert stats.keys() == set(ids.values())
    resident_bytes = {name: stats[number].resident_bytes for name, number in ids.items()}
    assert resident_bytes.pop("lora") == 0
    assert min(resident_bytes.values()) > 0
    prompt_tokens = sum(len(prompt.ids) for prompt in Case("lora").prompts)
    # 12 generated ones each, of which the last is never read.
    assert stats[IDS["lora"]].stats.tokens == prompt_tokens + 4 * 11


def low_rank(prompts: list[Prompt]) -> list[Prompt]:
    """All but those of vectors, which rescale what the resident is still to be taken out of."""
    return [prompt for prompt in prompts if prompt.case != "mov"]


def test_vectors_on_merged_weights_are_refused(merged: Any) -> None:
    from vllm.lora.request import LoRARequest

    with pytest.raises(Exception, match="found vectors, expected none where an adapter is merged"):
        merged.llm_engine.add_lora(LoRARequest("mov", 78, str(Case("mov").path)))
    assert 78 not in merged.llm_engine.list_loras()


def test_the_base_alone_and_warm_from_the_prefix_cache(merged: Any) -> None:
    """No adapter in the batch at all, and none that shares cached tokens with the resident."""
    merged.reset_prefix_cache()
    prompts = [Case("lora").prompts[3], Case("base").prompts[3]]
    assert prompts[0].ids == prompts[1].ids
    replies = [ask(merged, [prompt])[0] for prompt in [*prompts, *prompts]]
    assert_golden(replies, [*prompts, *prompts])
    assert [reply.cached for reply in replies] == [0, 0, 32, 32]


def test_what_is_merged_cannot_be_removed_with_all_others(merged: Any) -> None:
    from vllm.lora.request import LoRARequest

    merged.llm_engine.add_lora(LoRARequest("mola", 77, str(Case("mola").path)))
    assert 77 in merged.llm_engine.list_loras()
    assert 0 not in merged.llm_engine.list_loras()
    for number in merged.llm_engine.list_loras():
        merged.llm_engine.remove_lora(number)
    prompts = Case("base").prompts
    assert_golden(ask(merged, prompts), prompts)


def test_a_part_of_an_adapter_with_tensor_parallelism(tmp_path: Path, monkeypatch: Any) -> None:
    """Attention LoRA goes into the weights, the FFN mixture of the same adapter stays; half of
    each on either rank, torch backend."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    torch_backend = {"molehill": {"backend": "torch"}}
    prompts = low_rank(every_prompt()[: 1 + len(SERVED)])
    with merged_engine("mixlora-expert-lora", tmp_path, **options, **torch_backend) as llm:
        assert_golden(ask(llm, prompts), prompts)


def drift_of_rounding(case: str) -> float:
    """What one rounding of W + B A to bfloat16 does to the logits of the golden prompts: float32
    everywhere else, on Transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()
    resident = merge_static(formats.read(Case(case).path))[0]
    exact, rounded = [], []
    for result in (exact, rounded):
        for prompt in Case(case).prompts:
            with torch.no_grad(), attach(model, resident):
                result.append(model(torch.tensor([prompt.ids])).logits[0, -1])
        if not rounded:
            for site in plain_sites(resident):
                # The rounding error alone: the adapter on top stays exact.
                linear: Any = model.get_submodule(f"model.{site}")
                mixture: Any = resident.sites[site]
                w = linear.weight.data
                delta = mixture.experts.b @ mixture.experts.a
                w += merged_weight(w.bfloat16(), mixture).float() - (w + delta)
    return max(greatest_difference(a, b) for a, b in zip(exact, rounded, strict=True))


def test_in_bfloat16_the_drift_is_that_of_one_rounding(tmp_path: Path) -> None:
    """Merged requests, and the base's own on the merged engine, are as far from the float32
    oracles as an engine without merging is, give or take what rounding W once does."""
    prompts = [*Case("lora").prompts, *Case("base").prompts]
    with engine(dtype="bfloat16") as plain:
        apart = errors(ask(plain, prompts, tokens=1), prompts)
    with merged_engine("lora", tmp_path, dtype="bfloat16") as llm:
        result = errors(ask(llm, prompts, tokens=1), prompts)
    rounding = drift_of_rounding("lora")
    assert 0 < rounding < 1
    for before, after in zip(apart, result, strict=True):
        assert after <= before + 2 * rounding


def errors(replies: list[Reply], prompts: Any) -> tuple[float, float]:
    """Largest distance from the oracles' logits: of the adapter's four prompts, of the base's."""
    apart = [
        greatest_difference(reply.logits, prompt.logits)
        for reply, prompt in zip(replies, prompts, strict=True)
    ]
    return max(apart[:4]), max(apart[4:])


PAIR = Experts(torch.ones(1, 4), torch.ones(3, 1), (1,))


def test_a_weight_that_cannot_be_merged_into_ends_the_load() -> None:
    resident = {"layers.0.x": PAIR}
    for weights, message in (
        ([("model.layers.0.x.weight", torch.ones(4, 4))], "expected floating point .3, 4."),
        ([("model.layers.0.x.weight", torch.ones(3, 4).char())], "int8"),
        ([("model.layers.0.y.weight", torch.ones(3, 4))], "layers.0.x: found no weight"),
    ):
        with pytest.raises(RuntimeError, match=message):
            list(merged_base_loader.with_merged_base(resident, iter(weights), torch.float32))


def test_other_weights_and_biases_are_left_alone() -> None:
    given = [
        ("model.layers.0.x.weight", torch.ones(3, 4, dtype=torch.bfloat16)),
        ("model.layers.0.x.bias", torch.ones(3)),
        ("lm_head.weight", torch.ones(2, 4)),
    ]
    result = list(
        merged_base_loader.with_merged_base({"layers.0.x": PAIR}, iter(given), torch.float32)
    )
    assert torch.equal(result[0][1], torch.full((3, 4), 2.0))
    assert result[0][1].dtype == torch.float32
    assert [
        tensor is given_tensor
        for (_, tensor), (_, given_tensor) in zip(result[1:], given[1:], strict=True)
    ] == [
        True,
        True,
    ]
