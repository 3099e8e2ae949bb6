"""A mixture-of-experts base (OLMoE) on CPU, with LoRA on its experts and beside them.

Plain vLLM cannot run such a base on CPU with LoRA enabled; see engine/vllm/model/moe_blocks.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import mixtures, tiny_models
from support.asking import ask, ask_worker, assert_golden, request
from support.engines import engine
from support.golden import GOLDEN, Case, Prompt
from support.oracle import answer, peft_lora

from molehill.engine import formats
from molehill.engine.adapter.base_model import Moe
from molehill.engine.formats import native
from molehill.engine.transform.merge import merge_static
from molehill.engine.vllm import protocol

TINY_MOE = GOLDEN / "tiny-moe"
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
FUSED = ("experts.gate_up_proj", "experts.down_proj")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: Any) -> dict[str, Path]:
    return {
        "drlora": Case("drlora").path,
        "experts-unsloth-grouped": Case("experts-unsloth-grouped").path,
        "experts-peft-0.18": Case("experts-peft-0.18").path,
        "moe-all-linear": Case("moe-all-linear").path,
        "attention": tmp_path_factory.mktemp("attention") / "attention",
        "both": tmp_path_factory.mktemp("both") / "both",
    }


@pytest.fixture(scope="module")
def prompts(adapters: dict[str, Path]) -> list[Prompt]:
    """Of the golden cases, and of an adapter on attention alone and one on both."""
    ids = [prompt.ids for prompt in Case("drlora-base").prompts]
    model = tiny_models.load(TINY_MOE)
    golden = ("drlora", "experts-unsloth-grouped", "experts-peft-0.18", "moe-all-linear")
    result = [prompt for name in golden for prompt in Case(name).prompts]
    result += [Prompt("base", p.ids, p.greedy, p.logits) for p in Case("drlora-base").prompts]
    attention = mixtures.dynmole(model, QKVO, seed=5)
    attention.save(adapters["attention"])
    with attention.attached(model):
        result += [answer(model, "attention", token_ids, steps=12) for token_ids in ids]
    both = peft_lora(model, QKVO, FUSED, adapters["both"])
    return result + [answer(both, "both", token_ids, steps=12) for token_ids in ids]


@pytest.fixture(scope="module")
def llm(prompts: list[Prompt], adapters: dict[str, Path]) -> Iterator[Any]:
    with engine(model=str(TINY_MOE), enforce_eager=True) as llm:
        for name in adapters:
            llm.llm_engine.add_lora(request(name, adapters))
        yield llm


def test_base_and_adapters_in_one_batch_match_the_oracle(
    llm: Any, prompts: list[Prompt], adapters: dict[str, Path]
) -> None:
    mixed = sorted(prompts, key=lambda prompt: len(prompt.ids))
    assert_golden(ask(llm, mixed, others=adapters), mixed)


@pytest.mark.parametrize("case", ["drlora", "base"])
def test_alone_matches_the_oracle(
    llm: Any, prompts: list[Prompt], adapters: dict[str, Path], case: str
) -> None:
    llm.reset_prefix_cache()
    for prompt in prompts:
        if prompt.case == case:
            assert_golden(ask(llm, [prompt], others=adapters), [prompt])


def test_the_worker_names_blocks_and_experts(llm: Any) -> None:
    base = ask_worker(llm, protocol.DESCRIBE, protocol.Empty())
    sizes = Moe(experts=4, hidden=64, intermediate=48)
    assert base.moes == {f"layers.{i}.mlp": sizes for i in range(2)}
    assert base.refused.keys() == {"classifier"}
    assert base.linears["layers.1.mlp.gate"] == (64, 4)
    assert base.ffns == {}


def test_unloading_frees_the_experts_and_loading_again_serves(
    llm: Any, prompts: list[Prompt], adapters: dict[str, Path]
) -> None:
    drlora = request("drlora", adapters)
    before = ask_worker(llm, protocol.STATS, protocol.StatsRequest())
    stored = load_file(Case("drlora").path / "adapter_model.safetensors")
    held = before.adapters[drlora.lora_int_id].resident_bytes
    assert held == 4 * sum(t.numel() for t in stored.values())
    assert llm.llm_engine.remove_lora(drlora.lora_int_id)
    after = ask_worker(llm, protocol.STATS, protocol.StatsRequest())
    assert after.adapters[drlora.lora_int_id].resident_bytes is None
    others = [prompt for prompt in prompts if prompt.case != "drlora"]
    assert_golden(ask(llm, others, others=adapters), others)
    llm.llm_engine.add_lora(drlora)
    routed_prompts = [prompt for prompt in prompts if prompt.case == "drlora"]
    assert_golden(ask(llm, routed_prompts, others=adapters), routed_prompts)


def edit(directory: Path, target: Path, change: Any) -> Path:
    """A copy of an adapter with tensors changed in place."""
    target.mkdir()
    tensors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


STEM = "base_model.model.model.layers.0.mlp.experts.3.up_proj"


def wider(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[f"{STEM}.lora_B.weight"] = torch.ones(49, 8)


def another_expert(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".experts.3." in name]:
        tensors[name.replace(".experts.3.", ".experts.4.")] = tensors.pop(name)
    for patterns in (config["rank_pattern"], config["alpha_pattern"]):
        for name in [name for name in patterns if ".experts.3." in name]:
            patterns[name.replace(".experts.3.", ".experts.4.")] = patterns[name]


def half_gone(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del tensors[f"{STEM}.lora_A.weight"]


def a_wider_router(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors.clear()
    tensors["base_model.model.model.layers.0.mlp.gate.lora_A.weight"] = torch.ones(4, 64)
    tensors["base_model.model.model.layers.0.mlp.gate.lora_B.weight"] = torch.ones(5, 4)
    config["target_modules"] = ["gate"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider, r"experts\.3\.up_proj\.b: found \[49, 8\], expected \[48, 8\]"),
        (another_expert, r"layers\.0\.mlp\.experts\.4\.down_proj: found no such linear"),
        (half_gone, r"experts\.3\.up_proj\.lora_A\.weight: found no such tensor"),
        (a_wider_router, r"layers\.0\.mlp\.gate\.b: found \[5, 4\], expected \[4, 4\]"),
    ],
)
def test_broken_adapters_are_refused_and_the_others_serve(
    llm: Any,
    prompts: list[Prompt],
    adapters: dict[str, Path],
    tmp_path: Path,
    change: Any,
    message: str,
) -> None:
    from vllm.lora.request import LoRARequest

    broken = edit(Case("drlora").path, tmp_path / "broken", change)
    with pytest.raises(Exception, match=message):
        llm.llm_engine.add_lora(LoRARequest("broken", 40, str(broken)))
    assert 40 not in llm.llm_engine.list_loras()
    routed_prompts = [prompt for prompt in prompts if prompt.case == "drlora"][:1]
    assert_golden(ask(llm, routed_prompts, others=adapters), routed_prompts)


def test_mixlora_on_experts_is_refused(llm: Any) -> None:
    from vllm.lora.request import LoRARequest

    with pytest.raises(Exception, match="an FFN mixture on a block of 4 experts"):
        llm.llm_engine.add_lora(LoRARequest("mixlora", 41, str(Case("mixlora").path)))


def test_an_adapter_met_in_a_step_that_cannot_be_loaded_is_void(
    llm: Any, prompts: list[Prompt], adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Also its experts' outputs: it must not answer as the base."""
    routed_prompts = [prompt for prompt in prompts if prompt.case in ("base", "drlora")][:1]
    base = next(prompt for prompt in prompts if prompt.case == "base")
    void = Prompt("void", base.ids, base.greedy, base.logits)
    replies = ask(llm, [*routed_prompts, void], others={**adapters, "void": tmp_path})
    assert_golden(replies[:1], routed_prompts)
    assert replies[1].tokens != base.greedy


