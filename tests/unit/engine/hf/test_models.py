"""The reference and the base model's shapes, for many architectures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models, vocabulary
from support.architectures import ARCHITECTURES, EXTRA_VOCAB, make
from support.golden import Prompt, greatest_difference

from molehill.engine import formats
from molehill.engine.adapter.base_model import BaseModel, Limits
from molehill.engine.adapter.model import Adapter
from molehill.engine.adapter.validation import problems
from molehill.engine.hf.reference import attach
from molehill.engine.hf.shapes import base_model
from molehill.kernels.mixture import Experts, FfnMixture
from molehill.kernels.policy import TopK

LOGITS = 1e-3
Made = tuple[Any, BaseModel, dict[str, Path], list[Prompt]]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request: Any, tmp_path_factory: Any) -> Made:
    path, adapters, prompts = make(request.param, tmp_path_factory.mktemp(request.param))
    shapes = replace(base_model(path), extra_tokens=EXTRA_VOCAB)
    return tiny_models.load(path), shapes, adapters, prompts


@pytest.mark.slow
def test_every_adapter_fits_the_shapes_of_the_config(made: Made) -> None:
    _, base, adapters, _ = made
    for adapter in adapters.values():
        assert problems(formats.read(adapter, base=base), base, Limits()) == []


@pytest.mark.slow
@torch.no_grad()
def test_the_reference_gives_the_oracles_logits(made: Made) -> None:
    model, shapes, adapters, prompts = made
    for name, adapter in adapters.items():
        with attach(model, formats.read(adapter, base=shapes)):
            for prompt in prompts:
                if prompt.case == name:
                    logits = model(torch.tensor([prompt.ids]), use_cache=False).logits[0, -1]
                    assert greatest_difference(logits, prompt.logits) < LOGITS


@pytest.mark.slow
def test_every_adapter_changes_the_answer(made: Made) -> None:
    """Otherwise comparisons of adapters would compare the base with itself."""
    *_, prompts = made
    base = {prompt.ids: prompt.logits for prompt in prompts if prompt.case == "base"}
    for prompt in prompts:
        # The base cannot be asked about tokens that an adapter adds.
        if prompt.case not in ("base", *vocabulary.GROWN):
            assert greatest_difference(prompt.logits, base[prompt.ids]) > 0.5


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("phi", "no such gated FFN in the base model"),
        ("mixtral", "an FFN mixture on a block of 4 experts"),
    ],
)
def test_mixlora_needs_one_gated_ffn_per_layer(
    model_type: str, message: str, tmp_path: Path
) -> None:
    base = base_model(tiny_models.build(model_type, tmp_path))
    stack = Experts(torch.ones(4, 64), torch.ones(96, 4), (2, 2))
    mixture = FfnMixture({"up_proj": stack}, TopK(2), torch.ones(2, 64))
    (problem,) = problems(Adapter("mixlora", {"layers.1.mlp": mixture}), base, Limits())
    assert (problem.where, problem.found) == ("layers.1.mlp", message)
