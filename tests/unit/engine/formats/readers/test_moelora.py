"""MOELoRA, written a second time from its authors' code: one task's copy answers as it does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.authored import replaced, tiny_llama
from support.broken import refusal
from torch import Tensor, nn

from molehill.api.cli import convert
from molehill.engine import formats
from molehill.engine.adapter.errors import (
    AdapterError,
    ConfigError,
    CorruptFileError,
    NonFiniteError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.hf.reference import attach
from molehill.engine.transform.merge import is_plain, merge_static

EXPERTS, RANK, ALPHA, TASKS, WIDTH = 3, 6, 9, 4, 5
TARGETS = ("self_attn.q_proj", "mlp.up_proj")
NAME = "model.layers.1.self_attn.q_proj"


class Linear(nn.Module):
    """MMOELoraLinear: y = W x + alpha / r * sum_i g[task]_i B_i A_i x, of r // E ranks each."""

    def __init__(self, base: nn.Linear, draw: torch.Generator) -> None:
        super().__init__()
        rank_of_one, inputs, out = RANK // EXPERTS, base.in_features, base.out_features
        self.base, self.weights = base, torch.empty(0)
        self.a = [random(rank_of_one, inputs, draw=draw) / inputs**0.5 for _ in range(EXPERTS)]
        self.b = [random(out, rank_of_one, draw=draw) / 4 for _ in range(EXPERTS)]
        self.tasks, self.gate = (
            random(TASKS + 1, WIDTH, draw=draw),
            random(EXPERTS, WIDTH, draw=draw),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        for i in range(EXPERTS):
            result = result + x @ self.a[i].T @ self.b[i].T * (ALPHA / RANK) * self.weights[i]
        return result

    def state(self) -> dict[str, Tensor]:
        result = {"lora_task_embedding.weight": self.tasks, "lora_gate.GateL.weight": self.gate}
        for i in range(EXPERTS):
            for name in (f"{i}.weight", f"{i}.mlp.weight"):
                result[f"lora_A.loraA.{name}"] = self.a[i].clone()
                result[f"lora_B.loraB.{name}"] = self.b[i].clone()
        return result


def random(*shape: int, draw: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=draw)


def gate_weights(tasks: Tensor, gate: Tensor, task: int) -> Tensor:
    return torch.softmax(gate @ tasks[task], dim=0)


class Authored:
    """A model with these linears, and its files. shared: one gate for all, as MMOELORAS has it."""

    def __init__(self, folder: Path, *, shared: bool) -> None:
        draw = torch.Generator().manual_seed(3)
        self.model, self.shared, self.folder = tiny_llama(), shared, folder
        self.modules = {
            name: Linear(self.model.get_submodule(name), draw)
            for name in (f"model.layers.{i}.{target}" for i in range(4) for target in TARGETS)
        }
        self.tasks, self.gate = (
            random(TASKS + 1, WIDTH, draw=draw),
            random(EXPERTS, WIDTH, draw=draw),
        )
        self.config = {
            "peft_type": "MMOELORAS" if shared else "MMOELORA",
            "task_type": "CAUSAL_LMS",
            "r": RANK,
            "lora_alpha": ALPHA,
            "lora_dropout": 0.1,
            "expert_num": EXPERTS,
            "task_num": TASKS,
            "task_embedding_dim": WIDTH,
            "target_modules": [target.split(".")[1] for target in TARGETS],
            "inference_mode": True,
            "merge_weights": False,
        }
        self.tensors = {
            f"base_model.model.{name}.{part}": tensor
            for name, module in self.modules.items()
            for part, tensor in module.state().items()
        }
        if shared:
            self.tensors["lora_task_embedding.weight"] = self.tasks
            self.tensors["lora_gate.GateL.weight"] = self.gate
        self.save()

    def save(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "adapter_config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, self.folder / "adapter_model.safetensors")

    @torch.no_grad()
    def logits(self, task: int, tokens: Tensor) -> Tensor:
        for module in self.modules.values():
            tasks_and_gate = (self.tasks, self.gate) if self.shared else (module.tasks, module.gate)
            module.weights = gate_weights(*tasks_and_gate, task)
        with replaced(self.model, self.modules):
            result: Tensor = self.model(tokens, use_cache=False).logits
        return result


@pytest.fixture(params=[True, False], ids=["one gate for all", "a gate each"])
def authored(request, tmp_path):
    return Authored(tmp_path / "moelora", shared=request.param)


@torch.no_grad()
def test_a_tasks_copy_answers_as_the_authors_code(authored, tmp_path):
    tokens, result = torch.tensor([[303, 316, 288, 262, 352, 17]]), {}
    for task in (1, TASKS):
        expected = authored.logits(task, tokens)
        copy = tmp_path / str(task)
        assert convert.main([str(authored.folder), str(copy), "--task", str(task)]) == 0
        adapter = formats.read(copy)
        with attach(authored.model, adapter):
            result[task] = authored.model(tokens, use_cache=False).logits
        torch.testing.assert_close(result[task], expected, rtol=0, atol=1e-4)
        assert (adapter.kind, len(adapter.sites), adapter.warnings) == ("moelora", 8, ())
    assert (result[1] - result[TASKS]).abs().max() > 0.1
    # Nothing is left to decide: it serves as a plain LoRA.
    merged, _ = merge_static(adapter)
    assert all(is_plain(mixture) for mixture in merged.sites.values())


def test_without_a_task_it_is_refused_with_the_command(authored):
    error = refusal(UnsupportedError, authored.folder)
    assert error.where == "adapter_config.json: peft_type"
    assert "(MOELoRA), whose gate weights go by a task that no request names" in error.found
    assert error.expected == "a copy for one task: molehill convert SRC DST --task N"


STEM = f"base_model.model.{NAME}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config", "tensors", "message"),
    [
        (ShapeError, {"expert_num": 2}, {}, "3 experts, expected expert_num 2"),
        (ConfigError, {"r": 7}, {}, "r: found 7, expected a multiple of expert_num, 3"),
        (ShapeError, {"r": 9}, {}, "found rank 2, expected the config's rank 3"),
        (
            CorruptFileError,
            {},
            {f"{STEM}.lora_A.loraA.1.weight": torch.ones(2, 64)},
            "other values",
        ),
        (UnsupportedError, {}, {f"{STEM}.lora_A.weight": torch.ones(2, 64)}, "an unknown tensor"),
        (
            NonFiniteError,
            {},
            {"lora_gate.GateL.weight": torch.full((EXPERTS, WIDTH), 3e38)},
            "lora_gate.GateL.weight: found NaN or Inf for task 1",
        ),
        (
            ShapeError,
            {},
            {"lora_gate.GateL.weight": torch.ones(EXPERTS, 2)},
            "found [3, 2], expected [3, 5]",
        ),
    ],
    ids=str,
)
def test_what_is_refused(tmp_path, kind, config, tensors, message):
    authored = Authored(tmp_path / "moelora", shared=True)
    authored.config.update(config)
    authored.tensors.update(tensors)
    authored.save()
    with pytest.raises(kind) as caught:
        formats.read(authored.folder, task=1)
    assert message in str(caught.value)


def test_a_task_beyond_the_embeddings(tmp_path):
    authored = Authored(tmp_path / "moelora", shared=True)
    with pytest.raises(ConfigError, match=r"task: found 5, expected 0 to 4, the rows of lora_task"):
        formats.read(authored.folder, task=TASKS + 1)


@pytest.mark.parametrize("case", ["dora", "flylora", "mov"])
def test_a_task_means_nothing_to_others(golden, case):
    with pytest.raises(AdapterError, match="task: found 1, expected none: these gate weights do"):
        formats.read(golden / "cases" / case, task=1)
