"""Chat templates of adapters, where all of vLLM's routes that render chats come together: chat
completions, responses, messages, tokenize and render."""

import inspect
from collections.abc import Callable
from typing import Any

from vllm.renderers.hf import HfRenderer, resolve_chat_template

from molehill.api.adapters.chat import AdapterChat, BaseChat
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.vllm.model_lookup import admit
from molehill.engine.formats.io.tokenizer_files import DEFAULT, TOOL_USE


def base_chat(online_renderer: Any) -> BaseChat | None:
    """Of the model that vLLM renders for; None where that is not by Jinja templates: with
    tokenizers or encodings of a model's own, and without a tokenizer."""
    renderer = online_renderer.renderer
    tokenizer = renderer.tokenizer
    if not isinstance(renderer, HfRenderer) or tokenizer is None or online_renderer.use_harmony:
        return None

    def template(tools: list[Any] | None) -> str | None:
        found: str | None = resolve_chat_template(
            tokenizer,
            online_renderer.chat_template,
            tools,
            model_config=online_renderer.model_config,
        )
        return found

    return BaseChat(
        {DEFAULT: template(None), TOOL_USE: template([])},
        dict(tokenizer.special_tokens_map),
        tokenizer.get_vocab(),
        tokenizer.eos_token_id,
    )


def render_as_adapters_do(online_renderer: Any, models: Any, registry: AdapterRegistry) -> None:
    """Puts adapters' templates in front of this renderer's `preprocess_chat`. models: vLLM's."""

    def chat_of(name: str | None) -> AdapterChat | None:
        request = dict.get(models.lora_requests, name) if name else None
        if request is None:
            return None
        # From here on the answer is this generation's, whatever becomes of the name.
        generation = admit(registry, request)
        return None if generation is None else generation.content.chat

    online_renderer.preprocess_chat = with_adapter_chats(online_renderer.preprocess_chat, chat_of)


def with_adapter_chats(
    preprocess_chat: Callable[..., Any], chat_of: Callable[[str | None], AdapterChat | None]
) -> Callable[..., Any]:
    """`preprocess_chat` with the template of the request's model as its default: what a request
    brings itself is ruled on by vLLM, and goes before it. chat_of: by a request's `model`."""
    signature = inspect.signature(preprocess_chat)

    async def preprocess(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        chat = chat_of(getattr(given["request"], "model", None))
        if chat is not None:
            template = chat.template(with_tools=given.get("tool_dicts") is not None)
            given["default_template"] = template or given["default_template"]
            # Templates see them as variables, and what is given so before the tokenizer's.
            more = given["default_template_kwargs"] or {}
            given["default_template_kwargs"] = {**chat.special_tokens, **more}
        return await preprocess_chat(*call.args, **call.kwargs)

    return preprocess
