"""X-LoRAs that PEFT makes, on the tiny model, and PEFT's model that answers with them."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from support.golden import TINY_LLAMA

# Of each expert; the last leaves out what others have.
EXPERTS: tuple[dict[str, Any], ...] = (
    {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    {"r": 3, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "o_proj"]},
    {"r": 1, "lora_alpha": 2, "target_modules": ["down_proj", "gate_proj"]},
)
SHALLOW = {"xlora_depth": 1}
DEEP = {"xlora_depth": 3, "xlora_size": 24, "xlora_dropout_p": 0.0}
# By what they try.
VARIANTS: dict[str, dict[str, Any]] = {
    "shared scalings": {**SHALLOW, "softmax_temperature": 0.5},
    "layerwise, deep": {**DEEP, "layerwise_scalings": True, "global_scaling_weight": 1.5},
    "top 2, not normalised": {**DEEP, "layerwise_scalings": True, "top_k_lora": 2},
    "top 2 by softmax": {
        **SHALLOW,
        "layerwise_scalings": True,
        "enable_softmax": False,
        "enable_softmax_topk": True,
        "top_k_lora": 2,
    },
    "logits as they are": {**SHALLOW, "layerwise_scalings": True, "enable_softmax": False},
    "a first pass with experts": {
        "xlora_depth": 2,
        "xlora_size": 24,
        "layerwise_scalings": True,
        "scaling_pass_value": 0.5,
    },
}


def base() -> Any:
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()
    model.config.use_cache = False
    return model


def save_experts(directory: Path) -> None:
    """A LoRA for each of EXPERTS, in directories 0, 1 and 2."""
    import peft

    torch.manual_seed(3)
    for i, config in enumerate(EXPERTS):
        expert = peft.get_peft_model(base(), peft.LoraConfig(task_type="CAUSAL_LM", **config))
        for name, parameter in expert.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        expert.save_pretrained(directory / str(i))


def make(experts: Path, directory: Path, seed: int = 5, **config: Any) -> nn.Module:
    """Saves an X-LoRA in `directory`, with what `save_experts` saved in `experts` below it; PEFT's
    model.

    As PEFT 0.13 saved them: 0.21.2 leaves `layers.0` of the classifier out, whose name it takes for
    that of expert 0, and writes all of the model over the experts.
    """
    import peft

    shutil.copytree(experts, directory)
    adapters = {str(i): str(directory / str(i)) for i in range(len(EXPERTS))}
    whole = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, adapters=adapters, **config)
    torch.manual_seed(seed)
    model = peft.get_peft_model(base(), whole).eval()
    tensors = {}
    for name, parameter in model.named_parameters():
        if "internal_xlora_classifier" in name:
            nn.init.normal_(parameter, std=0.3)
            tensors[name] = parameter.detach().clone()
    save_file(tensors, directory / "adapter_model.safetensors")
    whole.save_pretrained(directory)
    return model
