"""PEFT's other tuners: read, put on the plain model by the reference, and held against PEFT."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tuners
from support.authored import tiny_llama
from support.broken import refusal
from support.golden import TINY_LLAMA, greatest_difference

from molehill.engine import formats
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import (
    LimitError,
    MissingTensorError,
    NonFiniteError,
    NothingBoundError,
    ShapeError,
    UnsupportedError,
)
from molehill.engine.adapter.validation import validate
from molehill.engine.formats import native
from molehill.engine.hf.reference import attach
from molehill.engine.hf.shapes import base_model
from molehill.engine.routing_stats import costs
from molehill.engine.transform.merge import plain_sites, subtract
from molehill.engine.transform.plan import plan

pytest.importorskip("peft", reason="the dev extra is not installed")

BASE = base_model(TINY_LLAMA)
Q = "base_model.model.model.layers.1.self_attn.q_proj"
V = "base_model.model.model.layers.1.self_attn.v_proj"
K = "base_model.model.model.layers.1.self_attn.k_proj"
DOWN = "base_model.model.model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Any:
    """By name of TUNERS: the directory, and PEFT's logits; each made once."""
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def make(name: str) -> tuple[Path, torch.Tensor]:
        if name not in made:
            directory = tmp_path_factory.mktemp("tuners") / name
            made[name] = directory, tuners.logits(tuners.save(name, directory))
        return made[name]

    return make


@pytest.fixture
def changed(saved: Any, tmp_path: Path) -> Any:
    """`changed(name, tensors={...}, config={...})`: a copy with other values; None removes."""

    def change(name: str, tensors: Any = None, config: Any = None) -> Path:
        source, _ = saved(name)
        values = load_file(source / "adapter_model.safetensors") | (tensors or {})
        fields = json.loads((source / "adapter_config.json").read_text()) | (config or {})
        save_file(
            {key: value.contiguous() for key, value in values.items() if value is not None},
            tmp_path / "adapter_model.safetensors",
        )
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        return tmp_path

    return change


def read(directory: Path, limits: Limits = formats.DEFAULT_LIMITS) -> Any:
    adapter = formats.read(directory, limits, base=BASE)
    validate(adapter, BASE, limits)
    return adapter


