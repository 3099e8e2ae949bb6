"""vLLM's option `--enable-return-routed-experts`, before a server starts."""

import argparse

from molehill.api.vllm.precision import read_config


def take_over(args: argparse.Namespace) -> bool:
    """Whether mixtures' choices are to be in `routed_experts`. args: vLLM's, which lose the option
    then."""
    if not args.enable_return_routed_experts or routes_itself(args):
        return False
    args.enable_return_routed_experts = False
    return True


def routes_itself(args: argparse.Namespace) -> bool:
    """Whether the base has experts; true also where its config cannot be read, which vLLM will
    explain."""
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    config = read_config(args)
    if config is None:
        return True
    convertor = ModelArchConfigConvertorBase(config, config.get_text_config())
    return int(convertor.get_num_experts()) > 0
