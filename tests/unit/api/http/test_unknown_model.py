"""Whoever finds that a model is not served, the client is told alike."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from support.world import World
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList
from vllm.exceptions import VLLMNotFoundError

from molehill.api.adapters.errors import UnknownModelError
from molehill.api.http import unknown_model, vllm_routes
from molehill.api.vllm.served_models import ServedModels


class VllmModels:
    """What ServedModels asks of vLLM's OpenAIServingModels, of one base model."""

    def __init__(self) -> None:
        self.base_model_paths = [BaseModelPath("base", "/models/base")]
        self.registry = self

    async def show_available_models(self) -> ModelList:
        return ModelList(data=[ModelCard(id="base", root="/models/base")])

    def is_base_model(self, name: str) -> bool:
        return name == "base"


@pytest.mark.parametrize("finder", ["our route", "ours", "vLLM's"])
def test_an_unknown_model_is_answered_alike(tmp_path: Path, finder: str) -> None:
    app = FastAPI()
    app.include_router(vllm_routes.router)
    for kind in unknown_model.RAISED:
        app.add_exception_handler(kind, unknown_model.answer_unknown_model)

    @app.get("/ours")
    def ours() -> None:
        raise UnknownModelError("nobody")

    @app.get("/vllm")
    def vllm() -> None:
        # As its routes that check the name themselves.
        raise VLLMNotFoundError("The model `nobody` does not exist.")

    served = ServedModels(VllmModels(), World(tmp_path).registry)
    app.state.molehill = SimpleNamespace(models=served, names=served.names)
    client = TestClient(app)
    paths = {"our route": "/v1/models/nobody", "ours": "/ours", "vLLM's": "/vllm"}
    answer = client.get(paths[finder])
    message = "The model `nobody` does not exist. Valid aliases: base."
    error = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
    assert (answer.status_code, answer.json()) == (404, {"error": error})
    assert client.get("/v1/models/base").json()["id"] == "base"
