"""What PEFT adapts on the vocabulary, read and run by the reference, against what PEFT answers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models, vocabulary
from support.tuners import logits

from molehill.engine import formats
from molehill.engine.adapter.added_tokens import AddedTokens, added_tokens
from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import AdapterError, UnsupportedError
from molehill.engine.adapter.validation import validate
from molehill.engine.formats import native
from molehill.engine.formats.convert.peft_writer import write_lora
from molehill.engine.hf.reference import attach
from molehill.engine.hf.shapes import base_model
from molehill.engine.transform.merge import merge_static
from molehill.engine.transform.merge_checkpoint import merge_checkpoint
from molehill.engine.transform.weighted_sum import Part, mix

BASES = {"tied": "qwen2", "untied": "qwen3"}
CASES = [(kind, name) for kind in BASES for name in vocabulary.names(kind == "tied")]
LIMITS = formats.DEFAULT_LIMITS


@pytest.fixture(scope="module")
def bases(tmp_path_factory: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: tiny_models.build(name, root) for kind, name in BASES.items()}


@pytest.fixture
def saved(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A LoRA on the head and the embedding of the untied base."""
    vocabulary.author(bases["untied"], tmp_path / "saved", "on-both")
    return tmp_path / "saved"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_reference_answers_as_peft_does(
    bases: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    base, directory = bases[kind], tmp_path / name
    oracle = vocabulary.author(base, directory, name)
    adapter = formats.read(directory, base=base_model(base))
    validate(adapter, base_model(base), LIMITS)
    native.write(adapter, tmp_path / "native")
    again = formats.read(tmp_path / "native")
    assert again.digest == adapter.digest
    assert not adapter.warnings
    with attach(tiny_models.load(base), again) as model:
        result = logits(model)
    plain, expected = logits(tiny_models.load(base)), logits(oracle)
    assert (expected - plain).abs().max() > 0.1
    assert (result - expected).abs().max() < 1e-4


def test_tied_weights_are_changed_one_by_one(bases: dict[str, Path], tmp_path: Path) -> None:
    adapters = {}
    for name in ("on-embedding", "on-head", "tying"):
        vocabulary.author(bases["tied"], tmp_path / name, name)
        adapters[name] = formats.read(tmp_path / name, base=base_model(bases["tied"]))
    assert set(adapters["on-embedding"].sites) == {"embed_tokens"}
    assert "embed_tokens" not in adapters["on-head"].sites
    assert set(adapters["tying"].sites) == {"embed_tokens", "lm_head"}


def test_a_whole_weight_needs_the_base(saved: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"base_layer\.weight.*--model"):
        formats.read(saved)


def test_a_whole_weight_that_is_another_is_refused(saved: Path, bases: dict[str, Path]) -> None:
    key = "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(saved / "adapter_model.safetensors")
    tensors[key][7] += 1
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match="1 rows that are not the base's") as refused:
        formats.read(saved, base=base_model(bases["untied"]))
    assert refused.value.where == f"adapter_model.safetensors: {key}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_whole_weight_may_be_saved_in_fewer_bits(
    saved: Path, bases: dict[str, Path], dtype: torch.dtype
) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    rounded = {n: t.to(dtype) if "base_layer" in n else t for n, t in tensors.items()}
    before = formats.read(saved, base=base_model(bases["untied"]))
    save_file(rounded, saved / "adapter_model.safetensors")
    assert formats.read(saved, base=base_model(bases["untied"])).digest == before.digest


def edit(directory: Path, **fields: Any) -> Path:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return directory


def refusal(directory: Path, base: BaseModel | None) -> AdapterError:
    with pytest.raises(UnsupportedError) as refused:
        validate(formats.read(directory, base=base), base, LIMITS)  # type: ignore[arg-type]
    return refused.value


def test_tensors_of_an_untargeted_head_are_refused(saved: Path, bases: dict[str, Path]) -> None:
    base = base_model(bases["untied"])
    error = refusal(edit(saved, target_modules=["embed_tokens", "down_proj"]), base)
    assert error.where.startswith("adapter_model.safetensors: base_model.model.lm_head.")
    assert error.found == "tensors of an untargeted module"


def test_dora_on_the_embedding_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    settings = {"target_modules": ["embed_tokens"], "use_dora": True}
    vocabulary.save(bases["untied"], tmp_path / "dora", settings)
    error = refusal(tmp_path / "dora", base_model(bases["untied"]))
    assert error.where.endswith("embed_tokens.lora_magnitude_vector")
    assert error.found == "DoRA"


def test_another_vocabulary_is_refused(saved: Path, bases: dict[str, Path]) -> None:
    base = base_model(bases["untied"])
    other = BaseModel(
        base.name, base.architecture, base.linears, base.ffns, vocabulary={"lm_head": (64, 500)}
    )
    with pytest.raises(AdapterError, match=r"embed_tokens|lm_head"):
        validate(formats.read(saved, base=base), other, LIMITS)


