"""Which blocks of the prefix cache requests have in common, by vLLM's own hashes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.golden import Case
from support.xlora import non_granular
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.request import Request

from molehill.engine import formats
from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.formats import native
from molehill.engine.vllm import prefix_keys

BLOCK = 16
INVOCATION = [301, 17, 302]
OTHER = [300, 17, 302]
TEXT = list(range(20, 100))


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    """In this process, for the test."""
    name = "generate_block_hash_extra_keys"
    before = {module: getattr(module, name) for module in (kv_cache_utils, block_pool)}
    prefix_keys.install()
    kv_cache_utils.init_none_hash(sha256_cbor)
    yield
    for module, original in before.items():
        setattr(module, name, original)


@pytest.fixture
def adapters(edited: Callable[..., Path]) -> dict[str, LoRARequest]:
    """A plain LoRA, PEFT's activated one, and an activated mixture."""
    paths = {
        "plain": Case("lora").path,
        "alora": Case("alora").path,
        "dynmole": edited("dynmole-k1", {"alora_invocation_tokens": OTHER}),
    }
    return {
        name: LoRARequest(name, i, str(path)) for i, (name, path) in enumerate(paths.items(), 1)
    }


def request(prompt: list[int], lora: LoRARequest | None = None, salt: str | None = None) -> Request:
    hasher = kv_cache_utils.get_request_block_hasher(BLOCK, sha256_cbor)
    return Request(
        request_id=f"r{len(prompt)}",
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(max_tokens=100),
        pooling_params=None,
        lora_request=lora,
        cache_salt=salt,
        block_hasher=hasher,
    )


def common(one: Request, other: Request) -> int:
    """Blocks at the start that the two have in common."""
    pairs = list(zip(one.block_hashes, other.block_hashes, strict=False))
    same = [a == b for a, b in pairs]
    # A hash holds that of the block before, so none can be the same after one that is not.
    assert same == sorted(same, reverse=True)
    return sum(same)


def at(offset: int, invocation: list[int] = INVOCATION, length: int = 80) -> list[int]:
    prompt = TEXT[:length]
    return [*prompt[:offset], *invocation, *prompt[offset:]][:length]


@pytest.mark.parametrize(
    ("offset", "shared"), [(0, 0), (15, 0), (16, 1), (31, 1), (32, 2), (70, 4), (77, 4)]
)
def test_blocks_that_end_before_the_invocation_are_the_bases(
    adapters: dict[str, LoRARequest], offset: int, shared: int
) -> None:
    base, activated = request(at(offset)), request(at(offset), adapters["alora"])
    assert len(base.block_hashes) == len(activated.block_hashes) == 5
    assert common(base, activated) == shared
    assert common(request(at(offset)), base) == 5


def test_activated_adapters_share_with_each_other_and_plain_ones_with_nobody(
    adapters: dict[str, LoRARequest],
) -> None:
    prompt = [*TEXT[:40], *INVOCATION, *TEXT[40:60], *OTHER, *TEXT[60:]]
    alora, dynmole = (request(prompt, adapters[name]) for name in ("alora", "dynmole"))
    plain = request(prompt, adapters["plain"])
    assert common(alora, dynmole) == 2
    assert common(request(prompt), dynmole) == 3
    assert common(request(prompt), plain) == common(alora, plain) == 0
    assert common(plain, request(prompt, adapters["plain"])) == 5


def test_other_weights_share_what_is_the_bases_and_no_more(
    adapters: dict[str, LoRARequest], tmp_path: Path
) -> None:
    """As after an in-place reload: the name is the same, the path is the other digest's."""
    copy = tmp_path / "other"
    copy.symlink_to(Case("alora").path)
    reloaded = LoRARequest("alora", 9, str(copy))
    prompt = at(40)
    assert common(request(prompt, adapters["alora"]), request(prompt, reloaded)) == 2


def test_the_same_tokens_under_another_offset_are_other_blocks(
    adapters: dict[str, LoRARequest],
) -> None:
    """Block 0 holds an invocation, and the beginning of another that only one prompt ends."""
    alora = adapters["alora"]
    block = [*TEXT[:5], *INVOCATION, *TEXT[5:11], 301, 17]
    assert len(block) == BLOCK
    once, twice = request([*block, 5, 6, *TEXT], alora), request([*block, 302, *TEXT], alora)
    assert (once.molehill_invocation.offset, twice.molehill_invocation.offset) == (5, 14)
    assert common(once, twice) == 0


