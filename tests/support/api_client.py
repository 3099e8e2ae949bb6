"""The golden set, and a client of a real server."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import torch
from torch import Tensor

from support.golden import served_path

TESTS = Path(__file__).resolve().parents[1]
GOLDEN = TESTS / "data" / "golden"
BASE = "tiny"
KEY = "a-test-key"
# Room of the shared server for tokens that adapters add.
EXTRA_VOCAB = 3

PATIENCE_SECONDS = 60


def oracle(case: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((GOLDEN / "cases" / case / "oracle.json").read_text())
    return result


def copy_adapter(case: str, target: Path) -> Path:
    """The files of a golden adapter as it is loaded, without its oracle."""
    ignored = shutil.ignore_patterns("oracle.*")
    shutil.copytree(served_path(case), target, ignore=ignored)
    return target


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "adapter_model.bin"
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


@dataclass
class Api:
    """A client of the shared server. root: its adapter root. store: its adapter store.
    adapters_file: what it follows, if it does. log: its output."""

    url: str
    root: Path
    store: Path
    adapters_file: Path | None = None
    log: Path | None = None

    def __post_init__(self) -> None:
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)
        headers = {"Authorization": f"Bearer {KEY}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def load(self, name: str, path: str, **more: Any) -> httpx.Response:
        body = {"lora_name": name, "lora_path": path, **more}
        return self.http.post("/v1/load_lora_adapter", json=body)

    def unload(self, name: str) -> httpx.Response:
        return self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})

    def error(self, response: httpx.Response) -> tuple[int, str, str]:
        """Status, type and message, after a check of the OpenAI shape."""
        error = response.json()["error"]
        assert error["code"] == response.status_code
        return response.status_code, error["type"], error["message"]

    def complete(
        self, model: str, prompt: list[int] | list[list[int]], tokens: int = 12, **more: Any
    ) -> Any:
        return self.openai.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
            **more,
        )

    def greedy(self, model: str, prompt: list[int], tokens: int = 12) -> list[int]:
        token_ids: list[int] = self.complete(model, prompt, tokens).choices[0].token_ids
        return token_ids

    def models(self) -> dict[str, Any]:
        return {model.id: model for model in self.openai.models.list()}

    def metrics(self) -> dict[str, float]:
        """molehill's samples by `name{labels}`."""
        lines = self.http.get("/metrics").text.splitlines()
        samples = [line.rsplit(" ", 1) for line in lines if line.startswith("molehill_")]
        return {name: float(value) for name, value in samples}

    def of_adapter(self, name: str, metric: str) -> float:
        return self.metrics()[f'molehill_{metric}{{adapter="{name}"}}']


def eventually(condition: Any, pause: float = 0.05) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(pause)
    return False


def resident_memory(root: psutil.Process | None = None) -> int:
    """Bytes of a process and all below it; without one, of all that these tests have started."""
    root = root or psutil.Process()
    total = 0
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


class Running:
    """A streamed request, from its first chunk on. The server does not wait for its reader."""

    def __init__(self, api: Api, model: str, prompt: list[int], tokens: int) -> None:
        self._stream = api.complete(model, prompt, tokens, stream=True)
        self._chunks: Iterator[Any] = iter(self._stream)
        self._first = next(self._chunks)

    def rest(self) -> list[int]:
        """All of its tokens, once it has ended."""
        chunks = [self._first, *self._chunks]
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        return [token for choice in choices for token in choice.token_ids or ()]

    def disconnect(self) -> None:
        self._stream.close()
