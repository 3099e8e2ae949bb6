"""Adapters and the adapters file in an S3 bucket: moto's server, asked through s3fs."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.desired import Followed
from support.world import adapter

from molehill.api.sources import operator_file
from molehill.engine.formats import native

moto_server = pytest.importorskip(
    "moto.server", reason="moto is not installed", exc_type=ImportError
)
s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket, where the server's own environment says that S3 is."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("adapters")
    yield "s3://adapters"
    server.stop()


@pytest.mark.slow
def test_two_servers_on_one_bucket_converge_to_the_same_digests(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_file, "URL_SECONDS", 0.2)
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)

    def upload(seed: int) -> None:
        native.write(adapter(seed), tmp_path / f"s{seed}")
        for path in (tmp_path / f"s{seed}").iterdir():
            filesystem.pipe_file(f"{bucket}/s{seed}/{path.name}", path.read_bytes())

    def write(*entries: dict[str, str]) -> None:
        filesystem.pipe_file(f"{bucket}/adapters.json", json.dumps(entries).encode())

    async def scenario() -> None:
        replicas = [
            Followed(tmp_path / name, f"{bucket}/adapters.json", (bucket,)) for name in "ab"
        ]
        for seed in (1, 2):
            entry = {"name": "x", "source": f"{bucket}/s{seed}", "digest": adapter(seed).digest}
            await asyncio.to_thread(upload, seed)
            await asyncio.to_thread(write, entry, {"name": "y", "source": "s3://other/s1"})
            for replica in replicas:
                await replica.until(lambda r=replica: r.states() == EXPECTED)
                assert replica.serves() == {"x": adapter(seed).digest}
                assert replica.file.ready

    asyncio.run(asyncio.wait_for(scenario(), 60))


EXPECTED = {"x": "converged", "y": "failed"}
