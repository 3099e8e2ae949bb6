"""X-LoRA on a plain Transformers model: two forwards for one, as PEFT has it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.adapter.model import Adapter
from molehill.kernels.classifier import Classifier
from molehill.kernels.mixture import ClassifierMixture


class _Pass:
    """The forward that runs. gate_weights: of its tokens, sequences in a row; None while the
    hidden states are made."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.gate_weights: Tensor | None = None

    def of(self, tokens: int) -> Tensor | None:
        """`[tokens, places or 1, E]`; None where the base is as it is."""
        if self.gate_weights is not None:
            return self.gate_weights
        return self.classifier.first_gate_weights(tokens)


@contextmanager
def with_classifier(
    model: nn.Module,
    adapter: Adapter,
    modules: Mapping[str, nn.Module],
    prompt: int | None = None,
) -> Iterator[None]:
    """The model with all ClassifierMixtures of the adapter on it, inside the `with` block.

    modules: by canonical name, one for every site. prompt: see `reference.attach`. A forward with a
    KV cache raises UnsupportedError: each of the two would need its own.
    """
    classifier = adapter.classifier
    assert classifier is not None
    current = _Pass(classifier)

    def first(module: nn.Module, args: Any, more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if more.get("past_key_values") is not None:
            raise UnsupportedError("past_key_values", "a KV cache", "use_cache=False for X-LoRA")
        more = {**more, "use_cache": False}
        current.gate_weights = None
        # `forward`, for a call would come back here.
        made = module.forward(*args, **{**more, "output_hidden_states": True, "return_dict": True})
        weights = [classifier.gate_weights(hidden) for hidden in made.hidden_states[-1]]
        if prompt is not None:
            weights = [classifier.as_answered(each, prompt) for each in weights]
        current.gate_weights = torch.cat(weights)
        return args, more

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(first, with_kwargs=True).remove)
        for site, mixture in adapter.sites.items():
            module = modules[site]
            assert isinstance(mixture, ClassifierMixture)
            module.forward = _forward(module.forward, mixture, current)
            stack.callback(delattr, module, "forward")
        yield


def _forward(
    base: Callable[[Tensor], Tensor], mixture: ClassifierMixture, current: _Pass
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y, rows = base(x), x.flatten(0, -2).float()
        weights = current.of(len(rows))
        if weights is None:
            return y
        of_place = weights[:, mixture.place if weights.shape[1] > 1 else 0]
        delta = torch.zeros(len(rows), y.shape[-1])
        for e, (a, b) in enumerate(mixture.experts.split()):
            delta += of_place[:, e, None] * (rows @ a.T @ b.T)
        return (y.float() + delta.view(y.shape)).to(y.dtype)

    return forward
