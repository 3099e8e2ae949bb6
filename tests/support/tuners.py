"""Adapters of PEFT's other tuners on the tiny model, as PEFT saves them, with what PEFT answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support.authored import Authored, answers, tiny_llama

PROMPT = (5, 17, 30, 8, 41, 3, 22)


@dataclass(frozen=True)
class Tuner:
    """config: of PEFT's class of that name. scales: how far a parameter is changed at random, by a
    part of its name; the first that fits."""

    config: str
    options: Mapping[str, Any]
    scales: Mapping[str, float] = field(default_factory=dict)


TUNERS: Mapping[str, Tuner] = {
    "lora-bias": Tuner(
        "LoraConfig",
        {
            "r": 4,
            "lora_alpha": 6,
            "lora_bias": True,
            "target_modules": ["q_proj", "o_proj", "up_proj"],
        },
        {"lora_": 0.3},
    ),
    "adalora": Tuner(
        "AdaLoraConfig",
        {
            "init_r": 5,
            "target_r": 3,
            "lora_alpha": 9,
            "total_step": 10,
            "target_modules": ["q_proj", "o_proj", "down_proj"],
        },
        {"lora_E": 1.0, "lora_": 0.3},
    ),
    "vera": Tuner(
        "VeraConfig",
        {"r": 6, "target_modules": ["q_proj", "k_proj", "down_proj"]},
        {"vera_lambda": 0.8},
    ),
    "vera-seeded": Tuner(
        "VeraConfig",
        {
            "r": 6,
            "target_modules": ["k_proj", "up_proj"],
            "save_projection": False,
            "projection_prng_key": 7,
        },
        {"vera_lambda": 0.8},
    ),
    "loha": Tuner(
        "LoHaConfig",
        {
            "r": 3,
            "alpha": 5,
            "target_modules": ["v_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.v_proj": 2},
            "alpha_pattern": {"down_proj": 7},
        },
        {"hada_": 0.3},
    ),
    "lokr": Tuner(
        "LoKrConfig",
        {"r": 2, "alpha": 3, "target_modules": ["q_proj", "k_proj", "down_proj"]},
        {"lokr_": 0.2},
    ),
    "lokr-both": Tuner(
        "LoKrConfig",
        {"r": 2, "alpha": 3, "decompose_both": True, "target_modules": ["o_proj", "up_proj"]},
        {"lokr_": 0.3},
    ),
    "lokr-whole": Tuner(
        "LoKrConfig",
        {"r": 64, "alpha": 64, "decompose_factor": 4, "target_modules": ["k_proj"]},
        {"lokr_": 0.1},
    ),
    "hra": Tuner(
        "HRAConfig",
        {"r": 3, "init_weights": False, "target_modules": ["q_proj", "down_proj"]},
        {"hra_u": 0.3},
    ),
    "hra-orthogonal": Tuner(
        "HRAConfig",
        {"r": 4, "apply_GS": True, "target_modules": ["v_proj", "gate_proj"]},
        {"hra_u": 0.3},
    ),
    "miss": Tuner(
        "MissConfig",
        {"r": 6, "target_modules": ["q_proj", "k_proj", "down_proj"]},
        {"miss_block": 0.05},
    ),
    "miss-mini": Tuner(
        "MissConfig",
        {"r": 8, "mini_r": 4, "init_weights": "mini", "target_modules": ["k_proj", "up_proj"]},
        {"miss_block": 0.05},
    ),
    "ia3": Tuner(
        "IA3Config",
        {
            "target_modules": ["k_proj", "o_proj", "up_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        {"ia3_l": 0.4},
    ),
}


def tuned(tuner: Tuner, seed: int = 0) -> Any:
    """PEFT's model with the tuner in it, its trainable numbers changed at random."""
    import peft

    config = getattr(peft, tuner.config)(task_type="CAUSAL_LM", **tuner.options)
    torch.manual_seed(seed)
    model = peft.get_peft_model(tiny_llama(), config)
    change(model, tuner.scales, seed)
    return model.eval()


def change(model: nn.Module, scales: Mapping[str, float], seed: int) -> None:
    """Adds noise to the parameters that `scales` names."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = next((value for part, value in scales.items() if part in name), None)
        if scale is not None:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + scale * noise


def save(name: str, directory: Path, seed: int = 0) -> Any:
    """An adapter of TUNERS; the model that answers with it."""
    model = tuned(TUNERS[name], seed)
    model.save_pretrained(directory)
    return model


# Those that go through engines and servers, with seeds that leave no doubt about greedy tokens.
SERVED = {"lora-bias": 0, "adalora": 1, "vera": 0, "loha": 0, "hra": 0, "ia3": 1}


def author_tuners(root: Path) -> list[Authored]:
    """Writes those of SERVED below `root`."""
    return [
        Authored(name, root / name, answers(name, save(name, root / name, seed)))
        for name, seed in SERVED.items()
    ]


@torch.no_grad()
def logits(model: Callable[..., Any]) -> Tensor:
    result: Tensor = model(torch.tensor([PROMPT]), use_cache=False).logits[0]
    return result
