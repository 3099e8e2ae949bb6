"""Where `molehill explain` gets what routers choose: a running server, or Transformers."""

import base64
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from molehill.api.cli.routing_page import ExplainedSite, ExplainedText

if TYPE_CHECKING:
    from torch import Tensor

    from molehill.engine.adapter.model import Adapter
    from molehill.engine.transform.routers import DecidingRouter
    from molehill.kernels.interface import Trace

# The policy that may fall back to all experts, by the name of its method.
SOFT_KIND = "dynmole"
SECONDS = 600


class SourceError(ValueError):
    """A server or a model that cannot be asked."""


def of_server(
    url: str, key: str | None, model: str, adapter: str, text: str, max_tokens: int
) -> ExplainedText:
    """What the kernels of a server chose. Raises SourceError."""
    server = Server(url.rstrip("/"), key)
    info = server.ask(f"/v1/adapters/{urllib.parse.quote(adapter)}")
    listed = info.get("routing")
    if not listed or not listed["sites"]:
        raise SourceError(f"{adapter}: found no router that decides anything, expected a mixture")
    body = {
        "model": adapter,
        "prompt": text,
        "max_tokens": max(1, max_tokens),
        "temperature": 0,
        "echo": True,
        "logprobs": 0,
        "molehill": {"routing": "weights"},
    }
    answer = server.ask("/v1/completions", body)
    choice = answer["choices"][0]
    routing = choice["molehill"]["routing"]
    experts, weights = (
        np.frombuffer(base64.b64decode(routing[name]), kind).reshape(routing["shape"])
        for name, kind in (("experts", "<i2"), ("weights", "<f2"))
    )
    soft = info["kind"] == SOFT_KIND
    return ExplainedText(
        model,
        adapter,
        f"What the kernels of {url} chose, generation {info['generation'][:12]}.",
        tuple(choice["logprobs"]["tokens"]),
        answer["usage"]["prompt_tokens"],
        tuple(ExplainedSite(s["site"], s["head"], s["experts"], soft) for s in listed["sites"]),
        experts.astype(np.int16),
        weights.astype(np.float32),
    )


class Server:
    """A molehill server. key: that it wants, if any."""

    def __init__(self, url: str, key: str | None) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise SourceError(f"--url: found {url!r}, expected http:// or https://")
        self._url = url
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def ask(self, path: str, body: object = None) -> dict[str, Any]:
        """Raises SourceError, with what the server says."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                answer: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            raise SourceError(f"{self._url}{path}: {_reason(error)}") from error
        except (OSError, ValueError) as error:
            raise SourceError(f"{self._url}{path}: {error}") from error
        return answer


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        message: str = json.load(error)["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        message = str(error)
    return message


def of_reference(model: str, path: Path, text: str, max_tokens: int) -> ExplainedText:
    """What the definition chooses, by Transformers in float32, slowly. path: the adapter's
    directory. Raises SourceError, AdapterError."""
    import torch

    from molehill.engine.hf.reference import attach
    from molehill.engine.transform.routers import routers
    from molehill.kernels.interface import Trace

    tokenizer, adapter, base = _load(model, path)
    listed = routers(adapter)
    if not listed:
        raise SourceError(f"{path}: found no router that decides anything, expected a mixture")
    prompt: list[int] = tokenizer(text)["input_ids"]
    if not prompt:
        raise SourceError("text: found no tokens, expected some")
    start = _start(prompt, adapter.invocation_tokens, path)
    ids, traces = torch.tensor([prompt]), dict[str, list[Trace]]()
    with torch.inference_mode():
        if max_tokens > 0:
            with attach(base, adapter, start=start):
                ids = _generate(base, ids, max_tokens, activated=start > 0)
        with attach(base, adapter, traces, start):
            base(ids[:, : max(len(prompt), ids.shape[1] - 1)])
    experts, weights = _choices(listed, traces, start)
    soft = adapter.kind == SOFT_KIND
    return ExplainedText(
        Path(model).name,
        path.name,
        "By the definition, on Transformers in float32.",
        tuple(tokenizer.decode([token]) for token in ids[0].tolist()),
        len(prompt),
        tuple(ExplainedSite(r.site, r.head, r.experts, soft) for r in listed),
        experts,
        weights,
    )


def _load(model: str, path: Path) -> tuple[Any, "Adapter", Any]:
    """The tokenizer, the adapter and the base. Raises SourceError, AdapterError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from molehill.engine import formats
    from molehill.engine.hf.shapes import base_model

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        adapter = formats.read(path, base=base_model(model))
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    except (ImportError, OSError, ValueError) as error:
        raise SourceError(f"{model}: {error}") from error
    return tokenizer, adapter, base


def _start(prompt: list[int], invocation: tuple[int, ...], path: Path) -> int:
    """The position from which on the adapter acts. Raises SourceError."""
    from molehill.engine.adapter.invocation import invocation_offset

    offset = invocation_offset(prompt, invocation) if invocation else 0
    if offset is None:
        raise SourceError(f"text: found no {list(invocation)}, which activate {path}")
    return offset


def _generate(base: Any, ids: "Tensor", max_tokens: int, activated: bool) -> "Tensor":
    """ids `[1, tokens]`, with those of the answer behind them."""
    import torch

    answered: Tensor = base.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        # With a KV cache a step has no positions by which an adapter could be activated.
        use_cache=not activated,
    )
    return answered


def _choices(
    listed: "Sequence[DecidingRouter]", traces: "Mapping[str, list[Trace]]", start: int
) -> tuple[np.ndarray, np.ndarray]:
    """Experts int16 and weights float32 `[tokens, routers, k]`, strongest first: -1 and 0 before
    `start`, and where a router chooses fewer than k."""
    from molehill.engine.vllm.chosen_experts import strongest

    most = max(router.most for router in listed)
    shape = len(traces[listed[0].site][0].weights), len(listed), most
    experts, weights = np.full(shape, -1, np.int16), np.zeros(shape, np.float32)
    for i, router in enumerate(listed):
        decided = traces[router.site][0].weights
        if router.head is not None:
            decided = decided[:, router.head]
        chosen, gates = strongest(decided, router.most)
        experts[start:, i, : router.most] = chosen[start:]
        weights[start:, i, : router.most] = gates[start:]
    return experts, weights
