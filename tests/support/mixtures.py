"""Mixtures written a second time, straight from the formulas, as modules inside a Transformers
model; and the files that MoE-PEFT would save for them.

Nothing here uses molehill: the engine is compared against it. float32, every expert for every
token, no thought of speed.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

EXPERTS, RANK, ALPHA = 4, 2, 4
SCALING = ALPHA / RANK

Pair = tuple[Tensor, Tensor]
Select = Callable[[Tensor], Tensor]


def dynmole_weights(p: Tensor, threshold: float = 0.9) -> Tensor:
    """`[..., E]` probabilities to weights; Tsallis 1.1, top-p 0.75, two kept."""
    ordered, order = p.sort(descending=True)
    rank = torch.arange(1, p.shape[-1] + 1)
    kept = (ordered.cumsum(-1) <= 0.75) | (rank <= 2)
    keep = torch.zeros_like(kept).scatter(-1, order, kept)
    q = 1.1
    entropy = (1 - (p + 1e-5).pow(q).sum(-1)) / (q - 1)
    greatest = (1 - p.shape[-1] ** (1 - q)) / (q - 1)
    return p * (keep | (entropy / greatest > threshold).unsqueeze(-1))


def mixlora_weights(p: Tensor) -> Tensor:
    """The two greatest, divided by their sum."""
    values, chosen = p.topk(2)
    return torch.zeros_like(p).scatter(-1, chosen, values / values.sum(-1, keepdim=True))


DYNMOLE = {
    "routing_strategy": "dynmole",
    "num_experts": EXPERTS,
    "entropy_threshold": 0.9,
    "entropy_index": 1.1,
    "entropy_type": "tsallis",
    "entropy_eps": 1e-5,
    "keep_top_k": 2,
    "top_p": 0.75,
}
MIXLORA = {"routing_strategy": "mixlora", "num_experts": EXPERTS, "top_k": 2}


class MixedLinear(nn.Module):
    """y = W x + bias + s sum_e w_e(x) B_e A_e x; without a gate all weights are 1."""

    def __init__(
        self, base: nn.Linear, pairs: Sequence[Pair], gate: Tensor | None, select: Select
    ) -> None:
        super().__init__()
        self.base, self.pairs, self.gate, self.select = base, pairs, gate, select

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        weights = torch.ones(*x.shape[:-1], len(self.pairs))
        if self.gate is not None:
            weights = self.select(torch.softmax(x @ self.gate.T, dim=-1))
        for e, (a, b) in enumerate(self.pairs):
            y = y + weights[..., e : e + 1] * SCALING * (x @ a.T @ b.T)
        return y


class MixedFfn(nn.Module):
    """y = sum_e w_e(x) FFN_e(x), the whole base FFN inside every expert.

    pairs: by projection; a fused gate_up_proj is adapted as one linear.
    """

    def __init__(
        self, base: Any, pairs: Mapping[str, Sequence[Pair]], gate: Tensor, select: Select
    ) -> None:
        super().__init__()
        self.base, self.pairs, self.gate, self.select = base, pairs, gate, select
        self.act = getattr(base, "act_fn", None) or base.activation_fn

    def _project(self, name: str, e: int, x: Tensor) -> Tensor:
        y: Tensor = getattr(self.base, name)(x)
        if name in self.pairs:
            a, b = self.pairs[name][e]
            y = y + SCALING * (x @ a.T @ b.T)
        return y

    def _expert(self, e: int, x: Tensor) -> Tensor:
        if hasattr(self.base, "gate_up_proj"):
            gate, up = self._project("gate_up_proj", e, x).chunk(2, dim=-1)
        else:
            gate, up = self._project("gate_proj", e, x), self._project("up_proj", e, x)
        return self._project("down_proj", e, self.act(gate) * up)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.select(torch.softmax(x @ self.gate.T, dim=-1))
        return torch.stack(
            [weights[..., e : e + 1] * self._expert(e, x) for e in range(EXPERTS)]
        ).sum(0)


@dataclass
class Recipe:
    """A random adapter for one model: the modules that replace others, and the file's tensors."""

    method: str
    config: Mapping[str, Any]
    modules: dict[str, nn.Module] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)

    def save(self, directory: Path) -> Path:
        """As MoE-PEFT does: a pickled dict and a config."""
        directory.mkdir(parents=True)
        config = {
            "bias": "none",
            "peft_type": self.method.upper(),
            "r": RANK,
            "lora_alpha": ALPHA,
            "lora_dropout": 0.05,
            "target_modules": sorted(self.targets),
            "task_type": "CAUSAL_LM",
            **self.config,
        }
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=4))
        torch.save(self.tensors, directory / "adapter_model.bin")
        return directory

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the modules in place of its own, inside the block."""
        originals = {name: model.get_submodule(name) for name in self.modules}
        try:
            for name, module in self.modules.items():
                model.set_submodule(name, module)
            yield model
        finally:
            for name, module in originals.items():
                model.set_submodule(name, module)


class Random:
    """Seeded pairs and gates, strong enough to change every greedy token."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def matrix(self, rows: int, columns: int, scale: float) -> Tensor:
        return scale * torch.randn(rows, columns, generator=self._generator)

    def pair(self, linear: nn.Linear) -> Pair:
        out, inputs = linear.weight.shape
        return self.matrix(RANK, inputs, inputs**-0.5), self.matrix(out, RANK, 0.35)

    def gate(self, inputs: int) -> Tensor:
        return self.matrix(EXPERTS, inputs, 1.2 * inputs**-0.5)


