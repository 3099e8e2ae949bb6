"""`molehill merge`, whose results PEFT and Transformers load and which must give their logits."""

import argparse
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.golden import Case
from transformers import AutoModelForCausalLM

from molehill.api.cli import main, merge
from molehill.engine import formats
from molehill.engine.hf.reference import attach

TOKENS = torch.tensor([[303, 316, 288, 262, 352, 17, 5]])
LOGITS = 1e-3
ROUTER = "mola.layers.{}.self_attn.{}.moe_gate.weight"
NO_PEFT = "the dev extra is not installed"


def run(*arguments):
    parser = argparse.ArgumentParser()
    merge.add_arguments(parser)
    return merge.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def zeroed(edited):
    """MoLA, four experts, with routers of zeros: every site is static.

    Not pickled: pickles are read in a process of their own, which takes seconds.
    """
    routers = {name: torch.zeros_like for name in weights_of("mola") if "moe_gate" in name}
    return edited("mola", tensors=routers, safetensors=True)


@pytest.fixture
def unpickled(edited):
    """A golden case, whose oracles are those of the case."""
    return lambda case: edited(case, safetensors=True)


def weights_of(case):
    return torch.load(Case(case).path / "adapter_model.bin", weights_only=True)


@pytest.fixture(scope="module")
def wide(golden, tmp_path_factory):
    """tiny-llama in float32, in several shards: what is merged into it is not rounded."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    model = AutoModelForCausalLM.from_pretrained(golden / "tiny-llama", dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(golden / "tiny-llama" / name, folder)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(model):
    return model(TOKENS, use_cache=False).logits[0]


def expected_of(folder, adapter):
    model = load(folder)
    with attach(model, formats.read(adapter)):
        return logits_of(model)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=LOGITS)


def test_static_mixtures_become_a_lora_that_peft_loads(wide, zeroed, tmp_path, capsys):
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    assert run(zeroed, tmp_path / "lora") == 0
    assert "merged  12 sites, 96 rank rows to" in capsys.readouterr().out
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    # Two experts of weight 1/2 are chosen of four: ties go to the lower index.
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    expected = expected_of(wide, zeroed)
    assert (expected - logits_of(load(wide))).abs().max() > 0.1
    assert_close(logits_of(peft.PeftModel.from_pretrained(load(wide), tmp_path / "lora")), expected)
    assert_close(expected_of(wide, tmp_path / "lora"), expected)


def test_sites_of_other_ranks_are_exceptions_that_peft_reads(wide, edited, tmp_path):
    """Layer 2's second expert is the first again, so its pair has rank 2, not 4."""
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    tensors = {name: torch.zeros_like for name in weights_of("mola") if "moe_gate" in name}
    stem = "mola.layers.2.self_attn.q_proj.experts.{}.lora_{}.weight"
    values = weights_of("mola")
    for half in "AB":
        tensors[stem.format(1, half)] = values[stem.format(0, half)]
    source = edited("mola", tensors=tensors, safetensors=True)
    assert run(source, tmp_path / "lora") == 0
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    pattern = {"model.layers.2.self_attn.q_proj": 2}
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, pattern, pattern)
    result = logits_of(peft.PeftModel.from_pretrained(load(wide), tmp_path / "lora"))
    assert_close(result, expected_of(wide, source))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lora", "rslora", "dora"])
def test_a_merged_base_gives_the_oracles_logits(wide, unpickled, tmp_path, case):
    assert run(unpickled(case), tmp_path / "base", "--into-base", "--model", wide) == 0
    model = load(tmp_path / "base")
    for prompt in Case(case).prompts:
        with torch.no_grad():
            result = model(torch.tensor([prompt.ids])).logits[0, -1]
        assert_close(result, prompt.logits)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lora", "dora"])
def test_a_merged_base_has_the_weights_that_peft_merges(wide, unpickled, tmp_path, case):
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    assert run(unpickled(case), tmp_path / "base", "--into-base", "--model", wide) == 0
    theirs = peft.PeftModel.from_pretrained(load(wide), Case(case).path).merge_and_unload()
    ours = load(tmp_path / "base").state_dict()
    changed = 0
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-6)
        changed += not torch.equal(weight, load_plain(wide)[name])
    assert changed == len(formats.read(Case(case).path).sites)


def load_plain(folder):
    weights = {}
    for shard in folder.glob("*.safetensors"):
        weights.update(load_file(shard))
    return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}