def test_written_as_a_lora_peft_answers_the_same(
    saved: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    import peft

    adapter = formats.read(saved, base=base_model(bases["untied"]))
    merged, _ = merge_static(adapter, base_model(bases["untied"]))
    write_lora(merged, tmp_path / "written")
    oracle = peft.PeftModel.from_pretrained(tiny_models.load(bases["untied"]), str(saved))
    written = peft.PeftModel.from_pretrained(
        tiny_models.load(bases["untied"]), str(tmp_path / "written")
    )
    assert (logits(written) - logits(oracle)).abs().max() < 1e-4


def test_merged_into_an_untied_base(saved: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    import peft

    adapter = formats.read(saved, base=base_model(bases["untied"]))
    changes = merge_checkpoint(bases["untied"], adapter, tmp_path / "merged")
    assert min(changes["embed_tokens"], changes["lm_head"]) > 0.01
    oracle = peft.PeftModel.from_pretrained(tiny_models.load(bases["untied"]), str(saved))
    result = logits(tiny_models.load(tmp_path / "merged"))
    assert (result - logits(oracle)).abs().max() < 1e-4


def test_not_merged_into_a_tied_base(bases: dict[str, Path], tmp_path: Path) -> None:
    vocabulary.author(bases["tied"], tmp_path / "saved", "on-head")
    adapter = formats.read(tmp_path / "saved", base=base_model(bases["tied"]))
    with pytest.raises(UnsupportedError, match="lm_head: found one weight"):
        merge_checkpoint(bases["tied"], adapter, tmp_path / "merged")


def test_an_activated_adapter_on_the_embedding_is_refused(
    saved: Path, bases: dict[str, Path]
) -> None:
    error = refusal(edit(saved, alora_invocation_tokens=[5, 6]), base_model(bases["untied"]))
    assert error.where == "embed_tokens"
    assert "activated" in error.found


def test_only_rows_that_differ_are_kept(bases: dict[str, Path], tmp_path: Path) -> None:
    base, rows = base_model(bases["untied"]), {}
    for name in vocabulary.ROWS:
        vocabulary.author(bases["untied"], tmp_path / name, name)
        tables = formats.read(tmp_path / name, base=base).rows
        rows[name] = {site: table.ids.tolist() for site, table in tables.items()}
    assert rows == {
        "tokens": {"embed_tokens": [5, 299, 351]},
        "tokens-apart": {"embed_tokens": [5, 135], "lm_head": [5, 511]},
        "saved": {site: list(range(3, 40)) for site in ("embed_tokens", "lm_head")},
        "saved-head": {"lm_head": list(range(512))},
    }


def test_a_tied_head_has_the_rows_of_the_embeddings_tokens(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    vocabulary.author(bases["tied"], tmp_path / "tokens", "tokens")
    rows = formats.read(tmp_path / "tokens", base=base_model(bases["tied"])).rows
    assert rows["lm_head"] == rows["embed_tokens"]
    with pytest.raises(UnsupportedError, match="whether its head is tied"):
        formats.read(tmp_path / "tokens")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"trainable_token_indices": [5, 17]}, "trainable_tokens_delta"),
        ({"trainable_token_indices": [5, 17, 17]}, "trainable_token_indices"),
        ({"trainable_token_indices": [5, 17, -1]}, "trainable_token_indices"),
        ({"trainable_token_indices": None}, "trainable_token_indices"),
        ({"trainable_token_indices": {"lm_head": [5, 17, 300]}}, "trainable_token_indices"),
        ({"trainable_token_indices": [5, 17, 512]}, "embed_tokens.row_ids"),
        ({"alora_invocation_tokens": [5]}, "embed_tokens.rows"),
    ],
    ids=str,
)
def test_rows_that_contradict_the_config_are_refused(
    bases: dict[str, Path], tmp_path: Path, fields: dict[str, Any], where: str
) -> None:
    base = base_model(bases["untied"])
    vocabulary.author(bases["untied"], tmp_path / "tokens", "tokens")
    with pytest.raises(AdapterError) as refused:
        validate(formats.read(edit(tmp_path / "tokens", **fields), base=base), base, LIMITS)
    assert where in refused.value.where


def test_a_grown_vocabulary_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    key = "base_model.model.lm_head.weight"
    vocabulary.author(bases["untied"], tmp_path / "saved", "saved-head")
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    tensors[key] = torch.cat([tensors[key], torch.ones(2, 64)])
    save_file(tensors, tmp_path / "saved" / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight: found 514 tokens.*512"):
        formats.read(tmp_path / "saved", base=base_model(bases["untied"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("tied", "grown-saved"),
        ("tied", "grown-tokens"),
        ("untied", "grown"),
        ("untied", "grown-both"),
    ],
)
def test_added_tokens_are_read_and_answered_as_in_peft(
    bases: dict[str, Path], tmp_path: Path, kind: str, name: str
) -> None:
    base = replace(base_model(bases[kind]), extra_tokens=vocabulary.ADDED + 1)
    oracle = vocabulary.author(bases[kind], tmp_path / name, name)
    adapter = formats.read(tmp_path / name, base=base)
    validate(adapter, base, LIMITS)
    native.write(adapter, tmp_path / "native")
    again = formats.read(tmp_path / "native")
    assert again.digest == adapter.digest
    assert not adapter.warnings
    added = (512, 513)
    assert added_tokens(again, base.num_tokens) == AddedTokens(512, added, added)
    ids = torch.tensor([[5, *added, 300]])
    with attach(tiny_models.load(bases[kind]), again) as model, torch.no_grad():
        result = model(ids, use_cache=False).logits
        expected = oracle(ids, use_cache=False).logits
    assert (result - expected).abs().max() < 1e-4
    with pytest.raises(UnsupportedError, match=r"514 tokens, 2 of them.*--extra-vocab 2 takes it"):
        formats.read(tmp_path / name, base=base_model(bases[kind]))


def test_rows_are_in_no_mix_and_no_merge(bases: dict[str, Path], tmp_path: Path) -> None:
    vocabulary.author(bases["untied"], tmp_path / "tokens", "tokens")
    adapter = formats.read(tmp_path / "tokens", base=base_model(bases["untied"]))
    with pytest.raises(UnsupportedError, match="rows of its own"):
        mix([Part("tokens", adapter, 1.0)])
    with pytest.raises(UnsupportedError, match="rows of its own"):
        write_lora(adapter, tmp_path / "written")
    with pytest.raises(UnsupportedError, match="rows of its own"):
        merge_checkpoint(bases["untied"], adapter, tmp_path / "merged")
