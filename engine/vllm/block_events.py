"""KV events: blocks that an activated adapter shares with the base are told as the base's.

vLLM's events of stored blocks carry the name of the request's adapter, for all blocks of an event.
Routers and connectors that key blocks by it would not find the base's blocks for the adapter, nor
the other way round. So such an event is told in two: the blocks before the invocation without a
name, as the base's own request tells them, and the rest with it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm.logger import init_logger

from molehill.engine.vllm import compat, seams
from molehill.engine.vllm.invocation_seams import EVENTS

logger = init_logger("vllm.molehill")

# Of one block, as vLLM's generate_block_hash_extra_keys returns them: (kind, value, ...) each.
Keys = tuple[tuple[Any, ...], ...] | None
Builder = Callable[..., Any]


def install() -> None:
    """In the engine core, after its keys are the invocation's. Where vLLM's events are not made as
    expected, without effect and with a warning: all of a request's blocks then carry the name."""
    try:
        seams.check(EVENTS, compat.installed_version())
    except (ImportError, RuntimeError) as error:
        logger.warning("KV events of activated adapters name them for the base's blocks: %s", error)
        return
    from vllm.v1.core.block_pool import BlockPool

    if hasattr(BlockPool.cache_partial_block, "follows_invocation"):
        return
    BlockPool._build_block_stored_event = naming_whose_blocks_are(
        BlockPool._build_block_stored_event
    )
    BlockPool.cache_partial_block = naming_whose_block_is(BlockPool.cache_partial_block)


def naming_whose_blocks_are(build: Builder) -> Builder:
    """vLLM's BlockPool._build_block_stored_event, whose caller queues what it returns."""

    @functools.wraps(build)
    def build_event(pool: Any, request: Any, **of_blocks: Any) -> Any:
        keys = of_blocks["extra_keys_list"]
        shared = 0 if request.lora_request is None else shared_blocks(keys)
        if not shared:
            return build(pool, request, **of_blocks)
        if shared == len(keys):
            return nameless(build(pool, request, **of_blocks))
        border, size = first_named(request, of_blocks, shared), of_blocks["block_size"]
        parts = [
            {name: values[part] for name, values in of_blocks.items() if isinstance(values, list)}
            for part in (slice(shared), slice(shared, None))
        ]
        before = {**of_blocks, **parts[0], "end_token_idx": border * size}
        pool.kv_event_queue.append(nameless(build(pool, request, **before)))
        parent = block_hash(pool, request, border - 1, size)
        there = {"start_token_idx": border * size, "parent_block_hash": parent}
        return build(pool, request, **{**of_blocks, **parts[1], **there})

    return build_event


def first_named(request: Any, of_blocks: Mapping[str, Any], shared: int) -> int:
    """The number of a request's first block with the adapter's key, of which come `shared` in the
    event. vLLM leaves those out that its groups do not keep."""
    size, start = of_blocks["block_size"], of_blocks["start_token_idx"]
    if (of_blocks["end_token_idx"] - start) // size > len(of_blocks["extra_keys_list"]):
        border: int = request.molehill_invocation.offset // size
    else:
        border = start // size + shared
    return border


def naming_whose_block_is(cache: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's BlockPool.cache_partial_block, which queues an event of one block by itself."""

    @functools.wraps(cache)
    def cache_block(pool: Any, request: Any, *args: Any, **more: Any) -> Any:
        queued = len(pool.kv_event_queue)
        key = cache(pool, request, *args, **more)
        if request.lora_request is not None:
            for event in pool.kv_event_queue[queued:]:
                if getattr(event, "lora_name", None) not in carried_first(event):
                    nameless(event)
        return key

    cache_block.follows_invocation = True  # type: ignore[attr-defined]
    return cache_block


def shared_blocks(keys: Sequence[Keys]) -> int:
    """Blocks at the start without an adapter's key."""
    return next(
        (i for i, of_block in enumerate(keys) if any(key[0] == "lora" for key in of_block or ())),
        len(keys),
    )


def carried_first(event: Any) -> set[Any]:
    """What the blocks of an event of stored ones carry first, where an adapter's name would be;
    None of other events, and of blocks that carry nothing."""
    return {keys[0] for keys in getattr(event, "extra_keys", None) or () if keys} or {None}


def nameless(event: Any) -> Any:
    """The event as one of the base."""
    event.lora_id = event.lora_name = None
    return event


def block_hash(pool: Any, request: Any, number: int, size: int) -> Any:
    """Of a request's block, as events have it."""
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash, resolve_block_hashes

    hashes = resolve_block_hashes(request.block_hashes, pool.hash_block_size, size)
    return maybe_convert_block_hash(hashes[number])