@torch.no_grad()
def reference(adapter: Any) -> torch.Tensor:
    with attach(tiny_llama(), adapter) as model:
        return tuners.logits(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", tuners.TUNERS)
def test_the_reference_answers_as_peft_does(saved: Any, name: str, tmp_path: Path) -> None:
    directory, expected = saved(name)
    adapter = read(directory)
    assert adapter.kind == name.split("-")[0]
    assert greatest_difference(tuners.logits(tiny_llama()), expected) > 0.1
    assert greatest_difference(reference(adapter), expected) < 1e-4
    native.write(adapter, tmp_path / "native")
    assert native.read(tmp_path / "native", formats.DEFAULT_LIMITS).digest == adapter.digest


@pytest.mark.parametrize("name", tuners.TUNERS)
def test_nothing_is_said_of_what_peft_wrote(saved: Any, name: str) -> None:
    drawn = ["the projections are not in the file: drawn anew, as PEFT does on loading"]
    assert list(read(saved(name)[0]).warnings) == (drawn if name == "vera-seeded" else [])


def test_adalora_is_pruned_as_its_rank_allocator_says(tmp_path: Path) -> None:
    """As a training saves it: fewer ranks by linear, none in one."""
    model = tuners.tuned(tuners.TUNERS["adalora"])
    pattern = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_E") and "default" in module.lora_E:
            layer = int(name.split(".")[2])
            kept = [rank < layer for rank in range(5)]
            pattern[f"{name}.lora_E.default"] = kept
            module.lora_E["default"].data[~torch.tensor(kept)] = 0
    expected = tuners.logits(model)
    model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(tmp_path)
    adapter = read(tmp_path)
    assert {site.split(".")[1] for site in adapter.sites} == {"1", "2", "3"}
    assert adapter.sites["layers.2.self_attn.q_proj"].experts.ranks == (2,)
    assert adapter.warnings == ("3 of 12 linears have no rank left: as the base there",)
    assert greatest_difference(reference(adapter), expected) < 1e-4


def test_bone_is_miss_by_its_former_name(saved: Any, changed: Any) -> None:
    """PEFT's own script that makes one of the other renames, and no more."""
    source, expected = saved("miss")
    tensors = load_file(source / "adapter_model.safetensors")
    renamed = {name.replace("miss_block", "bone_block"): t for name, t in tensors.items()}
    fields = {"peft_type": "BONE", "mini_r": None, "miss_dropout": None}
    directory = changed("miss", dict.fromkeys(tensors) | renamed, fields)
    assert greatest_difference(reference(read(directory)), expected) < 1e-4


@pytest.mark.parametrize(
    ("name", "word"), [("vera", "VERA"), ("vera-seeded", "VERA"), ("miss", "MISS")]
)
def test_widths_come_from_a_base(saved: Any, name: str, word: str) -> None:
    error = refusal(UnsupportedError, saved(name)[0])
    assert error.found == f"{word}, whose files leave out how wide a linear's input is"
    assert "--model of molehill inspect" in error.expected


@pytest.mark.parametrize(
    ("name", "limits", "message"),
    [
        ("loha", Limits(rank=8), "rank 9, the product of LoHa's two ranks of 3"),
        ("lokr", Limits(rank=15), "the product of its two factors' "),
        ("miss", Limits(rank=5), "rank 6, the config's"),
        ("vera", Limits(rank=5), "rank 6"),
        ("hra", Limits(rank=2), "rank 3"),
        ("vera", Limits(adapter_bytes=30_000), "bytes of low-rank pairs up to here"),
    ],
)
def test_limits(saved: Any, name: str, limits: Limits, message: str) -> None:
    with pytest.raises(LimitError) as caught:
        read(saved(name)[0], limits)
    assert message in caught.value.found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tensors", "kind", "where"),
    [
        ("adalora", {f"{Q}.lora_E": None}, MissingTensorError, f"{Q}.lora_E"),
        ("adalora", {f"{Q}.lora_A": torch.ones(4, 128)}, ShapeError, f"{Q}.lora_A"),
        ("adalora", {f"{Q}.lora_E": torch.ones(5)}, ShapeError, f"{Q}.lora_A"),
        ("adalora", {f"{Q}.ranknum": torch.ones(1)}, UnsupportedError, f"{Q}.ranknum"),
        ("vera", {"base_model.vera_A": None}, MissingTensorError, "vera_A"),
        ("vera", {"base_model.vera_B": torch.ones(64, 6)}, ShapeError, "vera_B"),
        ("vera", {f"{Q}.vera_lambda_d": torch.ones(5)}, ShapeError, "vera_lambda_d"),
        ("vera", {f"{Q}.vera_lambda_b": torch.ones(9)}, ShapeError, "vera_lambda_b"),
        ("loha", {f"{DOWN}.hada_w2_b": torch.ones(2, 176)}, ShapeError, "hada_w2_b"),
        ("loha", {f"{DOWN}.hada_w2_a": torch.ones(9, 3)}, ShapeError, "hada_w2_a"),
        ("loha", {f"{V}.hada_t1": torch.ones(2, 2, 1, 1)}, UnsupportedError, "hada_t1"),
        ("lokr", {f"{Q}.lokr_w1": None}, MissingTensorError, "lokr_w1"),
        ("lokr", {f"{Q}.lokr_w1_a": torch.ones(2, 2)}, ShapeError, "lokr_w1_a"),
        ("lokr", {f"{Q}.lokr_w2_b": torch.ones(3, 16)}, ShapeError, "lokr_w2_b"),
        ("hra", {f"{Q}.hra_u": torch.zeros(64, 3)}, NonFiniteError, "hra_u"),
        ("hra", {f"{Q}.hra_u": torch.ones(64, 4)}, ShapeError, "hra_u"),
        ("hra", {f"{Q}.hra_u": torch.ones(128, 3)}, ShapeError, "layers.1.self_attn.q_proj.a"),
        ("miss", {f"{Q}.miss_block": torch.ones(6, 9)}, ShapeError, "miss_block"),
        ("ia3", {f"{K}.ia3_l": torch.ones(2, 9)}, ShapeError, "ia3_l"),
        ("ia3", {f"{K}.ia3_l": torch.ones(1, 128)}, ShapeError, "ia3_l"),
        ("ia3", {f"{DOWN}.ia3_l": torch.ones(176, 1)}, ShapeError, "ia3_l"),
        ("ia3", {f"{K}.ia3_l": torch.ones(9, 1)}, ShapeError, "layers.1.self_attn.k_proj"),
    ],
)
def test_tensors_that_are_wrong(
    changed: Any, name: str, tensors: Any, kind: Any, where: str
) -> None:
    with pytest.raises(kind) as caught:
        read(changed(name, tensors))
    assert where in caught.value.where


