"""gpt-oss: its attention, whose linears have biases, is adapted as any; its experts are refused."""

import pytest
import torch
from support import tiny_models
from support.fused_experts import TOKENS, logits_of, save_peft

from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.adapter.validation import problems
from molehill.engine.hf.reference import attach
from molehill.engine.hf.shapes import base_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_models.build("gpt_oss", tmp_path_factory.mktemp("gpt_oss"))


@pytest.mark.parametrize("options", [{}, {"bias": "lora_only"}, {"lora_bias": True}], ids=str)
def test_its_attention_gives_pefts_logits(path, tmp_path, options):
    model = tiny_models.load(path)
    expected = save_peft(model, tmp_path, target_modules=["q_proj", "o_proj"], **options)
    adapter = formats.read(tmp_path)
    assert problems(adapter, base_model(path), Limits()) == []
    assert len(adapter.biases) == (4 if options else 0)
    with attach(model, adapter):
        torch.testing.assert_close(logits_of(model, TOKENS), expected, rtol=0, atol=1e-4)


def test_its_experts_are_refused_with_what_they_are(path, tmp_path):
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = tiny_models.load(path)
    save_peft(model, tmp_path, target_modules=["q_proj"], target_parameters=names)
    errors = problems(formats.read(tmp_path), base_model(path), Limits())
    assert len(errors) == 2 * 4 * 3
    for error in errors:
        assert isinstance(error, UnsupportedError)
        assert error.where.startswith(("layers.0.mlp.experts.", "layers.1.mlp.experts."))
        assert error.found == (
            "experts that the base holds with weights as [in, out] and gate and up interleaved "
            "and biases"
        )
