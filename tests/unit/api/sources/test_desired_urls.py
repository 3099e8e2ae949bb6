"""Two servers that follow one adapters file behind a URL."""

import asyncio
import http.server
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.desired import Followed
from support.http_servers import running
from support.world import adapter

from molehill.api.sources import operator_file

# The folder of adapters, below what the URL serves.
ROOT = "root"


@contextmanager
def http_files(folder: Path) -> Iterator[str]:
    """The URL of a server of a folder's files."""

    class Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, directory=str(folder), **more)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    with running(server):
        yield f"http://127.0.0.1:{server.server_port}"


@pytest.mark.slow
def test_two_servers_on_one_url_converge_to_the_same_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_file, "URL_SECONDS", 0.0)
    shared = Followed(tmp_path / "shared")
    entry = shared.entry
    with http_files(shared.folder) as url:

        def replica(name: str) -> Followed:
            return Followed(tmp_path / name, f"{url}/adapters.yaml", prefixes=(url,))

        async def scenario(first: Followed) -> None:
            second = replica("second")
            shared.write(
                entry("a", 1, source=f"{url}/{ROOT}/source-1"),
                entry("b", 2, source=f"{url}/{ROOT}/nowhere"),
            )
            for seeds in ([1], [1, 3]):
                digests = {adapter(seed).digest for seed in seeds}
                for follower in (first, second):
                    await follower.until(
                        lambda f=follower, wanted=digests: set(f.serves().values()) == wanted
                    )
                assert first.serves() == second.serves()
                shared.entry("c", 3)
                shared.write(
                    entry("a", 1, source=f"{url}/{ROOT}/source-1"),
                    entry("c", 3, source=f"{url}/{ROOT}/source-3", digest=adapter(3).digest),
                )
            shared.path.unlink()
            await first.until(lambda: first.file.error is not None)
            assert url not in str(first.file.error)
            assert set(first.serves()) == {"a", "c"}

        async def play() -> None:
            await asyncio.wait_for(scenario(replica("first")), 20)

        asyncio.run(play())
