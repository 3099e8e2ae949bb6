"""Tokenizers of adapters that add tokens: the base's with theirs after it.

They read what a request gives as text, and write what its adapter answers. All else of an adapter's
tokenizer is taken for the base's.
"""

import asyncio
import copy
import functools
import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from vllm.exceptions import VLLMValidationError
from vllm.tokenizers.hf import get_cached_tokenizer, maybe_make_thread_pool
from vllm.utils.async_utils import make_async

from molehill.api.vllm.invocation import is_beam
from molehill.engine.formats.io.tokenizer_files import TokenText

logger = logging.getLogger("vllm.molehill")

Texts = tuple[TokenText, ...]
# By a request's model; none for the base's tokenizer.
TextsOf = Callable[[str | None], Texts]


class AdapterTokenizers:
    """base: vLLM's tokenizer of the base. most: that are kept; each takes as much memory as the
    base's, twice."""

    def __init__(self, base: Any, most: int = 8) -> None:
        self._base, self._most = _plain(base), most
        self._made: OrderedDict[Texts, Any] = OrderedDict()
        self._lock = Lock()

    @property
    def can_add(self) -> bool:
        """Whether the base's takes tokens at ids that are known before."""
        return isinstance(self._base, PreTrainedTokenizerFast)

    def takes(self, texts: Texts) -> bool:
        """Whether the base's tokenizer can have these, at their ids."""
        try:
            self.of(texts)
        except ValueError as error:
            logger.warning("molehill: %s", error)
            return False
        return True

    def of(self, texts: Texts) -> Any:
        """The base's with these. In any thread. Raises ValueError where they get other ids."""
        with self._lock:
            made = self._made.pop(texts, None) or self._make(texts)
            self._made[texts] = made
            while len(self._made) > self._most:
                self._made.popitem(last=False)
            return made

    def _make(self, texts: Texts) -> Any:
        tokenizer = copy.deepcopy(self._base)
        tokenizer.add_tokens([_added(text) for text in texts])
        for text in texts:
            number = tokenizer.convert_tokens_to_ids(text.text)
            if number != text.id:
                raise ValueError(f"tokenizer: found {text.text!r} at {text.id}, expected {number}")
        return maybe_make_thread_pool(get_cached_tokenizer(tokenizer))


def _added(text: TokenText) -> AddedToken:
    return AddedToken(
        text.text,
        special=text.special,
        lstrip=text.lstrip,
        rstrip=text.rstrip,
        single_word=text.single_word,
        normalized=text.normalized,
    )


def _plain(tokenizer: Any) -> Any:
    """Without what vLLM puts around it, which pickles as a call of what put it there."""
    while isinstance(tokenizer, PreTrainedTokenizerFast):
        made, arguments = tokenizer.__reduce__()[:2]
        if made not in (maybe_make_thread_pool, get_cached_tokenizer):
            break
        tokenizer = arguments[0]
    return tokenizer


def renderer_with(renderer: Any, tokenizer: Any) -> Any:
    """vLLM's renderer with another tokenizer; all else is the same object's."""
    view = copy.copy(renderer)
    view.tokenizer = tokenizer
    # They are bound to the renderer that they were made on.
    view._tokenize_prompt_async = make_async(view._tokenize_prompt, executor=view._executor)
    view._async_tokenizer_decode = make_async(view._decode, executor=view._executor)
    return view


def with_adapter_tokenizers(
    owner: Any, method: str, tokenizers: AdapterTokenizers, texts_of: TextsOf
) -> Callable[..., Any]:
    """A coroutine method of `owner`, which has vLLM's `renderer`, that runs with the tokenizer of
    its `request`'s model."""
    call = getattr(type(owner), method)
    signature = inspect.signature(call)

    @functools.wraps(getattr(owner, method))
    async def run(*args: Any, **kwargs: Any) -> Any:
        request = signature.bind(owner, *args, **kwargs).arguments["request"]
        texts = texts_of(getattr(request, "model", None))
        view = owner
        if texts:
            view = copy.copy(owner)
            # One that is not kept any more takes a second to make.
            tokenizer = await asyncio.to_thread(tokenizers.of, texts)
            view.renderer = renderer_with(owner.renderer, tokenizer)
        return await call(view, *args, **kwargs)

    return run


def check_written(texts: Texts, call: Mapping[str, Any]) -> None:
    """Raises VLLMValidationError for a beam search, whose answers vLLM writes by the base's
    tokenizer: it leaves such tokens out. texts: of the adapter. call: of vLLM's engine client."""
    if texts and is_beam(call):
        found = f"beam search with an adapter that adds tokens ({texts[0].text!a})"
        raise VLLMValidationError(f"{found}, expected none", parameter="use_beam_search")


def with_adapter_texts(
    output_processor: Any, tokenizers: AdapterTokenizers, texts_of: Callable[[Any], Texts]
) -> Callable[..., None]:
    """`add_request` of vLLM's, whose answers are written by their adapter's tokenizer. texts_of: by
    a LoRARequest."""
    call = type(output_processor).add_request

    def add(request: Any, *args: Any, **kwargs: Any) -> None:
        lora_request = getattr(request, "lora_request", None)
        texts = texts_of(lora_request) if lora_request is not None else ()
        view = output_processor
        if texts:
            view = copy.copy(output_processor)
            view.tokenizer = tokenizers.of(texts)
        call(view, request, *args, **kwargs)

    return add
