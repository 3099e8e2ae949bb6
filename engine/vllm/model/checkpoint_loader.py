"""Loads a base model whose tensors are changed as they come from its checkpoint.

That is before vLLM shards, fuses and packs them, and so whatever it does with them.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

# vLLM's formats whose loader yields a checkpoint's tensors one by one and under their own names.
FORMATS = ("auto", "hf", "safetensors")
_PREFIX = "molehill-"

# Of (name, tensor) pairs, in the dtype that is served.
Change = Callable[[Iterator[tuple[str, Tensor]], torch.dtype], Iterator[tuple[str, Tensor]]]
_changes: list[Change] = []


def begin() -> None:
    """This process loads checkpoints as they are, until the next `add`."""
    _changes.clear()


def add(config: VllmConfig, change: Change) -> None:
    """Makes this process load the base of `config` with a change, after those before it. The load
    format must be one of FORMATS."""
    load = config.load_config
    _changes.append(change)
    if not load.load_format.startswith(_PREFIX):
        load.load_format = _PREFIX + load.load_format


class ChangingLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's loader for a checkpoint, with the changes made to what it yields."""

    def __init__(self, load_config: Any) -> None:
        plain = copy.copy(load_config)
        plain.load_format = load_config.load_format.removeprefix(_PREFIX)
        super().__init__(plain)

    def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
        weights = super().get_all_weights(model_config, model)
        for change in _changes:
            weights = change(weights, model_config.dtype)
        yield from weights


for _format in FORMATS:
    register_model_loader(_PREFIX + _format)(ChangingLoader)
