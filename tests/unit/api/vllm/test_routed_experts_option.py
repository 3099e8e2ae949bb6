"""Of whom vLLM's --enable-return-routed-experts is: a dense base's is molehill's."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from support.golden import TINY_LLAMA

from molehill.api.vllm import launcher
from molehill.api.vllm.options import Options
from molehill.api.vllm.routed_experts_option import take_over


def arguments(model: Path, asked: bool = True) -> Namespace:
    return Namespace(
        enable_return_routed_experts=asked,
        model=str(model),
        hf_config_path=None,
        trust_remote_code=False,
        revision=None,
        code_revision=None,
        config_format="auto",
    )


@pytest.fixture
def with_experts(tmp_path: Path) -> Path:
    config = {"model_type": "mixtral", "num_local_experts": 4, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_dense_base_has_the_mixtures_and_vllm_is_not_told() -> None:
    args = arguments(TINY_LLAMA)
    assert take_over(args)
    assert not args.enable_return_routed_experts
    assert not take_over(arguments(TINY_LLAMA, asked=False))


def test_a_base_with_experts_has_its_own(with_experts: Path) -> None:
    args = arguments(with_experts)
    assert not take_over(args)
    assert args.enable_return_routed_experts


@pytest.mark.slow
def test_what_cannot_be_read_is_vllms_to_explain(tmp_path: Path) -> None:
    args = arguments(tmp_path / "nowhere")
    assert not take_over(args)
    assert args.enable_return_routed_experts


def test_merging_of_routers_is_refused_beside_it() -> None:
    args = launcher.parse([str(TINY_LLAMA), "--enable-return-routed-experts"])
    with pytest.raises(launcher.LaunchError, match="found --merge-tolerance"):
        launcher.prepare(args, Options(merge_tolerance=0.1))
    args = launcher.parse([str(TINY_LLAMA), "--enable-return-routed-experts"])
    args = launcher.prepare(args, Options())
    assert args.molehill.routed_experts
    assert not args.enable_return_routed_experts
