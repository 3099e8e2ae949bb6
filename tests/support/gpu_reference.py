"""The golden cases' adapters on the plain Transformers model, in float32 on this GPU."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from molehill.engine import formats
from molehill.engine.hf.reference import attach
from molehill.kernels.policy import Policy
from support.golden import TINY_LLAMA, Case, Prompt


class Reference:
    """Exact float32: TF32 is off while it computes."""

    def __init__(self) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(
            TINY_LLAMA, dtype=torch.float32, attn_implementation="eager"
        )
        self._model = model.cuda().eval()

    def logits(self, prompt: Prompt, generated: tuple[int, ...] = ()) -> Tensor:
        """float32 `[1 + generated, vocabulary]`: after the prompt, and after each token that
        followed it."""
        ids = torch.tensor([[*prompt.ids, *generated]], device="cuda")
        adapter: AbstractContextManager[Any] = nullcontext()
        if prompt.case != "base":
            routed_prompts = formats.read(Case(prompt.case).path)
            sites = {site: _on_gpu(mixture) for site, mixture in routed_prompts.sites.items()}
            adapter = attach(self._model, replace(routed_prompts, sites=sites))
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.inference_mode(), adapter:
                logits = self._model(ids).logits[0, len(prompt.ids) - 1 :]
        finally:
            torch.set_float32_matmul_precision(before)
        return logits.float().cpu()


def _on_gpu(value: Any) -> Any:
    """Every tensor in a mixture's fields, at any depth."""
    if isinstance(value, Tensor):
        return value.cuda()
    if isinstance(value, Mapping):
        return {key: _on_gpu(value) for key, value in value.items()}
    if is_dataclass(value) and not isinstance(value, type | Policy):
        return replace(value, **{f.name: _on_gpu(getattr(value, f.name)) for f in fields(value)})
    return value
