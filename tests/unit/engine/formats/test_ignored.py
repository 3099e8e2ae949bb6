"""Tensors for linears that the base does not compute: k and v of layers that share a KV cache."""

import pytest
from support.broken import refusal

from molehill.engine import formats
from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import MissingTensorError
from molehill.engine.hf.shapes import base_model

K_PROJ = "layers.3.self_attn.k_proj"
STEM = f"base_model.model.model.{K_PROJ}"


@pytest.fixture
def base(golden) -> BaseModel:
    """The tiny Llama, as if its last layer took k from another."""
    whole = base_model(golden / "tiny-llama")
    linears = {site: shape for site, shape in whole.linears.items() if site != K_PROJ}
    return BaseModel("m", "A", linears, whole.ffns, ignored=frozenset({K_PROJ}))


def test_they_are_left_out_with_a_warning(golden, base):
    whole = formats.read(golden / "cases" / "lora")
    adapter = formats.read(golden / "cases" / "lora", base=base)
    assert whole.sites.keys() - adapter.sites.keys() == {K_PROJ}
    assert adapter.warnings[-1] == (
        f"{K_PROJ}: left out, and 0 more: these layers take k and v from another's KV cache"
    )


def test_a_file_without_them_is_whole_for_such_a_base_alone(edited, base):
    gone = {f"{STEM}.lora_{half}.weight": None for half in "AB"}
    directory = edited("lora", tensors=gone)
    assert K_PROJ not in formats.read(directory, base=base).sites
    assert K_PROJ in refusal(MissingTensorError, directory).where
