"""Where adapters come from: a directory below a root, a Hugging Face repository, a URL.

Only what the operator allowed is fetched, only the files of an adapter, no pickles, and never more
bytes than an adapter may have. An index names files beside it, so many and no more
(`molehill.engine.formats.io.shards`); an adapter made of others (X-LoRA) names directories below. A
server that sends nothing for SILENCE_SECONDS is given up.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import fsspec
import huggingface_hub
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from molehill.api.adapters.errors import (
    BadPathError,
    FetchError,
    ForbiddenSourceError,
    RequestError,
    StoreError,
)
from molehill.api.adapters.ingest import NO_ROOM, Fetch, no_memory
from molehill.api.adapters.source import Source
from molehill.api.sources.roots import AdapterRoots
from molehill.api.sources.uploads import UPLOAD
from molehill.api.sources.urls import allowed
from molehill.engine.adapter.base_model import Limits
from molehill.engine.adapter.errors import AdapterError, AdapterNotFoundError, LimitError
from molehill.engine.adapter.layout import Layout
from molehill.engine.formats.io.files import read_config
from molehill.engine.formats.io.shards import INDEX, parse
from molehill.engine.formats.io.tokenizer_files import SMALL_FILES
from molehill.engine.formats.readers.expert_layout import README, README_BYTES, needs_readme
from molehill.engine.formats.registry import members, safetensors_files, sharded_files
from molehill.engine.system.out_of_memory import is_out_of_memory

HUB = "hf://"

OWNER_AND_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
REPOSITORY = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
CHUNK = 1 << 20

# Until a server must have taken a connection, and between two pieces of what it sends.
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 30.0

SCRATCH = "molehill-fetch-"

# Directories below that one adapter may name.
MOST_MEMBERS = Limits().experts


@dataclass(frozen=True)
class Sources:
    """What clients may load from. prefixes: of URLs. limit: bytes of one adapter's files.

    The text of a source says which kind it is: `hf://organisation/name[@revision]`, a URL, or else
    a path.
    """

    roots: AdapterRoots
    hub: bool = False
    prefixes: Sequence[str] = ()
    limit: int = 8 << 30

    def fetch(
        self,
        text: str,
        lora_b_layout: Layout | None = None,
        base_is_residual: bool = False,
        non_granular_after: int | None = None,
    ) -> Fetch:
        """Entering it checks, fetches and names the directory; leaving it deletes what was fetched.

        lora_b_layout, base_is_residual, non_granular_after: how it is to be read, see Source.
        Raises BadPathError, ForbiddenPathError, ForbiddenSourceError, FetchError,
        AdapterNotFoundError, LimitError, ConfigError.
        """
        if text.startswith(UPLOAD):
            raise BadPathError(
                f"source: found {text[:200]!a}, which was sent; send its files again"
            )
        if text.startswith(HUB):
            fetch = self._from_hub(text)
        else:
            fetch = self._from_url(text) if "://" in text else self._from_root(text)
        if (lora_b_layout, base_is_residual, non_granular_after) == (None, False, None):
            return fetch
        return read_as(fetch, lora_b_layout, base_is_residual, non_granular_after)

    def fetch_for_vllm(self, text: str) -> Fetch:
        """As `fetch`, of a text as vLLM's clients write it: what reads as OWNER/NAME and is no
        directory below a root is a repository, where the hub is allowed."""
        if self.hub and OWNER_AND_NAME.fullmatch(text):
            return self._from_root_or_hub(text)
        return self.fetch(text)

    @contextmanager
    def _from_root_or_hub(self, text: str) -> Iterator[Source]:
        there = self.roots.has(text)
        with self._from_root(text) if there else self._from_hub(f"{HUB}{text}") as source:
            yield source

    @contextmanager
    def _from_root(self, text: str) -> Iterator[Source]:
        yield self.roots.resolve(text)

    @contextmanager
    def _from_hub(self, text: str) -> Iterator[Source]:
        if not self.hub:
            raise ForbiddenSourceError("source: this server was started without --allow-hub")
        match = REPOSITORY.fullmatch(text.removeprefix(HUB))
        if match is None:
            raise BadPathError(f"source: found {text[:200]!a}, expected {HUB}OWNER/NAME[@REVISION]")
        repository, revision = match["id"], match["revision"]
        with ExitStack() as stack:
            with reporting(repository):
                directory = stack.enter_context(scratch())
                commit = download_from_hub(repository, revision, directory, self.limit)
            yield Source(directory, f"{HUB}{repository}@{commit}")

    @contextmanager
    def _from_url(self, text: str) -> Iterator[Source]:
        if not allowed(text, self.prefixes):
            raise ForbiddenSourceError(
                f"source: found {text[:200]!a}, expected a URL below an --allow-url-prefix"
            )
        with ExitStack() as stack:
            with reporting(text):
                directory = stack.enter_context(scratch())
                download_from_url(text, directory, self.limit)
            yield Source(directory, text)


@contextmanager
def read_as(
    fetch: Fetch,
    lora_b_layout: Layout | None,
    base_is_residual: bool,
    non_granular_after: int | None,
) -> Iterator[Source]:
    """What `fetch` brings, to be read as somebody says."""
    with fetch as source:
        yield replace(
            source,
            lora_b_layout=lora_b_layout,
            base_is_residual=base_is_residual,
            non_granular_after=non_granular_after,
        )


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=SCRATCH, ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()


@contextmanager
def reporting(where: str) -> Iterator[None]:
    """Whatever stops a download, as a refusal: AdapterError, StoreError where the disk is full,
    OutOfMemoryError, else FetchError. A client gets to know no path of this server."""
    try:
        yield
    except (AdapterError, RequestError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise no_memory(where) from error
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise StoreError(f"{where}: no room to download it: {error.strerror}") from error
        raise FetchError(f"{where}: {reason(error)}") from error


def reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{type(error).__name__}: {error.strerror}"
    line = str(error).strip().partition("\n")[0]
    line = re.sub(rf"[^\s'\"]*{SCRATCH}[^\s'\"]*", "a temporary file", line)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def download_from_hub(repository: str, revision: str | None, target: Path, limit: int) -> str:
    """Fetches an adapter's files at one commit, and returns the commit."""
    try:
        info = huggingface_hub.HfApi().model_info(
            repository, revision=revision, files_metadata=True, timeout=SILENCE_SECONDS
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        found = type(error).__name__.removesuffix("Error")
        raise AdapterNotFoundError(repository, found, "a repository and revision") from error
    sizes = {file.rfilename: file.size for file in info.siblings or ()}

    def download(name: str) -> None:
        huggingface_hub.hf_hub_download(
            repository,
            name,
            revision=info.sha,
            local_dir=target,
            etag_timeout=SILENCE_SECONDS,
        )

    def download_adapter(folder: str, limit: int) -> int:
        """In `folder`, empty or with a slash; the bytes that are left."""
        chosen = layout(f"{repository}/{folder}".rstrip("/"), lambda name: folder + name in sizes)
        left = limit - size_of(repository, [folder + name for name in chosen], sizes, limit)
        for name in chosen:
            download(folder + name)
        shards = [folder + name for name in named_by_index(target / folder, chosen[1])]
        for name in shards:
            if name not in sizes:
                raise no_shard(repository, name)
        left -= size_of(repository, shards, sizes, left)
        for name in shards:
            download(name)
        return left

    left = download_adapter("", limit)
    for places in members_of(target):
        there = [place for place in places if any(name.startswith(f"{place}/") for name in sizes)]
        if there:
            left = download_adapter(f"{there[0]}/", left)
    for name, bound in SMALL_FILES.items():
        if name in sizes:
            check_size(f"{repository}: {name}", sizes[name] or 0, bound)
            download(name)
    readme = sizes.get(README)
    if readme is not None and readme <= README_BYTES and needs_readme(target):
        download(README)
    return str(info.sha)


def size_of(
    repository: str, names: Sequence[str], sizes: Mapping[str, int | None], limit: int
) -> int:
    """Bytes of these files. Raises FetchError, LimitError."""
    known = [size for name in names if (size := sizes[name]) is not None]
    if len(known) < len(names):
        raise FetchError(f"{repository}: found files without a size, expected one for each")
    check_size(repository, sum(known), limit)
    return sum(known)


def named_by_index(directory: Path, weights: str) -> list[str]:
    """The files beside an index that has been fetched; none where `weights` holds the tensors.
    Raises ConfigError, LimitError, UnsupportedError for a name that leads anywhere else."""
    return parse(read_config(directory, weights)).files if weights == INDEX else []


def members_of(directory: Path) -> list[Sequence[str]]:
    """Of an adapter whose config has been fetched, the places of those below. Raises ConfigError,
    LimitError."""
    found = members(directory)
    if len(found) > MOST_MEMBERS:
        raise LimitError("adapters", f"{len(found)} adapters", f"at most {MOST_MEMBERS}")
    return found


def no_shard(where: str, name: str) -> AdapterNotFoundError:
    return AdapterNotFoundError(f"{where}: {name}", "no such file", f"one, as {INDEX} names it")


def download_from_url(url: str, target: Path, limit: int) -> None:
    """Fetches an adapter's files from right below `url`."""
    base = url.rstrip("/")
    scheme = urlsplit(base).scheme
    filesystem = fsspec.filesystem(scheme, skip_instance_cache=True, **filesystem_options(scheme))
    left = copy_adapter(filesystem, base, target, limit)
    for places in members_of(target):
        for place in places:
            try:
                left = copy_adapter(filesystem, f"{base}/{place}", target / place, left)
            except (AdapterNotFoundError, PermissionError):
                continue
            break
    for name, bound in SMALL_FILES.items():
        copy_if_there(filesystem, f"{base}/{name}", target / name, bound)
    if needs_readme(target):
        copy_readme(filesystem, base, target)


def copy_adapter(filesystem: Any, base: str, target: Path, limit: int) -> int:
    """The files of one adapter from right below `base`; the bytes that are left. Raises
    AdapterNotFoundError, LimitError."""
    for names in (*safetensors_files(), *sharded_files()):
        left = limit
        try:
            for name in names:
                left -= copy(filesystem, f"{base}/{name}", target / name, left)
            return copy_shards(filesystem, base, target, names[1], left)
        except FileNotFoundError as error:
            check_missing(error)
    raise no_files(base)


def copy_shards(filesystem: Any, base: str, target: Path, weights: str, limit: int) -> int:
    """The files that an index names, if `weights` is one; the bytes that are left. Raises
    AdapterNotFoundError."""
    for name in named_by_index(target, weights):
        try:
            limit -= copy(filesystem, f"{base}/{name}", target / name, limit)
        except FileNotFoundError as error:
            if getattr(error.__cause__, "status", HTTPStatus.NOT_FOUND) != HTTPStatus.NOT_FOUND:
                raise
            raise no_shard(base, name) from None
    return limit


def check_missing(error: FileNotFoundError) -> None:
    """Raises its cause where that is another: over HTTP fsspec says so of whatever is not the file,
    and of no answer at all."""
    cause = error.__cause__
    if cause is not None and getattr(cause, "status", None) != HTTPStatus.NOT_FOUND:
        raise cause from None


def copy_if_there(filesystem: Any, url: str, target: Path, limit: int) -> None:
    """Stores that list nothing say that it is forbidden where it is missing. Raises LimitError."""
    try:
        copy(filesystem, url, target, limit)
    except PermissionError:
        return
    except FileNotFoundError as error:
        check_missing(error)


def copy_readme(filesystem: Any, base: str, target: Path) -> None:
    """If there is one; stores that list nothing say that it is forbidden where it is missing."""
    try:
        copy(filesystem, f"{base}/{README}", target / README, README_BYTES)
    except (FileNotFoundError, PermissionError, LimitError):
        return


def filesystem_options(scheme: str) -> dict[str, Any]:
    if scheme == "s3":
        timeouts = {"connect_timeout": CONNECT_SECONDS, "read_timeout": SILENCE_SECONDS}
        return {"config_kwargs": timeouts}
    timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
    if scheme == "gs":
        return {"requests_timeout": timeout}
    client = {"timeout": timeout, "raise_for_status": refuse_redirect}
    return {"client_kwargs": client, "allow_redirects": False}


async def refuse_redirect(response: aiohttp.ClientResponse) -> None:
    """It could lead anywhere."""
    if 300 <= response.status < 400:
        raise FetchError(f"{response.url}: found a redirect, expected the file itself")


def copy(filesystem: Any, url: str, target: Path, limit: int) -> int:
    """Bytes copied. What a server says of a file's size is not relied on."""
    copied = 0
    with filesystem.open(url, "rb", block_size=0) as read:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as written:
            while chunk := read.read(CHUNK):
                copied += len(chunk)
                check_size(url, copied, limit)
                written.write(chunk)
    return copied


def layout(where: str, exists: Callable[[str], bool]) -> tuple[str, str]:
    """The two files to fetch, of which the second may be an index of others. Raises
    AdapterNotFoundError."""
    for names in (*safetensors_files(), *sharded_files()):
        if all(map(exists, names)):
            return names
    raise no_files(where)


def no_files(where: str) -> AdapterNotFoundError:
    every = (*safetensors_files(), *sharded_files())
    expected = " or ".join(" with ".join(names) for names in every)
    return AdapterNotFoundError(where, "no such files", expected)


def check_size(where: str, num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise LimitError(where, f"{num_bytes} bytes or more", f"at most {limit} bytes")
