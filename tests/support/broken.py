"""Helpers for adapters whose files are wrong."""

import pytest
import torch

from molehill.engine import formats

NAME = "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"


def refusal(kind, directory, limits=formats.DEFAULT_LIMITS):
    with pytest.raises(kind) as caught:
        formats.read(directory, limits)
    assert type(caught.value) is kind
    return caught.value


def without(golden, case, fragment):
    tensors = torch.load(golden / "cases" / case / "adapter_model.bin", weights_only=True)
    names = {name: None for name in tensors if fragment in name}
    assert names
    return names
