"""GOAT's files: scalings, the part of the base weights that training took out, and refusals."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.broken import refusal
from support.golden import TINY_LLAMA

from molehill.api.cli import convert
from molehill.engine import formats
from molehill.engine.adapter.errors import (
    ConfigError,
    CorruptFileError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnknownTargetError,
    UnsupportedError,
)
from molehill.engine.formats import native
from molehill.engine.formats.convert import goat_base
from molehill.engine.formats.io import files
from molehill.engine.formats.readers import goat
from molehill.engine.hf.checkpoint import linear_weights
from molehill.engine.transform.merge import merge_static, subtract
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import TopK
from molehill.kernels.reference import linear_mixture

SITE = "layers.2.mlp.down_proj"
STEM = f"base_model.model.model.{SITE}"
# Of the golden case: experts, rank of all, inputs and outputs of the site.
EXPERTS, RANK, INPUTS, OUT = 4, 8, 176, 64


@pytest.fixture(scope="module")
def weight(golden):
    name = f"model.{SITE}.weight"
    return load_file(golden / "tiny-llama" / "model.safetensors")[name].float()


def converted(directory, base=TINY_LLAMA):
    """As `molehill convert --base` does it."""
    adapter = formats.read(directory, base_is_residual=True)
    weights = linear_weights(base, adapter.sites)
    return goat_base.with_base(adapter, files.read_config(directory), weights)


@pytest.fixture(scope="module")
def adapter(golden):
    return converted(golden / "cases" / "goat")


def slices(name, u, s, v):
    """U, S and V^T of what an init_type takes, cut as the authors' code cuts them."""
    length, rank_of_one = len(s) // EXPERTS, RANK // EXPERTS
    starts = {
        "goat": [i * length for i in range(EXPERTS)],
        "goat_mini": [(i + 1) * length - rank_of_one for i in range(EXPERTS)],
    }
    if name in starts:
        cuts = [slice(start, start + rank_of_one) for start in starts[name]]
    else:
        half = RANK // 2
        cuts = {
            "pissa": [slice(RANK)],
            "pissa_scale": [slice(RANK)],
            "milora": [slice(-RANK, None)],
            "pissa_milora": [slice(half), slice(-half, None)],
        }[name]
    join = [torch.cat([u[:, cut] for cut in cuts], 1), torch.cat([s[cut] for cut in cuts])]
    return *join, torch.cat([v[cut] for cut in cuts])


@pytest.mark.slow
@pytest.mark.parametrize("cof", [1.0, 0.5])
@pytest.mark.parametrize(
    "name", ["goat", "goat_mini", "pissa", "pissa_scale", "milora", "pissa_milora"]
)
def test_the_shared_pair_is_what_training_took_from_the_base(edited, weight, name, cof):
    adapter = converted(edited("goat", {"init_type": name, "init_cof": cof}))
    shared = adapter.sites[SITE].shared
    u, s, v = slices(name, *torch.linalg.svd(weight.double(), full_matrices=False))
    expected = -cof * (u * s / 10) @ v
    assert shared.ranks == (RANK,)
    torch.testing.assert_close(shared.b @ shared.a, expected.float(), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"init_type": "goat"}, 4 / 2),
        ({"init_type": "milora"}, 4 / 2),
        ({"init_type": "pissa"}, 2.0),
        ({"init_type": "pissa", "lora_alpha": 40}, 2.0),
        ({"init_type": "pissa_scale"}, math.sqrt(3 * INPUTS / 2)),
        ({"init_type": "pissa_scale", "molehill_eta": 0.25}, math.sqrt(0.75 * INPUTS / 2)),
        ({"init_type": "lora_rs"}, 4 / math.sqrt(2)),
        ({"init_type": "lora_scale"}, math.sqrt(3 * INPUTS / 2)),
        ({"init_type": "goat", "molehill_scaling": 0.75}, 0.75),
    ],
    ids=str,
)
def test_scalings_go_by_the_init_type(edited, golden, config, scaling):
    changes = config["init_type"] not in ("lora_rs", "lora_scale")
    adapter = formats.read(edited("goat", config), base_is_residual=changes)
    tensors = torch.load(golden / "cases" / "goat" / "adapter_model.bin", weights_only=True)
    stored = torch.cat([tensors[f"{STEM}.lora_B.{e}.weight"] for e in range(EXPERTS)], dim=1)
    torch.testing.assert_close(adapter.sites[SITE].experts.b, stored * scaling)
    converted = any(name.startswith("molehill_") for name in config)
    said = [text.partition(":")[0] for text in adapter.warnings]
    beside = [text for text in said if text.startswith("init_type is ")]
    assert beside == ([f"init_type is {config['init_type']!r}"] if changes else [])
    assert [text for text in said if text not in beside] == (
        [] if converted else ["GOAT saves no scaling"]
    )


def test_an_init_type_that_leaves_the_base_alone_needs_none(golden):
    adapter = formats.read(golden / "cases" / "goat-lora")
    assert {mixture.shared for mixture in adapter.sites.values()} == {None}


def test_without_the_base_it_is_refused_with_the_command(golden):
    error = refusal(UnsupportedError, golden / "cases" / "goat")
    assert error.where == "adapter_config.json: init_type"
    assert error.found.startswith("goat, which trains beside the base weights less a part")
    assert "`molehill convert --base MODEL SRC DST`" in error.expected
    assert '"base_is_residual": true' in error.expected


