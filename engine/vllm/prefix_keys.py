"""Keys of the prefix cache: before its invocation, an activated adapter's blocks are the base's.

vLLM hashes a block with its tokens, the hash of the block before and extra keys; an adapter's name
and path are one. Blocks that end at or before the invocation's first token get no such key, so that
the base, and every other activated adapter, finds them, and they find the base's. Blocks from there
on carry the name and path as ever, and the offset: a block that holds two occurrences, or is
followed by the end of another, has the same tokens under different offsets.

Blocks that hold tokens which an X-LoRA computes with another token's scalings (`non_granular_rows`)
are their request's alone: in the prompt of another the same tokens have scalings of their own, and
the second cache lacks them. The request itself finds them, after it was preempted.
"""

import functools
import multiprocessing
import sys
import uuid
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from vllm.logger import init_logger

from molehill.engine import formats
from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.adapter.invocation import invocation_offset
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats.readers import invocation, non_granular
from molehill.engine.vllm import block_events, compat
from molehill.engine.vllm.invocation_seams import PREFIX_KEYS

logger = init_logger("vllm.molehill")

# Adapters whose invocation tokens are remembered.
MOST = 4096

ExtraKeys = tuple[tuple[Any, ...] | None, int]


class Invocation(NamedTuple):
    """Of one request. offset: the first position that the adapter acts on; -1 if it never does.
    mark: what its blocks from there on carry beside name and path."""

    offset: int
    mark: int | str


class UnsharedBlocks(NamedTuple):
    """Of one request: blocks that hold tokens from `start` on, which carry `mark`."""

    start: int
    mark: str


def install() -> None:
    """vLLM's general plugin, for the engine core and its workers; without effect a second time.

    They are processes that another one started, or one that has imported the engine core by now;
    others have no blocks, and do not import vLLM's cache for this. Where vLLM's keys are not as
    expected, without effect and with a warning: molehill's worker then refuses activated adapters.
    """
    is_started = multiprocessing.parent_process() is not None
    if are_installed() or not (is_started or PREFIX_KEYS.module in sys.modules):
        return
    try:
        compat.check_prefix_keys()
    except (ImportError, RuntimeError) as error:
        logger.warning("Activated adapters cannot be served: %s", error)
        return
    from vllm.v1.core import kv_cache_utils

    original: Callable[..., ExtraKeys] = kv_cache_utils.generate_block_hash_extra_keys
    replacement = with_invocation(original)
    # vLLM's modules import it by name. Those that come later get it from there.
    for name, module in list(sys.modules.items()):
        imported = getattr(module, "__dict__", {}).get(PREFIX_KEYS.name)
        if name.startswith("vllm.") and imported is original:
            setattr(module, PREFIX_KEYS.name, replacement)
    block_events.install()


def are_installed() -> bool:
    """Whether this process's blocks are keyed so."""
    module = sys.modules.get(PREFIX_KEYS.module)
    return hasattr(getattr(module, PREFIX_KEYS.name, None), "follows_invocation")


def check(adapter: Adapter) -> None:
    """Raises UnsupportedError for an activated adapter, and one with non-granular scalings, where
    blocks are not keyed so: they would be taken for others."""
    if are_installed():
        return
    if adapter.invocation_tokens:
        found = "an activated adapter in an engine without molehill's plugin"
        raise UnsupportedError(invocation.FIELD, found, "molehill among VLLM_PLUGINS")
    if adapter.classifier is not None and adapter.classifier.non_granular_after is not None:
        found = "an X-LoRA with it in an engine without molehill's plugin"
        raise UnsupportedError(non_granular.FIELD, found, "molehill among VLLM_PLUGINS")


def with_invocation(original: Callable[..., ExtraKeys]) -> Callable[..., ExtraKeys]:
    """vLLM's generate_block_hash_extra_keys, whose adapter's key follows the invocation."""

    @functools.wraps(original)
    def extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> ExtraKeys:
        keys, mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        if request.lora_request is None or keys is None:
            return keys, mm_idx
        unshared = unshared_blocks_in(request)
        if unshared is not None and end_token_idx > unshared.start:
            return tuple((*key, unshared.mark) if key[0] == "lora" else key for key in keys), mm_idx
        invoked = invocation_in(request)
        if invoked is None:
            return keys, mm_idx
        mark = () if end_token_idx <= invoked.offset else (invoked.mark,)
        changed = (
            (*key, *mark) if key[0] == "lora" else key for key in keys if mark or key[0] != "lora"
        )
        return tuple(changed) or None, mm_idx

    extra_keys.follows_invocation = True  # type: ignore[attr-defined]
    return extra_keys


def invocation_in(request: Any) -> Invocation | None:
    """Of vLLM's Request, which keeps it; None if its adapter acts on every token. Never raises."""
    try:
        invoked: Invocation | None = request.molehill_invocation
    except AttributeError:
        invoked = request.molehill_invocation = _invocation_in(request)
    return invoked


def _invocation_in(request: Any) -> Invocation | None:
    try:
        tokens = invocation_tokens(request.lora_request.lora_path)
    except Exception:
        # Shared with nobody, its blocks are right whatever the adapter does.
        logger.exception("The config of adapter %s is unreadable", request.lora_request.lora_name)
        return Invocation(-1, request.request_id)
    if not tokens:
        return None
    offset = invocation_offset(request.prompt_token_ids or (), tokens)
    return Invocation(-1, -1) if offset is None else Invocation(offset, offset)


def unshared_blocks_in(request: Any) -> UnsharedBlocks | None:
    """Of vLLM's Request, which keeps it; None if it shares all its blocks. Never raises."""
    try:
        unshared: UnsharedBlocks | None = request.molehill_unshared
    except AttributeError:
        unshared = request.molehill_unshared = _unshared_blocks_in(request)
    return unshared


def _unshared_blocks_in(request: Any) -> UnsharedBlocks | None:
    try:
        tokens = non_granular_after(request.lora_request.lora_path)
    except Exception:
        logger.exception("The config of adapter %s is unreadable", request.lora_request.lora_name)
        tokens = 0
    if tokens is None:
        return None
    # Ids of requests may come again.
    return UnsharedBlocks(request.num_prompt_tokens + tokens, uuid.uuid4().hex)


@lru_cache(MOST)
def non_granular_after(path: str) -> int | None:
    """Of the adapter in a directory. Raises AdapterError, OSError."""
    return formats.non_granular_after(Path(path))


@lru_cache(MOST)
def invocation_tokens(path: str) -> tuple[int, ...]:
    """Of the adapter in a directory. Raises AdapterError, OSError."""
    return formats.invocation_tokens(Path(path))