def test_shards_config_and_tokenizer_stay(wide, zeroed, tmp_path, capsys):
    assert run(zeroed, tmp_path / "base", "--into-base", "--model", wide, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == sorted(
        path.name for path in wide.iterdir()
    )
    shards = sorted(wide.glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        before, after = load_file(shard), load_file(tmp_path / "base" / shard.name)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            merged = (
                name.removeprefix("model.").removesuffix(".weight") in report["weights_changed"]
            )
            assert torch.equal(tensor, after[name]) != merged
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (tmp_path / "base" / name).read_bytes() == (wide / name).read_bytes()
    assert len(report["weights_changed"]) == report["sites"] == 12
    assert_close(logits_of(load(tmp_path / "base")), expected_of(wide, zeroed))


def test_an_activated_adapter_stays_one_and_does_not_go_into_a_base(wide, tmp_path, capsys):
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    source = Case("alora").path
    assert run(source, tmp_path / "base", "--into-base", "--model", wide) == 1
    assert "found an activated adapter" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()
    assert run(source, tmp_path / "lora") == 0
    config = peft.PeftConfig.from_pretrained(tmp_path / "lora")
    assert config.alora_invocation_tokens == [301, 17, 302]
    assert formats.read(tmp_path / "lora").invocation_tokens == (301, 17, 302)


@pytest.mark.slow
def test_a_bfloat16_base_is_rounded_once(golden, unpickled, tmp_path):
    base = golden / "tiny-llama"
    assert run(unpickled("lora"), tmp_path / "base", "--into-base", "--model", base) == 0
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "base" / "model.safetensors")
    for site, mixture in formats.read(Case("lora").path).sites.items():
        name = f"model.{site}.weight"
        exact = before[name].double() + mixture.experts.b.double() @ mixture.experts.a.double()
        assert after[name].dtype == torch.bfloat16
        assert ((after[name].double() - exact).abs() <= 2**-8 * exact.abs() * (1 + 1e-4)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "into", "message"),
    [
        ("mola", False, "layers.0.mlp.down_proj: found a dynamic site (router reads the token)"),
        ("mola", True, "layers.0.mlp.down_proj: found a dynamic site (router reads the token)"),
        ("mixlora", True, "layers.0.mlp: found a dynamic site (experts inside the FFN's"),
        ("dora", False, "layers.0.mlp.down_proj: found a magnitude (DoRA)"),
    ],
)
def test_what_is_not_exact_is_refused_by_its_first_site(
    golden, unpickled, tmp_path, capsys, case, into, message
):
    more = ["--into-base"] if into else []
    model, source = golden / "tiny-llama", unpickled(case)
    assert run(source, tmp_path / "out", "--model", model, *more) == 1
    assert f"UnsupportedError: {message}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_other_mistakes_are_one_line_and_leave_nothing(golden, zeroed, tmp_path, capsys):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "file").write_text("mine")
    quantised = copy_of(golden / "tiny-llama", tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (quantised / "config.json").write_text(json.dumps(config))
    pickled = copy_of(golden / "tiny-llama", tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for arguments, code, message in (
        ([folder / "file"], 2, "file exists"),
        ([folder / "new", "--into-base"], 2, "--into-base needs --model BASE"),
        ([folder / "new", "--into-base", "--model", folder / "none"], 2, "none"),
        ([folder / "new", "--into-base", "--model", quantised], 1, "found awq"),
        ([folder / "new", "--into-base", "--model", pickled], 1, "no safetensors checkpoint"),
    ):
        assert run(zeroed, *arguments) == code
        errors = capsys.readouterr().err
        assert message in errors
        assert "Traceback" not in errors
    assert [path.name for path in folder.iterdir()] == ["file"]


def copy_of(folder, target):
    return shutil.copytree(folder, target)


@pytest.mark.slow
def test_the_command(zeroed, tmp_path, capsys):
    assert main.main(["merge", str(Case("lora").path), str(tmp_path / "lora")]) == 0
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    with pytest.raises(SystemExit):
        main.main(["merge", str(zeroed), str(tmp_path / "x"), "--merge-tolerance", "-1"])
    assert "expected a number of at least 0" in capsys.readouterr().err


def test_a_lossy_merge_says_how_far_the_logits_move(golden, edited, tmp_path, capsys):
    """Experts made nearly equal in every layer; the change is measured here a second time."""
    values = weights_of("mola")
    tensors = {}
    for name, value in values.items():
        if ".experts." in name:
            first = values[name.split(".experts.")[0] + ".experts.0." + name.split(".", 7)[-1]]
            tensors[name] = first + 0.01 * (value - first)
    source = edited("mola", tensors=tensors, safetensors=True)
    model = golden / "tiny-llama"
    arguments = [tmp_path / "lora", "--model", model, "--merge-tolerance", "0.2", "--json"]
    assert run(source, *arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["merged"]) == 12
    assert all(0 < site["error"] <= 0.2 for site in report["merged"])
    change = report["logit_change"]
    measured = (expected_of(model, source) - expected_of(model, tmp_path / "lora")).abs().max()
    assert 0 < change["largest"] < change["spread"]
    assert 0.1 < change["largest"] / measured < 10
    assert change["positions"] > 50
