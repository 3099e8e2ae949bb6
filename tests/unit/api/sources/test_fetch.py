"""What may be fetched from where, and what is fetched. Over real HTTP, on this machine."""

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from support.api_client import copy_adapter
from support.file_server import COMMIT, X_LORA, fetch_from_hub, serving, sources
from support.golden import Case
from support.uploads import split
from support.world import World, let_tasks_run

from molehill.api.adapters.admission import AdmissionLimits
from molehill.api.adapters.errors import (
    BadPathError,
    FetchError,
    ForbiddenPathError,
    ForbiddenSourceError,
)
from molehill.api.adapters.source import Source
from molehill.api.sources.fetch import MOST_MEMBERS, Sources, reason
from molehill.api.sources.roots import AdapterRoots
from molehill.api.sources.urls import allowed
from molehill.engine import formats
from molehill.engine.adapter.errors import (
    AdapterNotFoundError,
    ConfigError,
    LimitError,
    UnsupportedError,
)
from molehill.engine.formats import native
from molehill.engine.formats.io import files, tokenizer_files
from molehill.engine.formats.readers.expert_layout import README

PREFIX = "https://models.example/adapters"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (f"{PREFIX}/a", True),
        (f"{PREFIX}/team/a-1.0/", True),
        (PREFIX, False),
        (f"{PREFIX}-other/a", False),
        (f"{PREFIX}/../secret", False),
        (f"{PREFIX}/./a", False),
        (f"{PREFIX}/%2e%2e/secret", False),
        (f"{PREFIX}/a?to=elsewhere", False),
        (f"{PREFIX}/a#b", False),
        (f"{PREFIX}//a", False),
        (f"{PREFIX}/a\\..\\b", False),
        ("https://models.example@evil.example/adapters/a", False),
        ("https://models.example.evil.example/adapters/a", False),
        ("HTTPS://models.example/adapters/a", False),
        ("http://models.example/adapters/a", False),
        ("s3://bucket/a", False),
        ("https://[", False),
        ("https://\ud800/a", False),
    ],
)
def test_only_what_lies_below_a_prefix_is_allowed(url: str, expected: bool) -> None:
    assert allowed(url, [PREFIX]) is expected
    assert allowed(url, [f"{PREFIX}/"]) is expected
    assert not allowed(url, [])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A native adapter beside what nobody should fetch."""
    adapter = formats.read(copy_adapter("mola", tmp_path / "source"))
    native.write(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"a pickle")
    return tmp_path / "adapter"


@pytest.fixture
def remote(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(URL, paths that were asked for)."""
    with serving(folder) as served:
        yield served


def test_a_url_brings_the_adapter_and_nothing_else(
    remote: tuple[str, list[str]], folder: Path
) -> None:
    url, asked = remote
    with sources(url).fetch(f"{url}/files/adapter") as source:
        assert {path.name for path in source.directory.iterdir()} == {native.CONFIG, native.WEIGHTS}
        assert formats.read(source.directory).digest == formats.read(folder).digest
        kept = source.directory
    assert not kept.exists()
    assert not [path for path in asked if path.endswith(".bin")]


def test_a_url_brings_the_templates_that_are_there(
    remote: tuple[str, list[str]], folder: Path
) -> None:
    url, _ = remote
    (folder / "additional_chat_templates").mkdir()
    tool_use = "additional_chat_templates/tool_use.jinja"
    for name in ("chat_template.jinja", tool_use, "tokenizer_config.json"):
        (folder / name).write_text("{}")
    with sources(url).fetch(f"{url}/files/adapter") as source:
        assert tokenizer_files.read(source.directory).templates == {
            "default": "{}",
            "tool_use": "{}",
        }
        assert (source.directory / "tokenizer_config.json").exists()
    (folder / "chat_template.jinja").write_text("x" * (tokenizer_files.TEMPLATE_BYTES + 1))
    with (
        pytest.raises(LimitError, match=r"chat_template.jinja: found .* at most 262144 bytes"),
        sources(url).fetch(f"{url}/files/adapter"),
    ):
        pass


