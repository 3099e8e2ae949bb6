"""What `molehill inspect` prints and returns."""

import json

import pytest
import torch
from support import vocabulary
from support.api_client import copy_adapter
from support.inspecting import run
from transformers import AutoTokenizer

from molehill.engine import formats


def flat(text):
    """One line: the last column goes on in the lines below."""
    return " ".join(text.split())


def test_a_sound_adapter(golden, capsys):
    case = golden / "cases" / "mixlora-expert-lora"
    assert run(case, "--model", golden / "tiny-llama") == 0
    text = flat(capsys.readouterr().out)
    for expected in [
        "mixlora",
        "tiny-llama",
        "TopK (k 2, normalize True)",
        "20: 16 static, 4 dynamic",
        "layers.0-3.mlp ",
        "gate 2, up 2",
        "layers.0-3.self_attn.q_proj",
        "static: no router",
        "fits",
    ]:
        assert expected in text


def test_experts_of_a_base_model(golden, capsys):
    assert run(golden / "cases" / "drlora", "--model", golden / "tiny-moe") == 0
    text = capsys.readouterr().out
    for expected in ["24: 24 static, 0 dynamic", "layers.1.mlp.experts.2.up_proj", "fits"]:
        assert expected in text


def test_names_are_whole_on_a_narrow_terminal(golden, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert run(golden / "cases" / "dynmole-k1") == 0
    text = flat(capsys.readouterr().out)
    assert "layers.0-3.self_attn.v_proj" in text
    assert "dynamic: router reads the token" in text


def test_what_an_adapter_is_talked_to_by(golden, tmp_path, capsys):
    folder = copy_adapter("lora", tmp_path / "adapter")
    run(folder, "--json", "--model", golden / "tiny-llama")
    assert json.loads(capsys.readouterr().out)["chat"] is None
    config = {"eos_token": "<s>", "pad_token": "<|pad|>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert run(folder, "--json", "--model", golden / "tiny-llama") == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["chat"]["templates"]) == ["default"]
    assert report["chat"]["special_tokens"] == {"eos_token": "<s>", "pad_token": "<|pad|>"}
    assert report["chat"]["stop_token_ids"] == [1]
    assert "the base's lacks: '<|pad|>'" in report["warnings"][-1]
    # Without a base nothing is known to differ; all that the files say is shown.
    assert run(folder) == 0
    text = flat(capsys.readouterr().out)
    assert "chat template default, 14 characters; eos_token '<s>'; pad_token '<|pad|>'" in text
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{% if %}"}')
    assert run(folder, "--json") == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["where"] == "tokenizer_config.json: chat_template: line 1"


def test_json(golden, capsys):
    assert run(golden / "cases" / "dynmole-renyi", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["base_model"]) == ("dynmole", "tiny-llama")
    assert len(report["digest"]) == 64
    assert (report["warnings"], report["problems"]) == ([], [])
    assert len(report["sites"]) == 8
    first = report["sites"][0]
    assert (first["site"], first["experts"]) == ("layers.0.mlp.gate_proj", 6)
    assert first["routing"]["entropy_type"] == "renyi"
    assert first["ranks"] == {"gate_proj": [2] * 6}
    assert first["bytes"] == 4 * (12 * 64 + 176 * 12 + 6 * 64)
    assert sum(site["bytes"] for site in report["sites"]) == report["bytes"]
    # Two 16-bit factors of rank 12, and a router in float32.
    assert first["bytes_per_token"] == 2 * 12 * (64 + 176) + 4 * 6 * 64
    assert first["flops_per_token"] == 2 * (12 * (64 + 176) + 6 * 64)
    assert first["flops_share"] == first["flops_per_token"] / (2 * 64 * 176)
    assert first["merged_ranks"] is None
    total = sum(site["flops_per_token"] for site in report["sites"])
    assert (report["per_token"]["flops"], report["logit_change"]) == (total, None)


def test_what_activates_an_adapter(golden, capsys):
    assert run(golden / "cases" / "alora") == 0
    assert "from tokens 301, 17, 302 on" in capsys.readouterr().out
    assert run(golden / "cases" / "alora", "--json") == 0
    assert json.loads(capsys.readouterr().out)["alora_invocation_tokens"] == [301, 17, 302]
    assert run(golden / "cases" / "mola", "--json") == 0
    assert json.loads(capsys.readouterr().out)["alora_invocation_tokens"] is None


def test_biases_are_shown(golden, edited, capsys):
    stem = "base_model.model.model"
    sites = formats.read(golden / "cases" / "lora").sites
    tensors = {
        f"{stem}.{site}.lora_B.bias": torch.ones(len(mixture.experts.b))
        for site, mixture in sites.items()
    }
    tensors[f"{stem}.layers.0.self_attn.q_proj.base_layer.bias"] = torch.ones(128)
    directory = edited("lora", {"lora_bias": True, "bias": "all"}, tensors=tensors)
    assert run(directory) == 0
    assert "1 trained in place of the base's, 28 added to linears" in flat(capsys.readouterr().out)
    assert run(directory, "--json") == 0
    biases = json.loads(capsys.readouterr().out)["biases"]
    assert biases.keys() == sites.keys()
    assert biases["layers.0.self_attn.q_proj"] == ["trained", "added"]
    assert run(directory, "--model", golden / "tiny-llama") == 1
    text = flat(capsys.readouterr().out)
    assert "expected the base that it was trained from" in text


def test_rows_and_what_added_tokens_need_are_shown(golden, tmp_path, capsys):
    base, directory = golden / "tiny-llama", tmp_path / "grown"
    vocabulary.author(base, directory, "grown-tokens")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    tokenizer.save_pretrained(directory)
    assert run(directory, "--model", base, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == {"embed_tokens": 3, "lm_head": 3}
    assert report["added_tokens"] == [512, 513]
    (warning,) = report["warnings"]
    assert "added tokens that the base's lacks: '<c>'; without rows" in warning
    assert run(directory, "--model", base) == 0
    text = flat(capsys.readouterr().out)
    assert "3 rows of embed_tokens, 3 rows of lm_head, 2 added tokens (--extra-vocab 2)" in text


def test_an_adapter_of_another_base(golden, tmp_path, capsys):
    config = json.loads((golden / "tiny-llama" / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    case = golden / "cases" / "lora"
    assert run(case, "--model", tmp_path) == 1
    text = capsys.readouterr().out
    assert "BaseMismatchError adapter for tiny-llama: found 21 of 28 sites" in text
    assert "... and 2 more problems" in text
    assert run(case, "--model", tmp_path, "--json") == 1
    kinds = [problem["type"] for problem in json.loads(capsys.readouterr().out)["problems"]]
    assert kinds == ["base_mismatch"] + ["unknown_target"] * 21


def test_warnings_are_shown(edited, capsys):
    assert run(edited("lora", {"use_dora": True})) == 0
    assert "warning use_dora is set but no magnitudes are saved" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["refused", "nowhere"])
def test_an_unreadable_adapter_is_one_line_and_no_traceback(golden, edited, capsys, case):
    refused = edited("lora", {"peft_type": "LILY"})
    assert run(refused if case == "refused" else golden / "cases" / case) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.split(":")[0] in ("UnsupportedError", "AdapterNotFoundError")


def test_an_unreadable_adapter_as_json(edited, capsys):
    assert run(edited("lora", {"peft_type": "LILY"}), "--json") == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["type"] == "unsupported"
    assert problem["found"].startswith("LILY")


def test_an_unknown_model(golden, tmp_path, capsys):
    assert run(golden / "cases" / "lora", "--model", tmp_path / "none") == 1
    assert "--model" in capsys.readouterr().err


def test_markup_in_an_adapter_is_not_interpreted(edited, capsys):
    assert run(edited("lora", {"base_model_name_or_path": "[red]x[/]"})) == 0
    assert "[red]x[/]" in capsys.readouterr().out


def test_layers_with_another_plan_are_another_group(edited, capsys):
    router = "mola.layers.2.self_attn.q_proj.moe_gate.weight"
    assert run(edited("mola", tensors={router: torch.zeros_like})) == 0
    text = flat(capsys.readouterr().out)
    assert "layers.0-1,3.self_attn.q_proj" in text
    assert "layers.2.self_attn.q_proj" in text
    assert "static: router of zeros" in text
    assert "merging 1 sites, 8 rank rows to 4" in text
    assert " 2 -> 4 " in text
