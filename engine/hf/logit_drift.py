"""How far two adapters, or an adapter and none, are apart in a model's logits."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molehill.engine.adapter.model import Adapter
from molehill.engine.hf.reference import attach


@dataclass(frozen=True)
class LogitChange:
    """Over all positions of all prompts. largest: max |difference|. spread: the logits' standard
    deviation, to hold it against. same_best: share of positions whose best token is the same."""

    largest: float
    spread: float
    same_best: float
    positions: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"change by at most {self.largest:.3g} (their standard deviation is "
            f"{self.spread:.3g}); same best token at {100 * self.same_best:.1f} % of "
            f"{self.positions} positions"
        )


@torch.inference_mode()
def logit_change(
    model: nn.Module, one: Adapter | None, other: Adapter | None, prompts: Sequence[Sequence[int]]
) -> LogitChange:
    """Logits of `model` with the one and with the other adapter; None is the bare model.

    prompts: token ids. The model is left as it was.
    """
    first, second = (
        torch.cat([_logits(model, adapter, prompt) for prompt in prompts])
        for adapter in (one, other)
    )
    same = (first.argmax(-1) == second.argmax(-1)).float().mean()
    largest = (first - second).abs().max()
    return LogitChange(float(largest), float(first.std()), float(same), len(first))


def _logits(model: nn.Module, adapter: Adapter | None, prompt: Sequence[int]) -> Tensor:
    attached: AbstractContextManager[nn.Module] = nullcontext(model)
    if adapter is not None:
        attached = attach(model, adapter)
    with attached:
        logits: Tensor = model(torch.tensor([list(prompt)])).logits[0].float()
    return logits
