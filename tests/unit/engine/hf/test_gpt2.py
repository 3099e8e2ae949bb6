"""GPT-2, whose layers are `transformer.h` and whose linears keep W^T (`fan_in_fan_out`)."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_models
from support.fused_experts import TOKENS, logits_of, save_peft

from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.adapter.validation import problems
from molehill.engine.formats import native
from molehill.engine.hf.reference import attach
from molehill.engine.hf.shapes import base_model
from molehill.engine.transform.merge_checkpoint import merge_checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_models.build("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.mark.parametrize("flag", [True, False])
def test_a_lora_on_conv1d_gives_pefts_logits(path, tmp_path, flag):
    """A and B are the same, whatever the config says of how the base stores W."""
    model = tiny_models.load(path)
    linears = ["c_attn", "c_proj", "c_fc"]
    expected = save_peft(model, tmp_path, target_modules=linears, fan_in_fan_out=True)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fan_in_fan_out": flag}))
    adapter = formats.read(tmp_path)
    assert adapter.warnings == ()
    assert "h.0.attn.c_attn" in adapter.sites
    assert problems(adapter, base_model(path), Limits()) == []
    assert (logits_of(model, TOKENS) - expected).abs().max() > 0.1
    with attach(model, adapter):
        torch.testing.assert_close(logits_of(model, TOKENS), expected, rtol=0, atol=1e-4)
    native.write(adapter, tmp_path / "native")
    assert formats.read(tmp_path / "native").digest == adapter.digest
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".transformer.h." in name for name in names)


def test_merging_into_transposed_weights_is_refused(path, tmp_path):
    save_peft(tiny_models.load(path), tmp_path / "a", target_modules=["c_fc"], fan_in_fan_out=True)
    with pytest.raises(UnsupportedError, match=r"stored as \[in, out\]"):
        merge_checkpoint(path, formats.read(tmp_path / "a"), tmp_path / "b")