def test_experts_merged_into_the_base_weights(
    prompts: list[Prompt], adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The base and the other adapters subtract them again."""
    native.write(merge_static(formats.read(Case("drlora").path))[0], tmp_path / "resident")
    molehill = {"merged_base": str(tmp_path / "resident")}
    options = {"enforce_eager": True, "additional_config": {"molehill": molehill}}
    with engine(model=str(TINY_MOE), **options) as llm:
        assert_golden(ask(llm, prompts, others=adapters), prompts)


def test_compiled_on_two_ranks_matches_the_oracle(
    prompts: list[Prompt], adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `molehill serve --tensor-parallel-size 2` runs it: experts' inner width is split.

    Dynamo's graph is run as it is. What Inductor makes of graphs with adapters is in
    tests/server/test_merging.py, and its C++ would be compiled here on each rank.
    """
    from vllm.platforms.cpu import CpuPlatform

    from molehill.engine.vllm.compilation import allow_compilation

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    # The gate is lifted for this engine only.
    monkeypatch.setattr(CpuPlatform, "check_and_update_config", CpuPlatform.check_and_update_config)
    allow_compilation()
    two_ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(model=str(TINY_MOE), **two_ranks) as llm:
        assert_golden(ask(llm, prompts, others=adapters), prompts)
