"""Where adapters come from: a directory below a root, a Hugging Face repository, a URL.

Only what the operator allowed is fetched, only the files of an adapter, no pickles, and never more
bytes than an adapter may have.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from molehill.api.errors import BadPathError, FetchError, ForbiddenSourceError
from molehill.api.intake import Fetch
from molehill.api.options import URL_SCHEMES
from molehill.api.paths import AdapterRoots, Source
from molehill.engine.errors import AdapterNotFoundError, LimitError
from molehill.engine.formats import files, native

HUB = "hf://"

# One layout or the other; (config, tensors).
LAYOUTS = ((native.CONFIG, native.WEIGHTS), (files.CONFIG, files.SAFETENSORS))

REPOSITORY = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
CHUNK = 1 << 20


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

    def fetch(self, text: str) -> Fetch:
        """Entering it checks, fetches and names the directory; leaving it deletes what was fetched.

        Raises BadPathError, ForbiddenPathError, ForbiddenSourceError, FetchError,
        AdapterNotFoundError, LimitError.
        """
        if text.startswith(HUB):
            return self._from_hub(text)
        if "://" in text:
            return self._from_url(text)
        return self._from_root(text)

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
        with scratch() as directory:
            commit = download_from_hub(match["id"], match["revision"], directory, self.limit)
            yield Source(directory, f"{HUB}{match['id']}@{commit}")

    @contextmanager
    def _from_url(self, text: str) -> Iterator[Source]:
        if not allowed(text, self.prefixes):
            raise ForbiddenSourceError(
                f"source: found {text[:200]!a}, expected a URL below an --allow-url-prefix"
            )
        with scratch() as directory:
            download_from_url(text, directory, self.limit)
            yield Source(directory, text)


@contextmanager
def local(source: Source) -> Iterator[Source]:
    """A source that is here already."""
    yield source


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="molehill-fetch-") as folder:
        yield Path(folder).resolve()


def allowed(url: str, prefixes: Sequence[str]) -> bool:
    """Whether a URL lies below a prefix, however it is written. No `..`, no escapes, no query, no
    user: what is compared is what is asked for."""
    if re.fullmatch(r"[a-z0-9]+://[\w.:-]+(/[\w.@+=-]+)*/?", url, re.ASCII) is None:
        return False
    parts = urlsplit(url)
    steps = [step for step in parts.path.split("/") if set(step) == {"."}]
    if parts.scheme not in URL_SCHEMES or steps:
        return False
    return any(
        url.startswith(prefix if prefix.endswith("/") else f"{prefix}/") for prefix in prefixes
    )


def download_from_hub(repository: str, revision: str | None, target: Path, limit: int) -> str:
    """Fetches an adapter's files at one commit, and returns the commit."""
    try:
        info = huggingface_hub.HfApi().model_info(
            repository, revision=revision, files_metadata=True
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        chosen = layout(repository, sizes.__contains__)
        check_size(repository, sum(sizes[name] for name in chosen), limit)
        for name in chosen:
            huggingface_hub.hf_hub_download(repository, name, revision=info.sha, local_dir=target)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        found = type(error).__name__.removesuffix("Error")
        raise AdapterNotFoundError(repository, found, "a repository and revision") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        if isinstance(error, LimitError | AdapterNotFoundError):
            raise
        raise FetchError(f"{repository}: {first_line(error)}") from error
    return str(info.sha)


def download_from_url(url: str, target: Path, limit: int) -> None:
    """Fetches an adapter's files from right below `url`."""
    base = url.rstrip("/")
    try:
        # A redirect could lead anywhere.
        options = {"allow_redirects": False} if base.startswith("http") else {}
        filesystem = fsspec.filesystem(urlsplit(base).scheme, skip_instance_cache=True, **options)
        chosen = layout(base, lambda name: bool(filesystem.exists(f"{base}/{name}")))
        left = limit
        for name in chosen:
            left -= copy(filesystem, f"{base}/{name}", target / name, left)
    except ImportError as error:
        raise FetchError(f"{base}: {first_line(error)}") from error
    except Exception as error:
        if isinstance(error, LimitError | AdapterNotFoundError):
            raise
        raise FetchError(f"{base}: {type(error).__name__}: {first_line(error)}") from error


def copy(filesystem: Any, url: str, target: Path, limit: int) -> int:
    """Bytes copied. What a server says of a file's size is not relied on."""
    copied = 0
    with filesystem.open(url, "rb", block_size=0) as read, target.open("wb") as written:
        while chunk := read.read(CHUNK):
            copied += len(chunk)
            check_size(url, copied, limit)
            written.write(chunk)
    return copied


def layout(where: str, exists: Callable[[str], bool]) -> tuple[str, str]:
    """The two files to fetch. Raises AdapterNotFoundError."""
    for names in LAYOUTS:
        if all(map(exists, names)):
            return names
    expected = " or ".join(" with ".join(names) for names in LAYOUTS)
    raise AdapterNotFoundError(where, "no such files", expected)


def check_size(where: str, found: int, limit: int) -> None:
    if found > limit:
        raise LimitError(where, f"{found} bytes or more", f"at most {limit} bytes")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