B0 = f"{STEM}.lora_B.0.weight"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config", "tensors", "message"),
    [
        (
            UnsupportedError,
            {"init_type": "hydralora"},
            {},
            "found 'hydralora', expected lora, mole",
        ),
        (UnsupportedError, {"init_type": "svd_lora"}, {}, "init_type"),
        (UnsupportedError, {"init_type": "simple"}, {}, "init_type"),
        (ConfigError, {"init_type": None}, {}, "init_type: found nothing"),
        (ConfigError, {"r": 3}, {}, "r: found 3, expected at least num_experts, 4"),
        (ShapeError, {"r": 16}, {}, "found rank 2, expected the config's rank 4"),
        (ShapeError, {"num_experts": 3}, {}, "4 experts, expected num_experts 3"),
        (ConfigError, {"molehill_eta": 2}, {}, "beside init_type lora, expected one with scale"),
        (UnsupportedError, {"use_rslora": True}, {}, "which init_type sets"),
        (CorruptFileError, {}, {B0: torch.ones(OUT, 2)}, "expected those of"),
        (MissingTensorError, {}, {B0: None}, "no such tensor"),
    ],
    ids=str,
)
def test_what_is_refused(edited, kind, config, tensors, message):
    tensors = {
        name.replace(SITE, "layers.2.self_attn.k_proj"): tensor for name, tensor in tensors.items()
    }
    assert message in str(refusal(kind, edited("goat-lora", config, tensors)))


def base_with(folder, golden, change=None, **config):
    """A base of tiny-llama's config and one weight."""
    folder.mkdir()
    fields = json.loads((golden / "tiny-llama" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **config}))
    tensors = load_file(golden / "tiny-llama" / "model.safetensors")
    save_file(change(tensors) if change else tensors, folder / "model.safetensors")
    return folder


@pytest.mark.slow
def test_a_base_that_does_not_fit_is_refused(golden, tmp_path, capsys):
    source = str(golden / "cases" / "goat")

    def run(base):
        code = convert.main([source, str(tmp_path / "copy"), "--base", str(base)])
        assert not (tmp_path / "copy").exists()
        return code, capsys.readouterr().err

    quantised = base_with(tmp_path / "q", golden, quantization_config={"quant_method": "awq"})
    expected = "quantization_config: found awq, expected unquantised weights"
    code, message = run(quantised)
    assert code == 1
    assert expected in message
    code, message = run(tmp_path / "nowhere")
    assert code == 2
    assert "nowhere" in message


def test_a_base_with_other_linears_is_refused(golden, tmp_path):
    def narrow(tensors):
        return {**tensors, f"model.{SITE}.weight": torch.ones(OUT, 9)}

    def broken(tensors):
        return {**tensors, f"model.{SITE}.weight": torch.full((OUT, INPUTS), math.nan)}

    def without(tensors):
        return {name: tensor for name, tensor in tensors.items() if SITE not in name}

    for change, kind, message in (
        (narrow, ShapeError, rf"the base's {SITE}: found \[64, 9\], expected \[64, 176\]"),
        (broken, NonFiniteError, f"the base's {SITE}: found NaN or Inf"),
        (without, UnknownTargetError, f"{SITE}: found no weight of it in model.safetensors"),
    ):
        base = base_with(tmp_path / change.__name__, golden, change)
        with pytest.raises(kind, match=message):
            converted(golden / "cases" / "goat", base)


def test_more_ranks_than_singular_values_are_refused(golden):
    config = files.read_config(golden / "cases" / "goat")
    with pytest.raises(ConfigError, match="r: found 8, expected at most 7, as many as there are"):
        goat.taken(config, EXPERTS, 7)


# The shared pair, after the reader


def test_the_native_format_keeps_the_shared_pair(adapter, tmp_path):
    native.write(adapter, tmp_path / "copy")
    again = formats.read(tmp_path / "copy")
    assert again.digest == adapter.digest
    for half in ("a", "b"):
        read, written = (getattr(a.sites[SITE].shared, half) for a in (again, adapter))
        assert torch.equal(read, written)
    tensors = load_file(tmp_path / "copy" / native.WEIGHTS)
    for name, kind, changed in (
        (f"{SITE}.shared.a", MissingTensorError, None),
        (f"{SITE}.shared.b", ShapeError, torch.ones(OUT, 3)),
        (f"{SITE}.shared.b", CorruptFileError, tensors[f"{SITE}.shared.b"] + 1),
    ):
        others = {value: tensor for value, tensor in tensors.items() if value != name}
        save_file(
            others if changed is None else {**others, name: changed},
            tmp_path / "copy" / native.WEIGHTS,
        )
        refusal(kind, tmp_path / "copy")


def outputs(mixture, x):
    return linear_mixture(x, torch.zeros(OUT, INPUTS), None, mixture)[0]


def test_a_static_site_merges_with_its_shared_pair(adapter):
    mixture = adapter.sites[SITE]
    static = LinearMixture(
        mixture.experts, mixture.policy, torch.zeros(EXPERTS, INPUTS), shared=mixture.shared
    )
    merged, (site,) = merge_static(type(adapter)("goat", {SITE: static}))
    assert (site.rank_before, site.rank_after) == (RANK + RANK, 4 + RANK)
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(outputs(merged.sites[SITE], x), outputs(static, x))


def test_what_is_merged_into_the_base_is_taken_back_beside_the_shared_pair(adapter):
    draw = torch.Generator().manual_seed(2)
    pair = Experts(
        torch.randn(3, INPUTS, generator=draw), torch.randn(OUT, 3, generator=draw), (3,)
    )
    result = subtract(adapter, {SITE: pair}).sites[SITE]
    assert result.policy == TopK(2)
    x = torch.randn(5, INPUTS, generator=draw)
    expected = outputs(adapter.sites[SITE], x) - x @ pair.a.T @ pair.b.T
    torch.testing.assert_close(outputs(result, x), expected, rtol=1e-4, atol=1e-3)