def publish_x_lora(folder: Path) -> Path:
    """Its experts below, one of them in shards, beside directories that nobody should fetch."""
    shutil.copytree(Case("xlora").path, folder, dirs_exist_ok=True)
    split(folder / "1")
    shutil.copytree(folder / "0", folder / "checkpoint-1")
    (folder / "2" / "adapter_model.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture
def x_lora(folder: Path) -> Path:
    """An X-LoRA in the native adapter's place."""
    for path in folder.iterdir():
        path.unlink()
    return publish_x_lora(folder)


FETCHED = {
    *("adapter_config.json", "adapter_model.safetensors"),
    *(f"{i}/adapter_config.json" for i in range(3)),
    *(f"{i}/adapter_model.safetensors" for i in (0, 2)),
    "1/adapter_model.safetensors.index.json",
}


def test_an_x_lora_comes_with_the_experts_below_it(
    remote: tuple[str, list[str]], x_lora: Path
) -> None:
    url, asked = remote
    with sources(url).fetch(f"{url}/files/adapter") as source:
        fetched = {
            str(path.relative_to(source.directory))
            for path in source.directory.rglob("*")
            if path.is_file()
        }
        assert {name for name in fetched if "-of-" not in name} == FETCHED
        assert len(fetched) == len(FETCHED) + 2
        assert formats.read(source.directory).digest == formats.read(Case("xlora").path).digest
    assert not [path for path in asked if "checkpoint" in path or path.endswith(".bin")]
    size = sum((x_lora / name).stat().st_size for name in fetched)
    for limit, enough in ((size, True), (size - 1, False)):
        with (
            nullcontext() if enough else pytest.raises(LimitError, match="at most"),
            sources(url, limit=limit).fetch(f"{url}/files/adapter"),
        ):
            assert enough


def test_an_x_lora_whose_experts_lie_elsewhere_is_refused(
    remote: tuple[str, list[str]], x_lora: Path
) -> None:
    url, _ = remote
    config = json.loads((x_lora / files.CONFIG).read_text())
    config["adapters"]["1"] = "someone/another-repository"
    (x_lora / files.CONFIG).write_text(json.dumps(config))
    shutil.rmtree(x_lora / "1")
    with (
        sources(url).fetch(f"{url}/files/adapter") as source,
        pytest.raises(ConfigError, match="1, no directory"),
    ):
        formats.read(source.directory)
    for name, error in (("..", UnsupportedError), ("/etc", UnsupportedError)):
        config["adapters"] = {name: name}
        (x_lora / files.CONFIG).write_text(json.dumps(config))
        with sources(url).fetch(f"{url}/files/adapter") as source, pytest.raises(error):
            formats.read(source.directory)
    config["adapters"] = {str(i): str(i) for i in range(MOST_MEMBERS + 1)}
    (x_lora / files.CONFIG).write_text(json.dumps(config))
    with (
        pytest.raises(LimitError, match="129 adapters"),
        sources(url).fetch(f"{url}/files/adapter"),
    ):
        pass


@pytest.fixture
def experts(folder: Path) -> Path:
    """LoRA on fused experts in the native adapter's place; its config does not say who made it."""
    for path in folder.iterdir():
        path.unlink()
    config = {"peft_type": "LORA", "target_parameters": ["mlp.experts.down_proj"]}
    (folder / files.CONFIG).write_text(json.dumps(config))
    (folder / files.SAFETENSORS).write_bytes(b"tensors")
    return folder


@pytest.mark.parametrize("readme", ["made with Unsloth", None])
def test_a_url_brings_the_readme_that_tells_who_made_an_adapter(
    remote: tuple[str, list[str]], experts: Path, readme: str | None
) -> None:
    url, _ = remote
    if readme is not None:
        (experts / README).write_text(readme)
    with sources(url).fetch(f"{url}/files/adapter", "rank_major") as source:
        fetched = {path.name: path.read_bytes() for path in source.directory.iterdir()}
        assert source.lora_b_layout == "rank_major"
    expected = {path.name: path.read_bytes() for path in experts.iterdir()}
    assert fetched == expected


def test_a_readme_is_not_asked_for_where_the_config_says_it(
    remote: tuple[str, list[str]], experts: Path
) -> None:
    url, asked = remote
    config = {"target_parameters": ["mlp.experts.down_proj"], "lora_B_layout": "rank_major"}
    (experts / files.CONFIG).write_text(json.dumps(config))
    (experts / README).write_text("made with Unsloth")
    with sources(url).fetch(f"{url}/files/adapter") as source:
        assert not (source.directory / README).exists()
    assert not [path for path in asked if README in path]


@pytest.mark.slow
def test_a_hub_brings_the_readme_that_tells_who_made_an_adapter(
    remote: tuple[str, list[str]], experts: Path, tmp_path: Path
) -> None:
    (experts / README).write_text("made with Unsloth")
    url, _ = remote
    (line,) = fetch_from_hub(url, tmp_path, [("hf://org/adapter@main", "10000000", "10000000")])
    assert line.startswith("ConfigError adapter_config.json: lora_B_layout: found nothing")


def test_a_url_brings_no_more_bytes_than_an_adapter_may_have(
    remote: tuple[str, list[str]],
) -> None:
    url, _ = remote
    with (
        pytest.raises(LimitError, match="at most 1000 bytes"),
        sources(url, limit=1000).fetch(f"{url}/files/adapter"),
    ):
        pass


def test_a_server_that_does_not_answer_is_a_clear_error(remote: tuple[str, list[str]]) -> None:
    gone = "http://127.0.0.1:9/files"
    with (
        pytest.raises(FetchError, match="ClientConnectorError"),
        Sources(AdapterRoots([]), prefixes=[gone]).fetch(f"{gone}/a"),
    ):
        pass


@pytest.mark.parametrize(
    ("path", "error"),
    [("nothing", AdapterNotFoundError), ("moved", FetchError), ("broken", FetchError)],
)
def test_what_a_server_answers_instead_of_a_file_is_not_taken_for_it(
    remote: tuple[str, list[str]], path: str, error: type[Exception]
) -> None:
    url, _ = remote
    with pytest.raises(error), sources(url).fetch(f"{url}/files/{path}"):
        pass


def test_a_server_that_is_silent_is_given_up(
    remote: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molehill.api.sources.fetch.SILENCE_SECONDS", 0.2)
    url, _ = remote
    with (
        pytest.raises(FetchError, match="Timeout"),
        sources(url).fetch(f"{url}/files/silent"),
    ):
        pass


def test_an_error_tells_no_path_of_this_server(
    remote: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, _ = remote
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(FetchError) as refusal, sources(url).fetch(f"{url}/files/adapter"):
        pass
    expected = f"{url}/files/adapter: FileNotFoundError: No such file or directory"
    assert str(refusal.value) == expected
    inside = ValueError("cannot parse '/x/molehill-fetch-abc/adapter_config.json', sorry")
    assert reason(inside) == "ValueError: cannot parse 'a temporary file', sorry"


def test_sources_that_keep_loads_waiting_hold_up_no_other_load(tmp_path: Path) -> None:
    """There are more of them than asyncio has threads for files and digests."""
    answer = threading.Event()

    @contextmanager
    def silent() -> Iterator[Source]:
        answer.wait(60)
        raise FetchError("silent")
        yield

    async def scenario(w: World) -> None:
        stuck = [
            asyncio.create_task(w.registry.load(f"stuck-{n}", "silent", silent()))
            for n in range(40)
        ]
        await let_tasks_run()
        try:
            assert (await w.load("a", 1)).status == "loaded"
            assert not any(task.done() for task in stuck)
        finally:
            answer.set()
        result = await asyncio.gather(*stuck, return_exceptions=True)
        assert {type(error) for error in result} == {FetchError}

    admission = AdmissionLimits(adapters=100, loads=100)
    asyncio.run(scenario(World(tmp_path, admission=admission)))


@pytest.mark.parametrize("text", ["hf://org/adapter", "https://x.example/a"])
def test_what_was_not_allowed_is_forbidden(text: str) -> None:
    with pytest.raises(ForbiddenSourceError), Sources(AdapterRoots([])).fetch(text):
        pass


@pytest.mark.parametrize("text", ["hf://", "hf://name", "hf://a/b/c", "hf://../x@", "hf://a/b@"])
def test_what_is_no_repository_is_refused(text: str) -> None:
    with pytest.raises(BadPathError), Sources(AdapterRoots([]), hub=True).fetch(text):
        pass


def test_a_repository_as_vllm_names_it_takes_nothing_from_the_roots(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "org" / "adapter").mkdir(parents=True)
    (root / "org" / "outside").symlink_to(tmp_path)
    hub, closed = Sources(AdapterRoots([root]), hub=True), Sources(AdapterRoots([root]))
    for these in (hub, closed):
        with these.fetch_for_vllm("org/adapter") as source:
            assert source.directory == root / "org" / "adapter"
        for text in ("org/outside", "../root2/x", "../secret"):
            with pytest.raises(ForbiddenPathError), these.fetch_for_vllm(text):
                pass
    with pytest.raises(AdapterNotFoundError), closed.fetch_for_vllm("org/nobody"):
        pass
    with pytest.raises(ForbiddenSourceError), closed.fetch_for_vllm("hf://org/nobody"):
        pass


@pytest.mark.slow
def test_what_a_hub_gives_is_pinned_and_bounded(
    remote: tuple[str, list[str]], folder: Path, tmp_path: Path
) -> None:
    """In a process of its own: the hub's client reads its address once, and files are bounded for
    the whole process."""
    url, asked = remote
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    publish_x_lora(tmp_path / X_LORA)
    much, little = "10000000", "1000"
    wanted = [
        ("hf://org/adapter@main", much, much),
        ("hf://org/adapter", little, much),
        ("hf://org/nobody", much, much),
        ("hf://org/sizeless", much, much),
        ("hf://org/silent", much, much),
        ("hf://org/adapter", much, little),
        (f"{url}/files/adapter", much, little),
        ("org/adapter", much, much),
        ("org/nobody", much, much),
        (f"hf://org/{X_LORA}", much, much),
        (f"hf://org/{X_LORA}", "20000", much),
    ]
    result = fetch_from_hub(url, tmp_path, wanted)
    assert result[0] == f"hf://org/adapter@{COMMIT} {formats.read(folder).digest}"
    assert result[1].startswith("LimitError org/adapter")
    assert result[2].startswith("AdapterNotFoundError org/nobody")
    assert result[3].startswith("FetchError org/sizeless: found files without a size")
    assert result[4].startswith("FetchError org/silent: ReadTimeout")
    # The bound has the errors that a full disk and a quota have.
    assert result[5] == "StoreError org/adapter: no room to download it: File too large"
    assert result[6] == f"StoreError {url}/files/adapter: no room to download it: File too large"
    # As vLLM's clients name a repository.
    assert (result[7], result[8]) == (result[0], result[2])
    x_lora = formats.read(Case("xlora").path).digest
    assert result[9] == f"hf://org/{X_LORA}@{COMMIT} {x_lora}"
    assert result[10].startswith("LimitError org/x-lora")
    assert not [line for line in result if "molehill-fetch" in line]
    fetched = {path for path in asked if "/resolve/" in path}
    assert any(path.endswith("/chat_template.jinja") for path in fetched)
    assert all(f"/resolve/{COMMIT}/" in path for path in fetched)
    assert not [path for path in fetched if path.endswith((".bin", "oracle.json"))]
    assert not [path for path in fetched if "/checkpoint-1/" in path]
