"""Tokens that end an adapter's answers, beside those that end the base's."""

from collections.abc import Mapping
from typing import Any

from vllm.sampling_params import SamplingParams

from molehill.api.adapters.chat import AdapterChat


def stop_as_adapter_does(chat: AdapterChat | None, call: Mapping[str, Any]) -> None:
    """Ends a call's answer at the adapter's tokens too, unless it ignores them, as vLLM does at
    those of a generation_config.json. call: arguments of the engine client's, by name."""
    params = call.get("sampling_params")
    if chat is not None and chat.stop_token_ids and isinstance(params, SamplingParams):
        params.update_from_generation_config({"eos_token_id": list(chat.stop_token_ids)})
