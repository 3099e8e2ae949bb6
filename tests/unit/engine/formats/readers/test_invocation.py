"""`alora_invocation_tokens`, of PEFT's LoRA and of any other adapter."""

import json
import shutil

import pytest
from support.broken import refusal

from molehill.engine import formats
from molehill.engine.adapter.errors import (
    ConfigError,
    CorruptFileError,
    LimitError,
    UnsupportedError,
)
from molehill.engine.formats import native

FIELD = "alora_invocation_tokens"
MIXTURES = ["mixlora", "dynmole-k1", "mola-official", "hydralora", "loramoe-official", "mov"]


def test_pefts_activated_lora_is_read(golden):
    adapter = formats.read(golden / "cases" / "alora")
    assert (adapter.kind, adapter.invocation_tokens) == ("lora", (301, 17, 302))
    assert adapter.warnings == ()
    assert len(adapter.sites) == 16


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lora", *MIXTURES])
def test_any_adapter_may_be_activated_and_is_another_by_that(golden, edited, case):
    plain = formats.read(golden / "cases" / case)
    adapter = formats.read(edited(case, {FIELD: [5, 6]}))
    assert (plain.invocation_tokens, adapter.invocation_tokens) == ((), (5, 6))
    assert adapter.digest != plain.digest
    assert adapter.warnings == plain.warnings


@pytest.mark.parametrize("absent", [None, []])
def test_none_and_an_empty_list_are_a_plain_adapter_as_in_peft(golden, edited, absent):
    adapter = formats.read(edited("lora", {"x": None} if absent is None else {FIELD: absent}))
    assert adapter.digest == formats.read(golden / "cases" / "lora").digest


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["<go>", 7, True, [1, "2"], [1, -2], [1.0], [True], {}, [[1]]])
@pytest.mark.parametrize("case", ["lora", "dynmole-k1"])
def test_tokens_of_the_wrong_type_are_refused(edited, case, tokens):
    error = refusal(ConfigError, edited(case, {FIELD: tokens}))
    assert error.where == f"adapter_config.json: {FIELD}"
    assert error.expected == "a list of token ids"


def test_more_tokens_than_prompts_are_searched_for_are_refused(edited):
    """To look for n of them at each place of a prompt takes n times its length."""
    error = refusal(LimitError, edited("lora", {FIELD: [5] * 257}))
    assert (error.where, error.found) == (f"adapter_config.json: {FIELD}", "257 tokens")


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_dora_is_refused_as_peft_refuses_it(edited, case):
    """With magnitudes, and without: that is read as a plain LoRA."""
    peft = pytest.importorskip("peft", reason="the dev extra is not installed")
    from torch import nn

    config = peft.LoraConfig(target_modules=["0"], use_dora=True, alora_invocation_tokens=[5])
    with pytest.raises(ValueError, match="unsupported variant combination"):
        peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    error = refusal(UnsupportedError, edited(case, {FIELD: [5], "use_dora": True}))
    assert (error.where, error.found) == ("adapter_config.json: use_dora", "DoRA")


def test_lora_on_parameters_is_refused_beside_it(golden, tmp_path):
    source = golden / "cases" / "experts-unsloth-grouped"
    directory = shutil.copytree(source, tmp_path / "a")
    config = json.loads((source / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, FIELD: [5]}))
    error = refusal(UnsupportedError, directory)
    assert error.where == "adapter_config.json: target_parameters"


@pytest.mark.parametrize("case", ["alora", "mixlora"])
def test_the_native_format_keeps_them_under_the_digest(golden, tmp_path, case):
    source = formats.read(golden / "cases" / case)
    native.write(source, tmp_path / "a")
    document = json.loads((tmp_path / "a" / native.CONFIG).read_text())
    expected = {"alora": [301, 17, 302], "mixlora": None}[case]
    assert document.get(FIELD) == expected
    for read in (formats.read, native.read_stored):
        adapter = read(tmp_path / "a")
        assert adapter.digest == source.digest
        assert adapter.invocation_tokens == tuple(expected or ())
    document[FIELD] = [301, 17]
    (tmp_path / "a" / native.CONFIG).write_text(json.dumps(document))
    with pytest.raises(CorruptFileError, match="the digest"):
        native.read_stored(tmp_path / "a")


def test_the_config_alone_tells_them(golden, tmp_path):
    assert formats.invocation_tokens(golden / "cases" / "alora") == (301, 17, 302)
    assert formats.invocation_tokens(golden / "cases" / "mola") == ()
    native.write(formats.read(golden / "cases" / "alora"), tmp_path / "a")
    assert formats.invocation_tokens(tmp_path / "a") == (301, 17, 302)


def mix(golden, folder, document, members):
    folder.mkdir()
    for name in members:
        shutil.copytree(golden / "cases" / name, folder / name)
    (folder / "molehill_mix.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("kind", ["mix", "arrow"])
def test_a_mix_of_activated_adapters_says_so_itself(golden, tmp_path, kind):
    adapters = {"alora": 0.5} if kind == "mix" else ["alora"]
    document = {"kind": kind, "adapters": adapters, **({"top_k": 1} if kind == "arrow" else {})}
    error = refusal(UnsupportedError, mix(golden, tmp_path / "a", document, ["alora"]))
    assert error.where == f"alora/{FIELD}"
    document[FIELD] = [301, 17, 302]
    adapter = formats.read(mix(golden, tmp_path / "b", document, ["alora"]))
    assert (adapter.kind, adapter.invocation_tokens) == (kind, (301, 17, 302))


def test_a_mix_of_plain_loras_may_be_activated(golden, tmp_path):
    document = {"kind": "mix", "adapters": {"lora": 1.0, "rslora": 0.5}, FIELD: [9]}
    adapter = formats.read(mix(golden, tmp_path / "a", document, ["lora", "rslora"]))
    assert adapter.invocation_tokens == (9,)
