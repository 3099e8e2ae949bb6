"""Room after the base's vocabulary for tokens that adapters add (`--extra-vocab`)."""

import argparse

from molehill.api.vllm.precision import read_config

_SIZE = "vocab_size"


def make_room(args: argparse.Namespace, extra_tokens: int) -> None:
    """Has vLLM take the model's vocabulary for `extra_tokens` larger than it is, wherever it reads
    its size.

    args: vLLM's; `hf_overrides` changes. Raises ValueError where the size is not known, or is
    another one already.
    """
    if not extra_tokens:
        return
    overrides = args.hf_overrides or {}
    if not isinstance(overrides, dict) or _SIZE in overrides:
        raise ValueError(f"--extra-vocab: found --hf-overrides of {_SIZE}, expected none")
    config = read_config(args)
    size = getattr(config, _SIZE, None)
    if config is None or not isinstance(size, int) or config.get_text_config() is not config:
        found = "no config" if config is None else "a multimodal base, or none of text"
        raise ValueError(f"--extra-vocab: found {found}, expected a text model with a {_SIZE}")
    args.hf_overrides = {**overrides, _SIZE: size + extra_tokens}