def test_what_was_generated_is_not_searched_until_it_is_a_prompt(
    adapters: dict[str, LoRARequest],
) -> None:
    alora = adapters["alora"]
    prompt = [*TEXT[:2], *INVOCATION, *TEXT[2:6]]
    generated = [*INVOCATION, *TEXT[6:40]]
    first = request(prompt, alora)
    first.append_output_token_ids(generated)
    assert first.molehill_invocation.offset == 2
    assert len(first.block_hashes) == 2
    again = request([*prompt, *generated], alora)
    assert again.molehill_invocation.offset == len(prompt)
    assert common(first, again) == 0
    alike = request(prompt, alora)
    alike.append_output_token_ids(generated)
    assert common(first, alike) == 2


def test_a_salt_keeps_others_out_before_the_invocation_too(
    adapters: dict[str, LoRARequest],
) -> None:
    prompt = at(40)
    alora = adapters["alora"]
    salted = request(prompt, alora, salt="mine")
    assert common(request(prompt, salt="mine"), salted) == 2
    assert common(request(prompt), salted) == common(request(prompt, alora), salted) == 0
    assert common(request(prompt, alora, salt="yours"), salted) == 0


def test_a_prompt_without_the_invocation_shares_nothing_with_the_base(
    adapters: dict[str, LoRARequest],
) -> None:
    """Only past molehill's API; its outputs are zeroed."""
    assert common(request(TEXT), request(TEXT, adapters["alora"])) == 0


def test_a_config_that_cannot_be_read_shares_with_nobody(tmp_path: Path, caplog: Any) -> None:
    gone = LoRARequest("gone", 7, str(tmp_path / "gone"))
    one, other = request(TEXT, gone), request(TEXT[:70], gone)
    assert common(one, other) == common(request(TEXT), one) == 0


def test_events_show_the_bases_blocks_as_the_bases(adapters: dict[str, LoRARequest]) -> None:
    activated = request(at(32), adapters["alora"])
    keys = [
        block_pool.generate_block_hash_extra_keys(activated, start, start + BLOCK, 0)[0]
        for start in range(0, 64, BLOCK)
    ]
    assert kv_cache_utils.to_event_extra_keys(keys) == [None, None, ("alora",), ("alora",)]


