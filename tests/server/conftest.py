"""One real server that all end-to-end tests of this folder share."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.api_client import BASE, EXTRA_VOCAB, GOLDEN, KEY, Api, copy_adapter
from support.collector import ENVIRONMENT as TRACED
from support.collector import Collector, collecting
from support.server import TINY, serve


@pytest.fixture(scope="session")
def adapter_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden adapters, in a place where tests may write beside them."""
    root: Path = tmp_path_factory.mktemp("adapters")
    for case in sorted((GOLDEN / "cases").iterdir()):
        if (case / "adapter_config.json").exists():
            copy_adapter(case.name, root / case.name)
    return root


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama with room for longer requests; its positions are rotary, so it is the same."""
    folder: Path = tmp_path_factory.mktemp("model") / "tiny-llama"
    shutil.copytree(GOLDEN / "tiny-llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16384}))
    return folder


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """What the shared server sends its spans to."""
    with collecting() as running:
        yield running


@pytest.fixture(scope="package")
def api(
    model: Path,
    adapter_root: Path,
    collector: Collector,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Api]:
    """One server for all: tiny-llama with an API key, an adapter root, a start adapter and an
    adapters file that wants nothing. It is traced, and logs JSON."""
    folder = tmp_path_factory.mktemp("server")
    store, file = folder / "store", folder / "adapters.yaml"
    file.write_text("[]")
    arguments = [
        *TINY,
        *(
            "--max-model-len",
            "2048",
            "--served-model-name",
            BASE,
            "--api-key",
            KEY,
            "--enable-prompt-tokens-details",
        ),
        *("--adapter-root", str(adapter_root), "--adapter-store", str(store)),
        *("--adapters-file", str(file)),
        *("--adapter", f"started={GOLDEN / 'cases' / 'dynmole-default'}"),
        *("--max-adapter-rank", "64", "--enable-scale-out", "--routing-bytes", "60000"),
        *("--max-upload-bytes", str(1 << 20), "--allow-trainer-control"),
        # Needed where a tool is asked for by name; this one wants no tokens of its own.
        *("--enable-auto-tool-choice", "--tool-call-parser", "pythonic"),
        *("--otlp-traces-endpoint", collector.url, "--logging-config.formatter", "json"),
        *("--extra-vocab", str(EXTRA_VOCAB)),
    ]
    log = folder / "log"
    with serve(model, log, arguments, TRACED, warm=True) as server:
        yield Api(server.url, adapter_root, store, file, log)
        assert server.process.poll() is None, server.tail()


@pytest.fixture
def clean(api: Api) -> Iterator[Api]:
    """The shared server; adapters that the test loads are unloaded afterwards."""
    before = set(api.models())
    yield api
    for name in set(api.models()) - before:
        assert api.unload(name).status_code == 200
