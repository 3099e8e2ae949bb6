"""How a mix is talked to that a request asks for, beside a registry."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.world import World

from molehill.api.adapters.chat import AdapterChat
from molehill.api.vllm.adapter_chats import render_as_adapters_do
from molehill.api.vllm.lora_requests import ServedRequests
from molehill.api.vllm.request_scope import RequestScope, request_scope
from molehill.engine.formats.io.tokenizer_files import DEFAULT


class Renderer:
    """As vLLM's has it: what is given as the default is what it renders by."""

    async def preprocess_chat(
        self,
        request: Any,
        messages: Any,
        default_template: str,
        default_template_kwargs: Any,
        tool_dicts: Any = None,
    ) -> str:
        return default_template


@pytest.mark.parametrize(
    ("weights", "template"), [({"a": 0.5, "b": 0.5}, "base's"), ({"a": 1.0, "b": 0.0}, "a's")]
)
@pytest.mark.parametrize("model", ["a", "b", "base", None])
def test_a_mix_has_one_template_whatever_its_request_names(
    tmp_path: Path, weights: dict[str, float], template: str, model: str | None
) -> None:
    """The base's, or where it is one adapter that one's."""

    async def scenario() -> None:
        names = iter("ab")
        w = World(tmp_path, read_chat=lambda _: AdapterChat({DEFAULT: f"{next(names)}'s"}))
        renderer: Any = Renderer()
        served = ServedRequests()
        render_as_adapters_do(renderer, SimpleNamespace(lora_requests=served), w.registry)
        for seed, name in enumerate("ab"):
            await w.load(name, seed + 1)
        served.update(w.served)
        request = RequestScope()
        lease = await w.registry.mixes.lease(weights, request.request)
        request.run_on(lease, {*weights, "base", None})
        token = request_scope.set(request)
        asked = SimpleNamespace(model=model)
        assert await renderer.preprocess_chat(asked, [], "base's", None) == template
        request_scope.reset(token)

    asyncio.run(asyncio.wait_for(scenario(), 20))
