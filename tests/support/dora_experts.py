"""MixLoRA whose experts are DoRA: an oracle in plain torch, its linears PEFT's own.

Each expert is one PEFT adapter of the model, with DoRA on gate_proj and up_proj and plain LoRA on
down_proj. An FFN's forward runs it once per expert and mixes the outputs, as MixLoRA is defined.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="the dev extra is not installed")

EXPERTS, TOP_K, RANK, ALPHA = 3, 2, 4, 6
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Oracle:
    """model: with the mixture on it. tensors: of the adapter's file."""

    model: nn.Module
    tensors: dict[str, Tensor]

    def save(self, directory: Path) -> Path:
        directory.mkdir(parents=True)
        save_file(self.tensors, directory / "adapter_model.safetensors")
        config = {
            "peft_type": "MIXLORA",
            "routing_strategy": "mixlora",
            "num_experts": EXPERTS,
            "top_k": TOP_K,
            "r": RANK,
            "lora_alpha": ALPHA,
            "use_dora": True,
            "target_modules": list(PROJECTIONS),
        }
        (directory / "adapter_config.json").write_text(json.dumps(config))
        return directory


def make(model: nn.Module) -> Oracle:
    """Changes the model, a Llama."""
    torch.manual_seed(11)
    wrapped = _wrap(model)
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(wrapped.get_base_model().model.layers):
        router = torch.randn(EXPERTS, layer.mlp.gate_proj.in_features)
        layer.mlp.forward = _mixed(layer.mlp, router)
        tensors[f"mixlora.layers.{i}.mlp.moe_gate.weight"] = router
        for name in PROJECTIONS:
            tensors |= _tensors(f"mixlora.layers.{i}.mlp.{name}.experts", getattr(layer.mlp, name))
    return Oracle(wrapped, tensors)


def _wrap(model: nn.Module) -> nn.Module:
    dora = {"target_modules": ["gate_proj", "up_proj"], "use_dora": True}
    shared = {"r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM"}
    plain = {"target_modules": ["down_proj"]}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**shared, **dora), "dora0")
    for e in range(1, EXPERTS):
        wrapped.add_adapter(f"dora{e}", peft.LoraConfig(**shared, **dora))
    for e in range(EXPERTS):
        wrapped.add_adapter(f"plain{e}", peft.LoraConfig(**shared, **plain))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
    return wrapped.eval()


def _mixed(mlp: nn.Module, router: Tensor):
    def forward(x: Tensor) -> Tensor:
        p = torch.softmax(x.float() @ router.T, dim=-1)
        values, chosen = p.topk(TOP_K, dim=-1)
        weights = torch.zeros_like(p).scatter(-1, chosen, values / values.sum(-1, keepdim=True))
        y = torch.zeros_like(x)
        for e in range(EXPERTS):
            for name in PROJECTIONS:
                kind = "plain" if name == "down_proj" else "dora"
                getattr(mlp, name).set_adapter(f"{kind}{e}")
            hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            y = y + weights[..., e : e + 1] * mlp.down_proj(hidden)
        return y

    return forward


def _tensors(stem: str, linear: nn.Module) -> dict[str, Tensor]:
    result = {}
    for adapter, a in linear.lora_A.items():
        e = adapter[-1]
        result[f"{stem}.{e}.lora_A.weight"] = a.weight.detach().clone()
        result[f"{stem}.{e}.lora_B.weight"] = linear.lora_B[adapter].weight.detach().clone()
        if adapter in linear.lora_magnitude_vector:
            magnitude = linear.lora_magnitude_vector[adapter].weight
            result[f"{stem}.{e}.lora_magnitude_vector"] = magnitude.detach().clone()
    return result
