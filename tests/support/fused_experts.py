"""LoRA on fused experts: its files and its oracle."""

import pytest
import torch

LOGITS = 1e-3


@torch.no_grad()
def logits_of(model, tokens):
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


def check_oracle(model, case):
    for i, prompt in enumerate(case.prompts):
        logits = logits_of(model, list(prompt.ids))
        torch.testing.assert_close(logits[-1], prompt.logits, rtol=0, atol=LOGITS)
        if i == 0:
            expected = case.tensors["prompt0.logits"]
            torch.testing.assert_close(logits, expected, rtol=0, atol=LOGITS)
        tokens = list(prompt.ids)
        for _ in prompt.greedy:
            tokens.append(int(logits_of(model, tokens)[-1].argmax()))
        assert tuple(tokens[len(prompt.ids) :]) == prompt.greedy


def save_peft(model, directory, **config):
    """A random LoRA of PEFT's on a copy of the model; its logits for some tokens."""
    import copy

    hf_peft = pytest.importorskip("peft", reason="the dev extra is not installed")
    config = hf_peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **config)
    torch.manual_seed(5)
    wrapped = hf_peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    wrapped.eval().save_pretrained(directory)
    return logits_of(wrapped, TOKENS)


TOKENS = [303, 316, 288, 262, 352, 17, 5]

FUSED = {
    "both": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "bare names": {"target_parameters": ["down_proj", "gate_up_proj"]},
    "gate and up": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "down": {"target_parameters": ["mlp.experts.down_proj"]},
    "patterns": {
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 6},
        "alpha_pattern": {"layers.1.mlp.experts.down_proj": 9},
        "use_rslora": True,
    },
}