@pytest.mark.parametrize(
    ("name", "config", "where", "message"),
    [
        ("adalora", {"use_dora": True}, "use_dora", "DoRA"),
        ("adalora", {"alora_invocation_tokens": [5]}, "alora_invocation_tokens", "activated"),
        ("miss", {"init_weights": "bat"}, "init_weights", "bat, whose blocks multiply W's own"),
        ("ia3", {"target_modules": ["k_proj"]}, "down_proj", "untargeted"),
        ("hra", {"layers_to_transform": [0]}, "layers.1", "untargeted"),
    ],
)
def test_configs_that_are_refused(
    changed: Any, name: str, config: Any, where: str, message: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read(changed(name, config=config))
    assert where in caught.value.where
    assert message in caught.value.found


def test_ranks_that_contradict_the_pattern(changed: Any) -> None:
    pattern = {"model.layers.1.self_attn.q_proj.lora_E": [True, True, False, False, False]}
    with pytest.raises(ShapeError) as caught:
        read(changed("adalora", config={"rank_pattern": pattern}))
    assert (caught.value.found, caught.value.expected) == ("rank 5", "rank 2, as rank_pattern")


def test_without_effect(changed: Any, saved: Any) -> None:
    """HRA begins with reflections in pairs, which cancel; (IA)^3 with ones."""
    raw = load_file(saved("hra-orthogonal")[0] / "adapter_model.safetensors")
    pairs = {name: u[:, :2].repeat_interleave(2, 1) for name, u in raw.items()}
    with pytest.raises(NothingBoundError):
        read(changed("hra-orthogonal", pairs, {"apply_GS": False}))
    raw = load_file(saved("ia3")[0] / "adapter_model.safetensors")
    with pytest.raises(NothingBoundError):
        read(changed("ia3", {name: torch.ones_like(t) for name, t in raw.items()}))


@pytest.mark.parametrize("optimizer", ["lorafa", "loraplus"])
def test_optimizers_of_their_own_leave_a_plain_lora(optimizer: str, tmp_path: Path) -> None:
    """LoRA-FA freezes A, LoRA+ learns B faster; one step of each, as PEFT has them."""
    import peft
    from peft import optimizers

    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_llama(), config)
    if optimizer == "lorafa":
        made = optimizers.create_lorafa_optimizer(model, r=3, lora_alpha=5, lr=0.1)
    else:
        made = optimizers.create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=4
        )
    ids = torch.tensor([tuners.PROMPT])
    model(ids, labels=ids).loss.backward()
    made.step()
    model.eval().save_pretrained(tmp_path)
    adapter = read(tmp_path)
    assert (adapter.kind, adapter.warnings) == ("lora", ())
    assert greatest_difference(reference(adapter), tuners.logits(model)) < 1e-4


PREFIX = {"num_virtual_tokens": 4}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("OFTConfig", {}, "a product of its own before every GEMM"),
    ("BOFTConfig", {}, "a product of its own before every GEMM"),
    ("FourierFTConfig", {}, "a matrix as large as W"),
    ("ShiraConfig", {}, "a sparse product at every linear"),
    ("C3AConfig", {}, "Fourier transforms at every linear"),
    ("RoadConfig", {}, "an element-wise kernel over pairs"),
    ("RandLoraConfig", {}, "a matrix as large as W"),
    ("HiraConfig", {}, "a matrix as large as W"),
    ("LNTuningConfig", {}, "norms of an adapter's own"),
    ("PromptTuningConfig", PREFIX, "trained embeddings before the prompt"),
    ("PromptEncoderConfig", PREFIX, "trained embeddings before the prompt"),
    ("PrefixTuningConfig", PREFIX, "trained keys and values of every layer"),
]


@pytest.mark.parametrize(("config", "options", "needs"), REFUSED)
def test_other_tuners_are_refused_by_name_with_what_they_would_need(
    config: str, options: Any, needs: str, tmp_path: Path
) -> None:
    import peft

    made = getattr(peft, config)(task_type="CAUSAL_LM", **options)
    made.save_pretrained(tmp_path)
    error = refusal(UnsupportedError, tmp_path)
    assert error.found.startswith(f"{made.peft_type.value}, ")
    assert needs in error.found


def test_neither_adds_up_in_a_static_mix(saved: Any, tmp_path: Path) -> None:
    for name, result in (("hra", "a reflection (HRA)"), ("ia3", "a vector that scales")):
        directory = tmp_path / name
        shutil.copytree(saved(name)[0], directory / "part")
        document = {"kind": "mix", "adapters": {"part": 1.0}}
        (directory / "molehill_mix.json").write_text(json.dumps(document))
        assert refusal(UnsupportedError, directory).found == f"{result}, which does not add up"


def test_plan_and_costs_of_a_reflection(saved: Any) -> None:
    """HRA's B is as high as W, which only a base tells."""
    adapter = read(saved("hra")[0])
    site = "layers.0.self_attn.q_proj"
    without, beside = ({s.site: s for s in plan(adapter, base)}[site] for base in (None, BASE))
    assert (without.shape, without.ranks, without.static) == ("reflection", {"q_proj": (3,)}, True)
    assert (without.cost.flops, without.cost.base_flops) == (2 * 3 * 64, None)
    assert (beside.cost.flops, beside.cost.base_flops) == (2 * 3 * (64 + 128), 2 * 64 * 128)
    assert costs(adapter, base=BASE).sites[site].experts == (2 * 3 * (64 + 128),)


def test_beside_a_merged_base_a_reflection_is_refused(saved: Any, golden: Path) -> None:
    pairs = plain_sites(formats.read(golden / "cases" / "lora"))
    with pytest.raises(UnsupportedError) as caught:
        subtract(read(saved("hra")[0]), pairs)
    assert caught.value.found == "a reflection of what W reads"
