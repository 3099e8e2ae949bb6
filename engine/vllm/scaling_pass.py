"""X-LoRA in an engine: both passes of the model in one step.

An X-LoRA's classifier reads the last hidden state that the base itself has for a token, so the base
must have run over all tokens before it, with a KV cache of its own. Every attention layer gets a
second cache for that: a copy of the layer under another name, which vLLM counts, allocates and
builds metadata for as for any layer. Its spec is the first one's, so a block of a request is a
block in both, and what is cached, computed in chunks, preempted or freed is so in both.

A step that has rows of such adapters runs the model twice: as the base, on the second caches, and
after the classifier has given these rows their gate weights once more. Steps without them run it
once and leave the second caches as they are: only rows of an adapter itself read what its own rows
wrote, and those were written in steps that ran both passes. So do steps whose every such row gets
the gate weights of an earlier token (`non_granular_rows`): no row after it reads the second caches
any more, and blocks that hold such rows are the request's alone (`prefix_keys`).
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from vllm.config import CompilationMode, VllmConfig, get_layers_from_vllm_config
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index

from molehill.engine.vllm.non_granular_rows import NonGranularRows
from molehill.kernels.classified_linears import ClassifiedLinears
from molehill.kernels.interface import UNSERVED, Run

logger = init_logger("vllm.molehill")

Announce = Callable[[Sequence[Run]], None]

_WITHOUT_MODEL = ("ngram", "suffix")


def refusal(config: VllmConfig, model: nn.Module, device: str) -> str | None:
    """Why this engine cannot run two passes in a step; None if it can. device: its type."""
    parallel, drafts = config.parallel_config, config.speculative_config
    compiled = config.compilation_config.mode != CompilationMode.NONE
    reasons = {
        "CUDA graphs, which hold one pass (use --enforce-eager)": (
            device != "cpu" and not config.model_config.enforce_eager
        ),
        "a model that is compiled whole (use --enforce-eager)": (
            compiled and type(model).__call__ is not nn.Module.__call__
        ),
        "pipeline parallelism: the last stage alone has the hidden states": (
            parallel.pipeline_parallel_size > 1
        ),
        "tensor parallelism, which it has not been run with": parallel.tensor_parallel_size > 1,
        "data parallelism: engines would run unequal numbers of passes": (
            parallel.data_parallel_size > 1
        ),
        "a draft model, which reads hidden states and has a cache of its own": (
            drafts is not None and drafts.method not in _WITHOUT_MODEL
        ),
        "a multimodal base, some of which take images out of their inputs as they run": (
            config.model_config.is_multimodal_model
        ),
        "a base merged with an adapter (--merge-into-base)": bool(
            (config.additional_config or {}).get("molehill", {}).get("merged_base")
        ),
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    return found or _layer_refusal(config)


def _layer_refusal(config: VllmConfig) -> str | None:
    """Whether every layer keeps keys and values by token, and its own."""
    for name, layer in _layers(config).items():
        if not isinstance(layer, Attention):
            return f"{name}, a {type(layer).__name__}, which is no attention over keys and values"
        if layer.kv_sharing_target_layer_name:
            return f"{name}, which shares the KV cache of {layer.kv_sharing_target_layer_name}"
    return None


def _layers(config: VllmConfig) -> dict[str, Any]:
    layer_type: Any = AttentionLayerBase
    layers: dict[str, Any] = get_layers_from_vllm_config(config, layer_type)
    return layers


def add_caches(config: VllmConfig) -> dict[str, str]:
    """Has vLLM keep a second KV cache for every attention layer; the names under which it does, by
    the layers' own. Before it asks the model for the caches that it needs."""
    layers = _layers(config)
    first = 1 + max(map(extract_layer_index, layers), default=-1)
    names = {}
    for i, (name, layer) in enumerate(layers.items()):
        second = copy.copy(layer)
        # vLLM reads a layer's number out of its name.
        second.layer_name = names[name] = f"scaling_pass.{first + i}.attn"
        config.compilation_config.static_forward_context[second.layer_name] = second
    return names


class ScalingPass:
    """Runs a worker's model twice in steps that have rows with a classifier.

    announce: gets all runs of a step, once for each step and before any layer runs.
    announce_base: is called before a forward whose rows are all the base's.
    """

    def __init__(
        self,
        model: nn.Module,
        caches: Mapping[str, str],
        classified: ClassifiedLinears,
        non_granular: NonGranularRows,
        announce: Announce,
        announce_base: Callable[[], None],
    ) -> None:
        """model: the runner's, whose calls are followed from now on. caches: of `add_caches`."""
        self._caches, self._classified = caches, classified
        self._non_granular = non_granular
        self._announce, self._announce_base = announce, announce_base
        # Of a step that waits for the model's call.
        self._waiting: list[Run] | None = None
        forward = model.forward

        @functools.wraps(forward)
        def twice(*args: Any, **more: Any) -> Any:
            runs, self._waiting = self._waiting, None
            if runs is not None:
                self._run_first(runs, functools.partial(forward, *args, **more))
            return forward(*args, **more)

        model.forward = twice

    def begin_step(self, runs: Sequence[Run]) -> None:
        """Announces runs, with the model's call where a step has rows with a classifier. Never
        raises."""
        self._classified.end_step()
        self._waiting = None
        if not any(self._classified.has_classifier(run.slot) for run in runs):
            self._announce(runs)
            return
        runs = self._non_granular.begin_step(runs)
        if self._non_granular.needs_pass(runs):
            self._waiting = runs
        else:
            self._weigh(runs, lambda: self._classified.begin_without_pass(runs))

    def _run_first(self, runs: Sequence[Run], forward: Callable[[], Any]) -> None:
        def make_gate_weights() -> None:
            self._announce_base()
            self._classified.begin_pass(runs)
            with override_forward_context(self._on_second_caches(get_forward_context())):
                made = forward()
            hidden = made[0] if isinstance(made, tuple) else made
            self._classified.classify(hidden)

        self._weigh(runs, make_gate_weights)

    def _weigh(self, runs: Sequence[Run], make_gate_weights: Callable[[], None]) -> None:
        """Announces the forward that uses gate weights. Never raises: what has none is zeroed."""
        try:
            make_gate_weights()
            self._non_granular.give()
        except Exception:
            logger.exception("molehill: rows of X-LoRA adapters are zeroed")
            self._classified.end_step()
            runs = [
                replace(run, slot=UNSERVED) if self._classified.has_classifier(run.slot) else run
                for run in runs
            ]
        self._announce(runs)

    def _on_second_caches(self, context: ForwardContext) -> ForwardContext:
        """The step's context, in which every layer's name leads to its second cache."""
        layers = context.no_compile_layers
        return replace(
            context,
            no_compile_layers={**layers, **self._of_second(layers)},
            attn_metadata=self._of_second(context.attn_metadata),
            slot_mapping=self._of_second(context.slot_mapping),
        )

    def _of_second(self, by_name: Any) -> dict[str, Any]:
        return {name: by_name[other] for name, other in self._caches.items() if other in by_name}
