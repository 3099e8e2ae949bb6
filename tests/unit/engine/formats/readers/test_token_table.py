"""A table of token ids that chooses adapters: its file, what may be in it, what cannot be done with
it. What it answers is in test_mixes.py."""

import shutil
from dataclasses import replace

import pytest
import torch
from support.gated import GATED

from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import ConfigError, UnsupportedError
from molehill.engine.adapter.validation import problems
from molehill.engine.formats.convert.peft_writer import write_lora
from molehill.engine.hf.shapes import base_model
from molehill.engine.transform.merge import check_mergeable
from molehill.engine.transform.weighted_sum import Part, mix

OTHERS = {"other_tokens": "letters"}


def test_a_table_gives_every_token_one_whole_adapter(authored, copied):
    adapter = formats.read(authored["molora-by-token"].path)
    assert (adapter.sites, adapter.kind) == ({}, "molora")
    loras = {n: formats.read(authored["molora-by-token"].path / n) for n in GATED}
    table = adapter.by_token
    assert {n: m.sites.keys() for n, m in table.adapters.items()} == {
        n: lora.sites.keys() for n, lora in loras.items()
    }
    ids = torch.tensor([0, 150, 151, 290, 291, 399, 400, 421, 422, 430, 470, 471, 511])
    assert table.of(ids).tolist() == [0, 0, 1, 1, 2, 2, -1, 0, 2, 0, 0, -1, -1]
    lists = {"code": [[7, 9]], "poems": [3]}
    others = formats.read(copied("molora-by-token", {**OTHERS, "token_adapters": lists})).by_token
    assert others.of(torch.tensor([2, 3, 6, 7, 9, 10, 500])).tolist() == [2, 0, 2, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("document", "kind", "match"),
    [
        ({"token_adapters": [0]}, ConfigError, "token_adapters: .*expected an object"),
        ({"token_adapters": {"poems": 5}, **OTHERS}, ConfigError, "poems: found 5, .*a list of"),
        ({"token_adapters": {"poems": []}, **OTHERS}, ConfigError, r"poems: found \[\]"),
        ({"token_adapters": {"poems": [[3, 2]]}, **OTHERS}, ConfigError, r"poems: found \[\[3, 2"),
        ({"token_adapters": {"poems": [True]}, **OTHERS}, ConfigError, "poems: found"),
        ({"token_adapters": {"poems": [-1]}, **OTHERS}, ConfigError, "poems: found"),
        ({"token_adapters": {"poems": [1 << 24]}, **OTHERS}, ConfigError, "below 16777216"),
        ({"token_adapters": {"poems": [1], "x": [2]}}, ConfigError, "not for 'x'"),
        ({"token_adapters": {"poems": [1], "letters": [2]}}, ConfigError, "a list for code too"),
        (
            {"token_adapters": {"poems": [[1, 5]], "code": [5], "letters": [9]}},
            ConfigError,
            "5 is there twice",
        ),
        ({"other_tokens": "nobody"}, ConfigError, "other_tokens: found 'nobody', expected one of"),
        ({"top_k": 1}, UnsupportedError, "top_k: found an unknown field"),
        ({"router": "gate.safetensors"}, UnsupportedError, "router: found an unknown field"),
    ],
)
def test_a_bad_table_is_refused_by_field(copied, document, kind, match):
    with pytest.raises(kind, match=match):
        formats.read(copied("molora-by-token", document))


def test_tokens_that_the_base_lacks_are_refused(copied, golden):
    base = base_model(golden / "tiny-llama")
    lists = {"poems": [512], "code": [1], "letters": [2]}
    (result,) = problems(
        formats.read(copied("molora-by-token", {"token_adapters": lists})), base, Limits()
    )
    assert str(result).startswith("token_adapters: found token 512, expected tokens below 512")


def test_what_a_server_cannot_do_is_refused(authored, golden):
    base = base_model(golden / "tiny-llama")
    base = replace(base, refused={"token_adapters": "CUDA graphs on this server"})
    (result,) = problems(formats.read(authored["molora-by-token"].path), base, Limits())
    assert result.found == "CUDA graphs on this server"


@pytest.mark.parametrize("case", ["mola", "mixlora", "dora"])
def test_an_adapter_that_routes_cannot_be_a_tokens(copied, golden, case):
    """DoRA can: it is the same for every token that has it."""
    lists = {"poems": [1], "code": [2], "bad": [3]}
    document = {"adapters": list(lists), "token_adapters": lists}
    directory = copied("molora-by-token", document)
    shutil.copytree(golden / "cases" / case, directory / "bad")
    if case == "dora":
        assert len(formats.read(directory).by_token.adapters) == 3
        return
    with pytest.raises(UnsupportedError, match=r"^bad: layers.*: found a router \("):
        formats.read(directory)


def test_no_weight_is_all_of_a_tables_adapters(authored, tmp_path, copied):
    adapter = formats.read(authored["molora-by-token"].path)
    with pytest.raises(UnsupportedError, match="adapters that tokens have by their ids"):
        write_lora(adapter, tmp_path / "lora")
    with pytest.raises(UnsupportedError, match="adapters that tokens have by their ids"):
        mix([Part("a", adapter, 1.0)])
    with pytest.raises(UnsupportedError, match="adapters that tokens have by their ids"):
        check_mergeable(adapter, "adapter")
