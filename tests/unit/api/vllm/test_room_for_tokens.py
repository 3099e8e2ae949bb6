"""Where vLLM is told of room after the base's vocabulary."""

from argparse import Namespace
from typing import Any

import pytest
from support.golden import TINY_LLAMA

from molehill.api.vllm.extra_vocabulary import make_room


def arguments(model: str = str(TINY_LLAMA), overrides: Any = None) -> Namespace:
    return Namespace(
        model=model,
        hf_config_path=None,
        trust_remote_code=False,
        revision=None,
        code_revision=None,
        config_format="auto",
        hf_overrides=overrides,
    )


def test_the_vocabulary_is_larger_wherever_vllm_reads_its_size() -> None:
    args = arguments(overrides={"rope_theta": 1.0})
    make_room(args, 7)
    assert args.hf_overrides == {"rope_theta": 1.0, "vocab_size": 519}
    args = arguments()
    make_room(args, 0)
    assert args.hf_overrides is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (arguments(overrides={"vocab_size": 600}), "--hf-overrides of vocab_size, expected none"),
        (arguments(overrides=lambda config: config), "--hf-overrides"),
        (arguments(model="nowhere"), "no config, expected a text model"),
    ],
)
def test_a_size_that_is_not_known_is_refused(args: Namespace, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_room(args, 7)
