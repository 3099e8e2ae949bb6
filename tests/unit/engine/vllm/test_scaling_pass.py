"""Two passes in one step: what runs, in which context, and what comes of an error."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.config import CompilationMode
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from molehill.engine.vllm import scaling_pass
from molehill.engine.vllm.non_granular_rows import NonGranularRows
from molehill.engine.vllm.scaling_pass import ScalingPass
from molehill.kernels.classified_linears import ClassifiedLinears
from molehill.kernels.classifier import Classifier, ClassifierPiece, ClassifierPieces
from molehill.kernels.interface import UNSERVED, LinearShape, Run
from molehill.kernels.mixture import Experts

HIDDEN, HANDLE = 6, 0
NAME, SECOND = "model.layers.0.attn", "scaling_pass.1.attn"
XLORA, LORA, KEPT = 3, 5, 7


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
    # Whose experts do not cancel out, and that keeps what the first token of an answer gets.
    later = replace(classifier, non_granular_after=1)
    unlike = Experts(torch.ones(2, HIDDEN), torch.eye(2, HIDDEN).T.contiguous(), (1, 1))
    pieces = {HANDLE: [ClassifierPiece("layers.0.linear", 0, unlike, 0)]}
    result.store(KEPT, ClassifierPieces(later, pieces))
    return result


@pytest.fixture
def model(linears: ClassifiedLinears) -> Model:
    return Model(linears)


@pytest.fixture
def announced() -> list[Any]:
    return []


class Runner:
    """As much of a model runner as is followed."""

    def execute_model(self, scheduler_output: Any) -> None:
        pass

    def set_active_loras(self, input_batch: Any, num_scheduled_tokens: Any) -> None:
        pass


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def passes(
    model: Model, linears: ClassifiedLinears, announced: list[Any], runner: Runner
) -> ScalingPass:
    later = NonGranularRows(runner, lambda lora_id: lora_id, linears)
    return ScalingPass(
        model,
        {NAME: SECOND},
        linears,
        later,
        announced.append,
        lambda: announced.append("the base"),
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


def follow(
    runner: Any,
    layout: Mapping[str, int],
    fresh: Mapping[str, tuple[int, int]] | None = None,
    computed: Mapping[str, int] | None = None,
    finished: Sequence[str] = (),
) -> None:
    """A step with requests in the order of `layout`, each with so many rows. fresh: prompt's length
    and tokens in the prefix cache of those that come, all of KEPT. computed: of the others."""
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [
        NewRequestData(
            name, [1] * prompt, [], None, None, ([],), done, LoRARequest("kept", KEPT, "path")
        )
        for name, (prompt, done) in (fresh or {}).items()
    ]
    output.scheduled_cached_reqs = running = CachedRequestData.make_empty()
    running.req_ids = list(computed or {})
    running.num_computed_tokens = list((computed or {}).values())
    output.finished_req_ids = set(finished)
    runner.execute_model(output)
    runner.set_active_loras(SimpleNamespace(req_ids=list(layout)), list(layout.values()))


def kept_outputs(x: Tensor, by: Tensor) -> Tensor:
    """Of rows x with the gate weights that the hidden state `by` gets."""
    y = x.clone()
    y[:, :2] += x.sum(1, keepdim=True) * torch.softmax(by[:2], 0)
    return y


def test_rows_after_the_last_granular_token_run_once(
    model: Model, passes: ScalingPass, runner: Runner, announced: list[Any]
) -> None:
    """A prompt of 3 tokens in two chunks; position 3 is the first token of the answer."""
    x = torch.randn(6, HIDDEN)

    def step(rows: slice, **followed: Any) -> Tensor:
        announced.clear()
        model.found.clear()
        follow(runner, {"a": rows.stop - rows.start}, **followed)
        passes.begin_step([Run(KEPT, 0, rows.stop - rows.start)])
        return run(model, x[rows])

    each = torch.cat([kept_outputs(row[None], row) for row in x])
    torch.testing.assert_close(step(slice(0, 2), fresh={"a": (3, 0)}), each[:2])
    torch.testing.assert_close(step(slice(2, 3), computed={"a": 2}), each[2:3])
    # Drafts are verified after it, of which none is right.
    y = step(slice(3, 6), computed={"a": 3})
    torch.testing.assert_close(y[0], each[3])
    torch.testing.assert_close(y[1:], kept_outputs(x[4:], x[3]))
    assert (announced[0], len(model.found)) == ("the base", 2)
    y = step(slice(4, 5), computed={"a": 4})
    torch.testing.assert_close(y, kept_outputs(x[4:5], x[3]))
    assert announced == [[Run(KEPT, 0, 1)]]
    assert model.found == [("first", 1, 10)]
    # Preempted, and from the third token on read again, in one step.
    y = step(slice(2, 6), computed={"a": 2})
    torch.testing.assert_close(y[:2], each[2:4])
    torch.testing.assert_close(y[2:], kept_outputs(x[4:], x[3]))
    assert len(model.found) == 2


def test_a_token_in_the_place_of_a_refused_draft_is_what_is_kept(
    model: Model, passes: ScalingPass, runner: Runner
) -> None:
    x = torch.randn(5, HIDDEN)
    follow(runner, {"a": 4}, fresh={"a": (3, 0)})
    passes.begin_step([Run(KEPT, 0, 4)])
    run(model, x[:4])
    follow(runner, {"a": 1}, computed={"a": 3})
    passes.begin_step([Run(KEPT, 0, 1)])
    run(model, x[4:])
    follow(runner, {"a": 1}, computed={"a": 4})
    passes.begin_step([Run(KEPT, 0, 1)])
    torch.testing.assert_close(run(model, x[:1]), kept_outputs(x[:1], x[4]))


def test_rows_that_need_no_pass_beside_rows_that_do(
    model: Model, passes: ScalingPass, runner: Runner
) -> None:
    """Requests of one adapter in one run, one of another adapter, the base's and a LoRA's."""
    x = torch.randn(9, HIDDEN)
    follow(runner, {"a": 3, "b": 2}, fresh={"a": (2, 0), "b": (1, 0)})
    passes.begin_step([Run(KEPT, 0, 5)])
    run(model, x[:5])
    layout = {"lora": 1, "a": 1, "c": 2, "b": 2, "x": 1, "base": 2}
    follow(runner, layout, fresh={"c": (4, 1)}, computed={"a": 3, "b": 2, "x": 8, "base": 1})
    passes.begin_step([Run(LORA, 0, 1), Run(KEPT, 1, 6), Run(XLORA, 6, 7)])
    y = run(model, x)
    assert torch.equal(y[[0, 7, 8]], x[[0, 7, 8]])
    torch.testing.assert_close(y[1:2], kept_outputs(x[1:2], x[2]))
    torch.testing.assert_close(y[2:4], torch.cat([kept_outputs(row[None], row) for row in x[2:4]]))
    torch.testing.assert_close(y[4:6], kept_outputs(x[4:6], x[4]))
    torch.testing.assert_close(y[6:7], x[6:7] + x[6:7].sum(1, keepdim=True))


def test_what_was_kept_goes_with_its_request(
    model: Model, passes: ScalingPass, runner: Runner, announced: list[Any]
) -> None:
    """Aborted, and its id given to another: rows that nothing was kept for have no answer."""
    x = torch.randn(3, HIDDEN)
    follow(runner, {"a": 3}, fresh={"a": (2, 0)})
    passes.begin_step([Run(KEPT, 0, 3)])
    run(model, x)
    follow(runner, {"a": 1, "b": 1}, fresh={"a": (2, 5), "b": (9, 8)}, finished=["a"])
    announced.clear()
    passes.begin_step([Run(KEPT, 0, 2)])
    run(model, x[:2])
    assert announced == ["the base", [Run(UNSERVED, 0, 1), Run(KEPT, 1, 2)]]


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
