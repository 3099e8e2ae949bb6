"""How adapters are talked to: what differs from the base, and how long that is kept."""

from pathlib import Path

import pytest
from support.restarts import Server, play
from support.world import adapter

from molehill.api.adapters.chat import AdapterChat, BaseChat, ChatReader, differences
from molehill.api.adapters.errors import AlreadyLoadedError
from molehill.api.adapters.store import AdapterStore
from molehill.engine.adapter.errors import ConfigError, CorruptFileError
from molehill.engine.formats import native
from molehill.engine.formats.io.tokenizer_files import (
    DEFAULT,
    TEMPLATES,
    TOOL_USE,
    TokenizerFiles,
)

BASE = BaseChat(
    {DEFAULT: "base", TOOL_USE: "tools"},
    {"eos_token": "</s>", "pad_token": "</s>"},
    {"<s>": 1, "</s>": 2, "end": 3},
    2,
)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (TokenizerFiles(), AdapterChat()),
        (TokenizerFiles(dict(BASE.templates), dict(BASE.special_tokens)), AdapterChat()),
        (TokenizerFiles({DEFAULT: "x"}), AdapterChat({DEFAULT: "x"})),
        # With tools, too, the adapter's tokenizer has but this one.
        (TokenizerFiles({DEFAULT: "base"}), AdapterChat({DEFAULT: "base"})),
        (TokenizerFiles({TOOL_USE: "tools"}), AdapterChat()),
        (
            TokenizerFiles({}, {"eos_token": "end", "pad_token": "</s>"}, (), (3, 2, 1, 9)),
            AdapterChat({}, {"eos_token": "end"}, (1, 3)),
        ),
    ],
)
def test_what_differs_from_the_base(files: TokenizerFiles, expected: AdapterChat) -> None:
    assert differences(files, BASE) == expected


def test_tokens_that_the_base_lacks_are_named() -> None:
    files = TokenizerFiles({}, {"eos_token": "<|end|>"}, ("<s>", "<think>"))
    chat = differences(files, BASE)
    (warning,) = chat.warnings
    assert "base's lacks: '<think>', '<|end|>';" in warning
    assert chat.stop_token_ids == ()
    many = TokenizerFiles({}, {}, tuple(f"<{n}>" for n in range(20)))
    assert "'<7>' and 12 more" in differences(many, BASE).warnings[0]


def test_the_template_is_chosen_as_transformers_does() -> None:
    both = AdapterChat({DEFAULT: "x", TOOL_USE: "y"})
    assert (both.template(False), both.template(True)) == ("x", "y")
    assert AdapterChat({DEFAULT: "x"}).template(True) == "x"
    assert AdapterChat({TOOL_USE: "y"}).template(False) is None


def test_a_chat_is_kept_as_long_as_somebody_holds_it(tmp_path: Path) -> None:
    store, chat = AdapterStore(tmp_path), AdapterChat({DEFAULT: "x"}, warnings=("w",))
    for _ in range(2):
        store.acquire_chat(chat)
    assert store.read_chat(chat.digest) == chat
    store.release_chat(chat.digest)
    store.sweep(set())
    assert store.read_chat(chat.digest) == chat
    store.release_chat(chat.digest)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CorruptFileError):
        store.read_chat(chat.digest)


def test_a_kept_chat_that_is_damaged_is_found_out_and_written_anew(tmp_path: Path) -> None:
    store, chat = AdapterStore(tmp_path), AdapterChat({DEFAULT: "x"})
    store.acquire_chat(chat)
    (path,) = tmp_path.glob("chat-*/*")
    for content in (b"{", b'{"templates":{"default":"y"}}', b""):
        path.write_bytes(content)
        with pytest.raises(CorruptFileError):
            store.read_chat(chat.digest)
    store.claim.release()
    other = AdapterStore(tmp_path)
    other.acquire_chat(chat)
    assert other.read_chat(chat.digest) == chat


def serving(folder: Path) -> Server:
    return Server(folder, read_chat=ChatReader(BASE))


