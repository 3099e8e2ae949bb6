"""Chat templates and tokenizers of adapters, where vLLM's routes that render come together: chat
completions, responses, messages, completions, tokenize, detokenize and render."""

import inspect
from collections.abc import Callable
from typing import Any

from vllm.renderers.hf import HfRenderer, resolve_chat_template

from molehill.api.adapters.chat import AdapterChat, BaseChat
from molehill.api.adapters.generation import Content
from molehill.api.adapters.request_admission import RequestAdmission
from molehill.api.vllm.adapter_tokenizers import (
    AdapterTokenizers,
    Texts,
    with_adapter_texts,
    with_adapter_tokenizers,
)
from molehill.api.vllm.model_lookup import admit
from molehill.engine.formats.io.tokenizer_files import DEFAULT, TOOL_USE


def base_chat(online_renderer: Any, tokenizers: AdapterTokenizers | None = None) -> BaseChat | None:
    """Of the model that vLLM renders for; None where that is not by Jinja templates: with
    tokenizers or encodings of a model's own, and without a tokenizer. tokenizers: of adapters that
    add tokens; None where none may."""
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
        tokenizers.takes if tokenizers is not None and tokenizers.can_add else None,
    )


def render_as_adapters_do(
    online_renderer: Any,
    models: Any,
    registry: RequestAdmission,
    tokenizers: AdapterTokenizers | None = None,
    tokenization: Any = None,
) -> None:
    """Puts adapters' templates in front of this renderer's `preprocess_chat`, and their tokenizers
    in the place of the base's. models, tokenization: vLLM's."""

    def content_of(name: str | None) -> Content | None:
        request = models.lora_requests.peek(name)
        if request is None:
            return None
        # From here on the answer is this generation's, whatever becomes of the name.
        generation = admit(registry, request)
        return None if generation is None else generation.content

    def chat_of(name: str | None) -> AdapterChat | None:
        content = content_of(name)
        return None if content is None else content.chat

    def texts_of(name: str | None) -> Texts:
        content = content_of(name)
        return () if content is None else content.token_texts

    for owner, methods in (
        (online_renderer, ("preprocess_chat", "preprocess_completion")),
        (tokenization, ("create_tokenize", "create_detokenize")),
    ):
        if owner is None or tokenizers is None:
            continue
        for method in methods:
            setattr(owner, method, with_adapter_tokenizers(owner, method, tokenizers, texts_of))
    online_renderer.preprocess_chat = with_adapter_chats(online_renderer.preprocess_chat, chat_of)


def answer_as_adapters_do(
    output_processor: Any, registry: RequestAdmission, tokenizers: AdapterTokenizers
) -> None:
    """Has the texts of answers written by the tokenizers of their adapters. output_processor:
    vLLM's."""

    def texts_of(lora_request: Any) -> Texts:
        generation = registry.generation(lora_request.lora_int_id)
        return () if generation is None else generation.content.token_texts

    adapted = with_adapter_texts(output_processor, tokenizers, texts_of)
    output_processor.add_request = adapted


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