def _add(recipe: Recipe, module: str, tensors: Mapping[str, Tensor]) -> None:
    name = module.removeprefix("model.")
    for suffix, tensor in tensors.items():
        recipe.tensors[f"{recipe.method}.{name}.{suffix}.weight"] = tensor


def _expert_tensors(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    halves = [
        (e, half, t) for e, pair in enumerate(pairs) for half, t in zip("AB", pair, strict=True)
    ]
    return {f"experts.{e}.lora_{half}": tensor for e, half, tensor in halves}


def dynmole(
    model: nn.Module, projections: Sequence[str], seed: int, threshold: float = 0.9
) -> Recipe:
    """DynMoLE on every linear inside the layers with one of these names; with a threshold of 0 all
    experts act by their probability."""
    random = Random(seed)
    recipe = Recipe("dynmole", {**DYNMOLE, "entropy_threshold": threshold})
    select = partial(dynmole_weights, threshold=threshold)
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in projections and isinstance(module, nn.Linear):
            pairs = [random.pair(module) for _ in range(EXPERTS)]
            gate = random.gate(module.in_features)
            recipe.modules[name] = MixedLinear(module, pairs, gate, select)
            recipe.targets.add(leaf)
            _add(recipe, name, {"moe_gate": gate, **_expert_tensors(pairs)})
    return recipe


def mixlora(model: nn.Module, attention: str, seed: int, act_fn: str | None = None) -> Recipe:
    """MixLoRA on every `mlp`, plain LoRA on the linear `attention` of every layer."""
    config = MIXLORA if act_fn is None else {**MIXLORA, "act_fn": act_fn}
    random, recipe = Random(seed), Recipe("mixlora", config)
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            linears = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
            pairs = {n: [random.pair(m) for _ in range(EXPERTS)] for n, m in linears.items()}
            gate = random.gate(linears["down_proj"].out_features)
            recipe.modules[name] = MixedFfn(module, pairs, gate, mixlora_weights)
            recipe.targets |= set(linears)
            _add(recipe, name, {"moe_gate": gate})
            for projection, pair in pairs.items():
                _add(recipe, f"{name}.{projection}", _expert_tensors(pair))
        if name.endswith(f".{attention}") and isinstance(module, nn.Linear):
            a, b = random.pair(module)
            recipe.modules[name] = MixedLinear(module, [(a, b)], None, mixlora_weights)
            recipe.targets.add(attention)
            _add(recipe, name, {"lora_A": a, "lora_B": b})
    return recipe