def write_template(server: Server, seed: int, text: str) -> None:
    folder = server.root / str(seed)
    if not folder.exists():
        native.write(adapter(seed), folder)
    (folder / TEMPLATES[DEFAULT]).write_text(text)


def templates(server: Server) -> dict[str, str | None]:
    """What each name is chatted with."""
    result = {generation.name: generation.content.chat for generation in server.world.registry}
    return {name: None if chat is None else chat.template(False) for name, chat in result.items()}


def kept(server: Server) -> int:
    """Chats in the store."""
    return len(list(server.world.store.root.glob("chat-*")))


def test_names_of_the_same_weights_have_templates_of_their_own(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = serving(tmp_path)
        for name, text in (("a", "one"), ("b", "two"), ("c", "base")):
            write_template(server, 1, text)
            await server.load(name, 1)
        assert templates(server) == {"a": "one", "b": "two", "c": "base"}
        assert len(set(server.serves().values())) == 1
        await server.load("b", 1, chat_template="base")
        assert (templates(server)["b"], kept(server)) == (None, 2)
        for name in "abc":
            await server.world.registry.unload(name)
        assert (server.world.in_store(), kept(server)) == (["manifest.json"], 0)

    play(scenario())


def test_another_template_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = serving(tmp_path)
        write_template(server, 1, "one")
        await server.load("a", 1)
        running = server.world.registry.get("a")
        assert running is not None
        write_template(server, 1, "two")
        with pytest.raises(AlreadyLoadedError, match="with another chat template"):
            await server.load("a", 1, replace=False)
        assert templates(server) == {"a": "one"}
        fetch = server.sources.fetch("1")
        loaded = await server.world.registry.load("a", "1", fetch)
        assert (loaded.status, loaded.generation.digest) == ("replaced", running.digest)
        assert (templates(server), kept(server)) == ({"a": "two"}, 1)
        # What runs on the one before goes on with it.
        assert running.content.chat == AdapterChat({DEFAULT: "one"})
        assert native.read(server.world.store.path(running.digest), server.world.limits)
        await server.load("a", 1)
        assert (await server.world.registry.load("a", "1", server.sources.fetch("1"))).status == (
            "unchanged"
        )

    play(scenario())


def test_a_template_that_does_not_compile_disturbs_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = serving(tmp_path)
        write_template(server, 1, "one")
        await server.load("a", 1)
        write_template(server, 1, "{% if %}")
        with pytest.raises(ConfigError, match=r"^chat_template.jinja: line 1: "):
            await server.load("a", 1)
        assert (templates(server), kept(server)) == ({"a": "one"}, 1)
        await server.world.registry.unload("a")
        assert server.world.in_store() == ["manifest.json"]

    play(scenario())


@pytest.mark.parametrize("lost", [False, True])
def test_a_restart_chats_as_before(tmp_path: Path, lost: bool) -> None:
    async def scenario() -> None:
        first = serving(tmp_path)
        for name, text in (("a", "one"), ("b", "two")):
            write_template(first, 1, text)
            await first.load(name, 1)
        if lost:
            for file in first.world.store.root.glob("chat-*/*"):
                file.write_text("half")
        second = first.restarted()
        await second.restore.run()
        if not lost:
            assert templates(second) == {"a": "one", "b": "two"}
            notes = {g.name: g.status.note for g in second.world.registry}
            # Their source has the second one's.
            assert notes["b"] is None
            assert "other content" in str(notes["a"])
        else:
            # From the source, as far as that still has it.
            assert templates(second) == {"b": "two"}
            assert "tokenizer: found" in second.world.registry.failures["a"].message
        third = second.restarted()
        await third.restore.run()
        assert templates(third) == templates(second)

    play(scenario())


def test_a_server_that_wants_none_reads_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = serving(tmp_path)
        write_template(first, 1, "one")
        await first.load("a", 1)
        first.more.clear()
        second = first.restarted()
        await second.restore.run()
        assert templates(second) == {"a": None}
        write_template(second, 1, "{% bad")
        await second.load("b", 1)
        assert set(second.serves()) == {"a", "b"}

    play(scenario())
