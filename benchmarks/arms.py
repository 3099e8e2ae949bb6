"""The contestants of the kernel benchmark: molehill's CPU backends, and vLLM's own LoRA ops.

An arm holds one copy of the weights per layer and adapter, as a server would. `prepare` announces a
batch, which costs a server one call per step and is not timed, and returns what runs one layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from molehill.benchmarks.workload import (
    DTYPE,
    HIDDEN,
    INTERMEDIATE,
    LINEARS,
    OPS,
    AdapterLayer,
    Point,
)
from molehill.kernels.interface import Backend, FfnShape, LinearShape, SlotWeights
from molehill.kernels.mixture import Experts

RunLayer = Callable[[int], None]


class Arm(Protocol):
    """outputs: what the batch's ops add to, `[tokens, out]` by fused linear, from zero on."""

    outputs: dict[str, Tensor]

    def prepare(self, point: Point, inputs: Mapping[int, Tensor]) -> RunLayer:
        """Announces a batch of `inputs` (activations by width)."""


def _zeros(point: Point) -> dict[str, Tensor]:
    return {
        name: torch.zeros(point.tokens, sum(LINEARS[name][1]), dtype=DTYPE)
        for name in OPS[point.op]
    }


class MixtureArm:
    """A backend with the same adapter in each of `adapters` slots."""

    def __init__(self, backend: Backend, layers: Sequence[AdapterLayer], adapters: int) -> None:
        self.backend = backend
        self.outputs: dict[str, Tensor] = {}
        self._linears = [self._register(i) for i in range(len(layers))]
        self._ffns = [self._register_ffn(i) for i in range(len(layers))]
        weights = SlotWeights(
            {
                self._linears[i][name]: pieces
                for i, layer in enumerate(layers)
                for name, pieces in layer.linears.items()
            },
            {self._ffns[i]: layer.ffn for i, layer in enumerate(layers) if layer.ffn},
        )
        for slot in range(adapters):
            backend.store(slot, weights)

    def _register(self, layer: int) -> dict[str, int]:
        return {
            name: self.backend.register_linear(
                LinearShape(f"{layer}.{name}", inputs, sum(outputs), DTYPE)
            )
            for name, (inputs, outputs) in LINEARS.items()
        }

    def _register_ffn(self, layer: int) -> int:
        handles = self._linears[layer]
        shape = FfnShape(f"{layer}.mlp", handles["gate_up"], handles["down"], INTERMEDIATE)
        return self.backend.register_ffn(shape)

    def prepare(self, point: Point, inputs: Mapping[int, Tensor]) -> RunLayer:
        """See Arm."""
        self.backend.begin_step(point.runs)
        self.outputs = _zeros(point)
        return self._ffn(point, inputs) if point.is_ffn else self._linear(point, inputs)

    def _linear(self, point: Point, inputs: Mapping[int, Tensor]) -> RunLayer:
        op = self.backend.linear_op
        handles = _as_tensors(self._linears)
        work = [(self.outputs[name], inputs[LINEARS[name][0]], name) for name in OPS[point.op]]

        def run(layer: int) -> None:
            linears = handles[layer]
            for out, x, name in work:
                op(out, x, linears[name])

        return run

    def _ffn(self, point: Point, inputs: Mapping[int, Tensor]) -> RunLayer:
        """The three ops that an FFN mixture adds to a layer."""
        linear_op, ffn_op = self.backend.linear_op, self.backend.ffn_op
        x, pre, out = inputs[HIDDEN], inputs[2 * INTERMEDIATE], self.outputs["down"]
        h = torch.empty(point.tokens, INTERMEDIATE, dtype=DTYPE)
        linears, ffns = _as_tensors(self._linears), [torch.tensor([ffn]) for ffn in self._ffns]

        def run(layer: int) -> None:
            linear_op(pre, x, linears[layer]["gate_up"])
            ffn_op(h, pre, ffns[layer])
            linear_op(out, h, linears[layer]["down"])

        return run


def _as_tensors(handles: Sequence[Mapping[str, int]]) -> list[dict[str, Tensor]]:
    return [{name: torch.tensor([handle]) for name, handle in layer.items()} for layer in handles]


class VllmArm:
    """vLLM's CPU LoRA as a stock server calls it: one static LoRA per projection, no router.

    Its rank is the sum of the experts' ranks, its A and B are theirs. In place of an FFN mixture,
    which vLLM does not have, stand LoRAs of that rank on gate, up and down. Raises ImportError
    without vLLM.
    """

    def __init__(self, layers: Sequence[AdapterLayer], adapters: int) -> None:
        from vllm.lora.layers.utils import LoRAMapping
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        self._mapping, self._wrapper_type = LoRAMapping, PunicaWrapperCPU
        self.outputs: dict[str, Tensor] = {}
        self._adapters = adapters
        self._layers = [
            {name: _stacked(pairs, adapters) for name, pairs in _pairs(layer).items()}
            for layer in layers
        ]

    def prepare(self, point: Point, inputs: Mapping[int, Tensor]) -> RunLayer:
        """See Arm."""
        wrapper = self._wrapper(point)
        self.outputs = _zeros(point)
        work = [
            (self.outputs[name], inputs[LINEARS[name][0]], LINEARS[name][1], name)
            for name in OPS[point.op]
        ]

        def run(layer: int) -> None:
            for out, x, slices, name in work:
                a, b = self._layers[layer][name]
                wrapper.add_lora_linear(out, x, a, b, 1.0, slices)

        return run

    def _wrapper(self, point: Point) -> Any:
        ids = [run.slot + 1 for run in point.runs for _ in range(run.start, run.stop)]
        wrapper = self._wrapper_type(point.tokens, point.tokens, "cpu")
        # On a CPU vLLM's runner calls every step a prefill.
        mapping = self._mapping(tuple(ids), tuple(ids), is_prefill=True)
        slots = list(range(1, self._adapters + 1))
        wrapper.update_metadata(mapping, slots, self._adapters, vocab_size=1)
        return wrapper


def _pairs(layer: AdapterLayer) -> dict[str, list[Experts]]:
    """The low-rank pairs of each fused linear's projections."""
    if layer.ffn is None:
        return {name: [p.experts for p in pieces] for name, pieces in layer.linears.items()}
    ffn = layer.ffn
    parts = {"gate_up": (ffn.gate, ffn.up), "down": (ffn.down,)}
    return {name: [pair for pair in pieces if pair] for name, pieces in parts.items()}


def _stacked(
    pairs: Sequence[Experts], adapters: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A `[adapters, 1, R, in]` and B `[adapters, 1, out, R]` of each projection."""
    a, b = (
        tuple(getattr(p, half).to(DTYPE).repeat(adapters, 1, 1, 1) for p in pairs) for half in "ab"
    )
    return a, b