def stored(request: Request, *steps: int, kept: list[bool] | None = None) -> list[Any]:
    """Events of a request's blocks, which are full after as many tokens as each step says. kept:
    blocks of the first step that the cache keeps."""
    pool = block_pool.BlockPool(20, True, BLOCK, enable_kv_cache_events=True)
    blocks, done = pool.get_new_blocks(len(request.block_hashes)), 0
    for step in steps:
        mask = kept if done == 0 else None
        pool.cache_full_blocks(request, blocks, done, step // BLOCK, BLOCK, 0, block_mask=mask)
        done = step // BLOCK
    return pool.take_events()


def by_block(events: list[Any]) -> list[tuple[Any, ...]]:
    """Each block's hash, the one before it, its tokens, and whose it is."""
    result = []
    for event in events:
        parents = [event.parent_block_hash, *event.block_hashes]
        for i, block_hash in enumerate(event.block_hashes):
            tokens = list(event.token_ids[i * BLOCK : (i + 1) * BLOCK])
            result.append((block_hash, parents[i], tokens, event.lora_name, event.lora_id))
    return result


@pytest.mark.parametrize("steps", [(80,), (16, 80), (32, 80), (48, 64, 80)])
def test_events_name_the_adapter_from_its_invocation_on(
    adapters: dict[str, LoRARequest], steps: tuple[int, ...]
) -> None:
    prompt = at(40)
    base, plain, alora = (
        by_block(stored(request(prompt, adapters.get(name)), *steps))
        for name in ("base", "plain", "alora")
    )
    assert {block[3:] for block in base} == {(None, None)}
    assert {block[3:] for block in plain} == {("plain", 1)}
    assert alora[:2] == base[:2]
    assert [block[3:] for block in alora[2:]] == [("alora", 2)] * 3
    assert [block[1] for block in alora[1:]] == [block[0] for block in alora[:-1]]
    assert [block[2] for block in alora] == [block[2] for block in base]


def test_events_of_blocks_that_are_not_all_kept(adapters: dict[str, LoRARequest]) -> None:
    """As a group with a sliding window keeps them: the second of two before the invocation."""
    alora = request(at(40), adapters["alora"])
    first, second = stored(alora, 80, kept=[False, True, True, False, True])
    hashes = [kv_cache_utils.maybe_convert_block_hash(key) for key in alora.block_hashes]
    assert (first.lora_name, first.block_hashes) == (None, [hashes[1]])
    assert list(first.token_ids) == at(40)[:32]
    assert (second.lora_name, second.block_hashes) == ("alora", [hashes[2], hashes[4]])
    assert second.parent_block_hash == hashes[1]
    assert list(second.token_ids) == at(40)[32:]
    assert second.extra_keys == [("alora",)] * 2


def test_events_of_reused_and_of_partial_blocks(adapters: dict[str, LoRARequest]) -> None:
    names = []
    for name, salt in (("base", None), ("plain", None), ("alora", None), ("alora", "mine")):
        asked = request(at(40), adapters.get(name), salt)
        pool = block_pool.BlockPool(20, True, BLOCK, enable_kv_cache_events=True)
        pool.emit_cached_block_events(asked, 5, BLOCK, 0)
        (block,) = pool.get_new_blocks(1)
        for tokens in (16, 48):
            pool.cache_partial_block(asked, block, tokens, 0, 4 * BLOCK)
        names.append([event.lora_name for event in pool.take_events() if is_stored(event)])
    activated = [None, "alora", None, "alora"]
    assert names == [[None] * 3, ["plain"] * 3, activated, activated]


def is_stored(event: Any) -> bool:
    return type(event).__name__ == "BlockStored"


def test_a_second_installation_changes_nothing() -> None:
    before = kv_cache_utils.generate_block_hash_extra_keys
    prefix_keys.install()
    assert (
        kv_cache_utils.generate_block_hash_extra_keys
        is before
        is (block_pool.generate_block_hash_extra_keys)
    )
    assert prefix_keys.are_installed()


def test_other_keys_of_vllms_leave_it_alone(monkeypatch: Any, caplog: Any) -> None:
    def generate(request: Any, start: int, end: int) -> None: ...

    monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", generate)
    prefix_keys.install()
    assert kv_cache_utils.generate_block_hash_extra_keys is generate
    assert not prefix_keys.are_installed()
    with pytest.raises(UnsupportedError, match="VLLM_PLUGINS"):
        prefix_keys.check(formats.read(Case("alora").path))
    prefix_keys.check(formats.read(Case("lora").path))


def answering(adapter: LoRARequest, prompt: list[int], answer: list[int]) -> Request:
    result = request(prompt, adapter)
    result.append_output_token_ids(answer)
    return result


@pytest.mark.parametrize(
    # k, and how many of the blocks of 40 asked and 40 answered tokens hold no later one.
    ("tokens", "shared"),
    [(0, 2), (7, 2), (8, 3), (24, 4), (39, 4), (40, 5), (4000, 5), (None, 5)],
)
def test_blocks_with_tokens_after_the_last_granular_one_are_their_requests(
    tmp_path: Path, tokens: int | None, shared: int
) -> None:
    """In PEFT's files and in a copy of the store."""
    directory = non_granular(tmp_path / "xlora", tokens)
    native.write(formats.read(directory), tmp_path / "copy")
    for path in (directory, tmp_path / "copy"):
        adapter = LoRARequest("x", 7, str(path))
        one, other = (answering(adapter, TEXT[:40], TEXT[40:80]) for _ in range(2))
        assert len(one.block_hashes) == 5
        assert common(one, other) == shared
        assert common(one, request(TEXT, adapter)) == shared
        assert common(one, one) == 5
        assert common(request(TEXT, adapter), request(TEXT, adapter)) == 5


def test_an_engine_without_the_plugin_refuses_non_granular_scalings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = formats.read(non_granular(tmp_path / "xlora", 0))
    prefix_keys.check(adapter)
    monkeypatch.setattr(prefix_keys, "are_installed", lambda: False)
    prefix_keys.check(formats.read(Case("xlora").path))
    with pytest.raises(UnsupportedError, match="non_granular_after"):
        prefix_keys.check(adapter)
