"""X-LoRAs that PEFT makes, on the tiny model, and PEFT's model that answers with them."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from molehill.engine import formats
from molehill.engine.formats.readers.non_granular import with_given
from molehill.engine.hf.reference import attach
from support.asking import LOGIT_TOLERANCE, Reply
from support.golden import TINY_LLAMA, Case, greatest_difference
from support.oracle import answer

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
# Of these, after how many tokens of an answer scalings are kept.
KEPT = {
    "layerwise, deep": (0, 1, 4, 7, 10**9),
    "top 2, not normalised": (2,),
    "shared scalings": (0,),
    "a first pass with experts": (1,),
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


def non_granular(directory: Path, tokens: int | None) -> Path:
    """The golden X-LoRA in `directory`, with as many tokens of an answer with scalings of their
    own; None: all."""
    return keep_after(Case("xlora").path, directory, tokens)


def keep_after(source: Path, directory: Path, tokens: int | None) -> Path:
    """A copy of an X-LoRA of PEFT's with that number in its config."""
    shutil.copytree(source, directory)
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"non_granular_after": tokens}))
    return directory


@torch.no_grad()
def golden_answer(prompt: Sequence[int], tokens: int, steps: int) -> list[int]:
    """Greedy tokens of the golden X-LoRA by the definition, with so many tokens' own scalings."""
    adapter, model = formats.read(Case("xlora").path), base()
    with attach(model, with_given(adapter, tokens), prompt=len(prompt)):
        return list(answer(model, f"xlora after {tokens}", prompt, steps).greedy)


@dataclass(frozen=True)
class KeptAnswer:
    """What PEFT's model answers where it keeps the scalings after `tokens` tokens of the answer:
    greedy tokens, and the logits that each was chosen of, `[steps, vocabulary]`."""

    case: str
    ids: tuple[int, ...]
    tokens: int
    greedy: tuple[int, ...]
    logits: Tensor


@torch.no_grad()
def kept_answer(
    model: Any, case: str, prompt: Sequence[int], tokens: int, steps: int
) -> KeptAnswer:
    ids, logits = list(prompt), []
    with keeping(model, len(prompt), tokens):
        for _ in range(steps):
            logits.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
            ids.append(int(logits[-1].argmax()))
    greedy = tuple(ids[len(prompt) :])
    return KeptAnswer(case, tuple(prompt), tokens, greedy, torch.stack(logits))


def assert_kept(
    replies: Sequence[Reply],
    answers: Sequence[KeptAnswer],
    exact: Mapping[tuple[int, ...], tuple[int, ...]],
) -> None:
    """exact: answers by prompt where every token has scalings of its own. Of an answer of so many
    steps the last token is not read, so that keeping after the one before it changes nothing."""
    others = set()
    for reply, kept in zip(replies, answers, strict=True):
        steps = len(kept.greedy)
        assert reply.tokens[:steps] == kept.greedy, kept.case
        for step in {min(each, steps - 1) for each in (kept.tokens, kept.tokens + 1, steps)}:
            logits = reply.logits_at(step)
            assert greatest_difference(logits, kept.logits[step]) <= LOGIT_TOLERANCE, kept.case
        same = kept.tokens + 1
        assert kept.greedy[:same] == exact[kept.ids][:same], kept.case
        if kept.greedy != exact[kept.ids]:
            others.add(kept.case)
    assert len(others) > 1


@contextmanager
def keeping(model: nn.Module, prompt: int, tokens: int) -> Iterator[None]:
    """PEFT's model, whose classifier gives every token after the first `tokens` of an answer to
    `prompt` tokens the scalings of the last of these."""
    last = prompt + tokens - 1

    def keep(module: nn.Module, args: Any, scalings: Tensor) -> Tensor:
        positions = torch.arange(scalings.shape[1]).clamp(max=last)
        return scalings[:, positions]

    hook = model.base_model.internal_xlora_classifier.register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()
