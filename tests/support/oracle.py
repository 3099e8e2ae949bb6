"""What a Transformers model, with or without an adapter in it, answers greedily."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support.golden import Prompt

# Twice what logits may differ by.
MARGIN = 2e-3


@torch.no_grad()
def answer(model: Any, name: str, ids: Sequence[int], steps: int) -> Prompt:
    """Greedy tokens by full forwards; the margins must leave no doubt about them."""
    tokens, logits = list(ids), []
    for _ in range(steps):
        logits.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1])
        tokens.append(int(logits[-1].argmax()))
    first, second = torch.stack(logits).topk(2).values.unbind(1)
    assert (first - second).min() > MARGIN, f"{name}: choose another seed"
    return Prompt(name, tuple(ids), tuple(tokens[-steps:]), logits[0])


def peft_lora(
    model: nn.Module,
    linears: Sequence[str] | str,
    parameters: Sequence[str],
    directory: Path,
    bias: str = "none",
) -> nn.Module:
    """A random rsLoRA of PEFT's, saved, and the biases of the base that it trains; the model,
    changed, that answers with it. linears: names, or "all-linear"."""
    import peft

    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        target_modules=linears if isinstance(linears, str) else list(linears),
        target_parameters=list(parameters) or None,
        bias=bias,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(11)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.25)
        elif parameter.requires_grad and name.endswith(".bias"):
            parameter.data += 0.25 * torch.randn(parameter.shape)
    wrapped.eval().save_pretrained(directory)
    return wrapped
