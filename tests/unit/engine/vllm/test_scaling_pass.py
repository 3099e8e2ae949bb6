"""Two passes in one step: what runs, in which context, and what comes of an error."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.config import CompilationMode
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from molehill.engine.vllm import scaling_pass
from molehill.engine.vllm.scaling_pass import ScalingPass
from molehill.kernels.classified_linears import ClassifiedLinears
from molehill.kernels.classifier import Classifier, ClassifierPiece, ClassifierPieces
from molehill.kernels.interface import UNSERVED, LinearShape, Run
from molehill.kernels.mixture import Experts

HIDDEN, HANDLE = 6, 0
NAME, SECOND = "model.layers.0.attn", "scaling_pass.1.attn"
XLORA, LORA = 3, 5


class Model(nn.Module):
    """Hidden states are its input plus what experts add; keeps what every call found."""

    def __init__(self, linears: ClassifiedLinears) -> None:
        super().__init__()
        self.linears = linears
        self.found: list[tuple[Any, Any, Any]] = []

    def forward(self, x: Tensor) -> Tensor:
        context = get_forward_context()
        metadata: Any = context.attn_metadata
        slots: Any = context.slot_mapping
        self.found.append((context.no_compile_layers[NAME], metadata[NAME], slots[NAME]))
        y = x.clone()
        self.linears.add(y, x, HANDLE)
        return y


@pytest.fixture
def linears() -> ClassifiedLinears:
    result = ClassifiedLinears(HIDDEN)
    result.register(HANDLE, LinearShape("linear", HIDDEN, HIDDEN))
    layers = ((torch.eye(2, HIDDEN), torch.zeros(2)),)
    classifier = Classifier(layers, 2, 1, False)
    experts = Experts(torch.ones(2, HIDDEN), torch.ones(HIDDEN, 2), (1, 1))
    piece = ClassifierPiece("layers.0.linear", 0, experts, 0)
    result.store(XLORA, ClassifierPieces(classifier, {HANDLE: [piece]}))
    return result


@pytest.fixture
def model(linears: ClassifiedLinears) -> Model:
    return Model(linears)


@pytest.fixture
def announced() -> list[Any]:
    return []


@pytest.fixture
def passes(model: Model, linears: ClassifiedLinears, announced: list[Any]) -> ScalingPass:
    caches = {NAME: SECOND}
    return ScalingPass(
        model, caches, linears, announced.append, lambda: announced.append("the base")
    )


def run(model: Model, x: Tensor) -> Tensor:
    context = ForwardContext(
        no_compile_layers={NAME: "first", SECOND: "second"},
        attn_metadata={NAME: 1, SECOND: 2},  # type: ignore[dict-item]
        slot_mapping={NAME: 10, SECOND: 20},  # type: ignore[dict-item]
    )
    with override_forward_context(context):
        y: Tensor = model(x)
    return y


def test_rows_with_a_classifier_run_twice(
    model: Model, passes: ScalingPass, announced: list[Any]
) -> None:
    x = torch.randn(5, HIDDEN)
    runs = [Run(LORA, 0, 2), Run(XLORA, 2, 4)]
    passes.begin_step(runs)
    assert announced == []
    y = run(model, x)
    assert announced == ["the base", runs]
    assert model.found == [("second", 2, 20), ("first", 1, 10)]
    # Both experts are the same, and their weights sum to 1.
    torch.testing.assert_close(y[2:4], x[2:4] + x[2:4].sum(1, keepdim=True))
    assert torch.equal(y[[0, 1, 4]], x[[0, 1, 4]])


def test_other_steps_run_once(model: Model, passes: ScalingPass, announced: list[Any]) -> None:
    x = torch.randn(5, HIDDEN)
    passes.begin_step([Run(XLORA, 0, 5)])
    # The step that waited was never run; the next one is another.
    runs = [Run(LORA, 0, 5)]
    passes.begin_step(runs)
    assert announced == [runs]
    assert torch.equal(run(model, x), x)
    assert model.found == [("first", 1, 10)]


def test_an_error_in_the_first_pass_zeroes_rows_and_not_the_engine(
    model: Model,
    passes: ScalingPass,
    announced: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(hidden: Tensor) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.linears, "classify", fail)
    monkeypatch.setattr(scaling_pass.logger, "propagate", True)
    passes.begin_step([Run(LORA, 0, 2), Run(XLORA, 2, 4)])
    with caplog.at_level(logging.ERROR, logger="vllm.molehill"):
        run(model, torch.randn(5, HIDDEN))
    assert announced[-1] == [Run(LORA, 0, 2), Run(UNSERVED, 2, 4)]
    assert "X-LoRA adapters are zeroed" in caplog.text


class Layer(AttentionLayerBase):
    """Some layer with a cache that is none by token."""

    def get_attn_backend(self) -> Any:
        return None

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return None


def config(**changes: Any) -> Any:
    """What is read of vLLM's config."""
    changed = {"tensor": 1, "pipeline": 1, "data": 1, "drafts": None, "eager": True} | changes
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            tensor_parallel_size=changed["tensor"],
            pipeline_parallel_size=changed["pipeline"],
            data_parallel_size=changed["data"],
        ),
        speculative_config=changed["drafts"],
        model_config=SimpleNamespace(
            enforce_eager=changed["eager"], is_multimodal_model=changed.get("images", False)
        ),
        compilation_config=SimpleNamespace(
            mode=CompilationMode.NONE, static_forward_context=changed.get("layers", {})
        ),
        additional_config={"molehill": {"merged_base": changed.get("merged")}},
    )


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({"eager": False}, "cuda", "CUDA graphs"),
        ({"tensor": 2}, "cpu", "tensor parallelism"),
        ({"pipeline": 2}, "cpu", "pipeline parallelism"),
        ({"data": 2}, "cpu", "data parallelism"),
        ({"drafts": SimpleNamespace(method="eagle")}, "cpu", "a draft model"),
        ({"images": True}, "cpu", "a multimodal base"),
        ({"merged": "there"}, "cpu", "--merge-into-base"),
        ({"layers": {"model.layers.0.mixer": Layer()}}, "cpu", "layers.0.mixer, a Layer"),
    ],
)
def test_an_engine_that_cannot_run_two_passes_says_why(
    changes: dict[str, Any], device: str, reason: str
) -> None:
    assert reason in (scaling_pass.refusal(config(**changes), nn.Linear(1, 1), device) or "")


def test_others_can() -> None:
    drafts = SimpleNamespace(method="ngram")
    able = (config(), "cuda"), (config(eager=False, drafts=drafts), "cpu")
    for settings, device in able:
        assert scaling_pass.refusal(settings, nn.Linear(1, 1), device) is None
