"""Adapters of methods that the golden cases lack, on the tiny model, as their authors save them.

What they answer is computed by plain modules written from the methods' original code, or by PEFT;
nothing here uses molehill.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from support.golden import TINY_LLAMA, Case, Prompt

TARGETS = ("self_attn.q_proj", "mlp.down_proj")
LAYERS, EXPERTS, RANK, ALPHA, HIDDEN = 4, 4, 2, 4, 5
# Two implementations in float32 may differ by 1e-4 in a logit; greedy tokens must not hang on that.
LEAST_MARGIN = 0.02


@dataclass(frozen=True)
class Authored:
    """routes: gate weights `[tokens, E]` by site for the first prompt, where they are known."""

    name: str
    path: Path
    prompts: tuple[Prompt, ...]
    routes: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """config: what tells it apart. weigh: gate weights `[T, E]` of x `[T, in]`. names: the file's
    tensors of one linear."""

    name: str
    config: dict[str, Any]
    weigh: Callable[[Tensor, SimpleNamespace], Tensor]
    names: Callable[[SimpleNamespace], dict[str, Tensor]]


def tiny_llama() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()


class Mixture(nn.Module):
    """y = W x + alpha / r * sum_e w_e B_e A_e x; keeps the w of its last call."""

    def __init__(self, base: nn.Linear, parts: SimpleNamespace, method: Method) -> None:
        super().__init__()
        self.base, self.parts, self.method = base, parts, method

    def forward(self, x: Tensor) -> Tensor:
        y, rows = self.base(x), x.reshape(-1, x.shape[-1])
        self.weights = self.method.weigh(rows, self.parts)
        for e in range(EXPERTS):
            out = F.linear(F.linear(x, self.parts.a[e]), self.parts.b[e]) * (ALPHA / RANK)
            y = y + self.weights[:, e].view(*x.shape[:-1], 1) * out
        return y


def top_k(x: Tensor, parts: SimpleNamespace, k: int) -> Tensor:
    p = F.softmax(F.linear(x, parts.gate), dim=-1)
    values, chosen = torch.topk(p, k, dim=-1)
    weights = torch.zeros_like(p)
    return weights.scatter(-1, chosen, values / values.sum(-1, keepdim=True))


def threshold(x: Tensor, parts: SimpleNamespace, least: float) -> Tensor:
    p = F.softmax(F.linear(x, parts.gate), dim=-1)
    return over_sum(torch.where(p >= least, p, 0.0))


def adaptive(x: Tensor, parts: SimpleNamespace, greatest: float) -> Tensor:
    p = F.softmax(F.linear(x, parts.gate), dim=-1)
    adapted = p - torch.sigmoid(F.linear(x, parts.row, parts.bias)) * greatest
    return over_sum(adapted * (adapted >= 0))


def over_sum(weights: Tensor) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, torch.ones_like(total), total)


def sparsegen(x: Tensor, parts: SimpleNamespace, eps: float = 1e-2) -> Tensor:
    z = F.linear(x, parts.gate)
    lam = F.logsigmoid(parts.mlps[str(x.shape[-1])](x)) + (1 - eps)
    ranked = torch.sort(z, descending=True, dim=-1).values
    places = torch.arange(1, EXPERTS + 1)
    support = 1 - lam + places * ranked > torch.cumsum(ranked, dim=-1)
    tau = ((ranked * support).sum(-1, keepdim=True) - 1 + lam) / support.sum(-1, keepdim=True)
    return (z - tau).clamp(min=0) / (1 - lam).clamp(min=eps)


def mole_names(parts: SimpleNamespace) -> dict[str, Tensor]:
    names = {"lora_gating.weight": parts.gate}
    for e in range(EXPERTS):
        for stem in (f"lora_{{}}.{e}", f"moe_layer.experts.{e}.lora_{{}}"):
            names[f"{stem.format('A')}.weight"] = parts.a[e]
            names[f"{stem.format('B')}.weight"] = parts.b[e]
    return names


def adamole_names(parts: SimpleNamespace) -> dict[str, Tensor]:
    threshold_names = {"lora_threshold.weight": parts.row, "lora_threshold.bias": parts.bias}
    return mole_names(parts) | threshold_names


def ldmole_names(parts: SimpleNamespace) -> dict[str, Tensor]:
    names = {"lora_route.weight": parts.gate}
    for e in range(EXPERTS):
        names |= {f"lora_A{e}.weight": parts.a[e], f"lora_B{e}.weight": parts.b[e]}
    return names | shared_names(parts, "sparsegen")


def shared_names(parts: SimpleNamespace, stem: str) -> dict[str, Tensor]:
    return {f"{stem}.mlp.proj_layers.{k}": v.detach() for k, v in parts.mlps.state_dict().items()}


MOLE = {"lora_rank": RANK, "num_experts": EXPERTS, "bias": "none", "init_lora_weights": True}
SPARSEGEN_CFG: dict[str, Any] = {
    "enabled": True,
    "input_sizes": [64, 128, 176],
    "hidden_sizes": HIDDEN,
}
METHODS = (
    Method(
        "mole-top-k",
        {"peft_type": "MOLE", "top_k": 2, "threshold": None, **MOLE},
        partial(top_k, k=2),
        mole_names,
    ),
    Method(
        "mole-threshold",
        {"peft_type": "MOLE", "top_k": None, "threshold": 0.3, **MOLE},
        partial(threshold, least=0.3),
        mole_names,
    ),
    Method(
        "adamole",
        {"peft_type": "ADAMOLE", "max_threshold": None, **MOLE},
        partial(adaptive, greatest=1 / EXPERTS),
        adamole_names,
    ),
    Method(
        "adamole-high",
        {"peft_type": "ADAMOLE", "max_threshold": 0.8, **MOLE},
        partial(adaptive, greatest=0.8),
        adamole_names,
    ),
    Method(
        "ldmole",
        {
            "peft_type": "LORA",
            "r": RANK,
            "lora_nums": EXPERTS,
            "sparsegen": False,
            "sparsegen_init": "kaiming",
            "sparsegen_cfg": SPARSEGEN_CFG,
            "blc_alpha": 0,
            "blc_weight": 0,
            "bias": "none",
            "fan_in_fan_out": False,
            "modules_to_save": ["score"],
        },
        sparsegen,
        ldmole_names,
    ),
)


def new_parts(linear: nn.Linear, mlps: nn.ModuleDict, generator: torch.Generator) -> Any:
    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    inputs, outputs = linear.in_features, linear.out_features
    return SimpleNamespace(
        gate=normal(EXPERTS, inputs, scale=1.5 * inputs**-0.5),
        a=normal(EXPERTS, RANK, inputs, scale=inputs**-0.5),
        b=normal(EXPERTS, outputs, RANK, scale=0.3),
        row=normal(1, inputs, scale=2 * inputs**-0.5),
        bias=normal(1, scale=1.0),
        mlps=mlps,
    )


def new_mlps(generator: torch.Generator) -> nn.ModuleDict:
    mlps = nn.ModuleDict(
        {
            str(size): nn.Sequential(nn.Linear(size, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
            for size in SPARSEGEN_CFG["input_sizes"]
        }
    )
    for parameter in mlps.parameters():
        scale = 2 * parameter.shape[-1] ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return mlps


@contextmanager
def replaced(model: Any, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


@torch.no_grad()
def answers(name: str, model: Any, count: int = 2, steps: int = 12) -> tuple[Prompt, ...]:
    """What the model says to the first golden prompts."""
    result = []
    for prompt in Case("base").prompts[:count]:
        ids, logits = list(prompt.ids), []
        for _ in range(steps):
            logits.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
            best = logits[-1].topk(2)
            assert best.values[0] - best.values[1] > LEAST_MARGIN, f"{name}: choose another seed"
            ids.append(int(best.indices[0]))
        result.append(Prompt(name, prompt.ids, tuple(ids[-steps:]), logits[0]))
    return tuple(result)


def write(directory: Path, method: Method, modules: Mapping[str, Mixture]) -> None:
    config = {
        "base_model_name_or_path": "tiny-llama",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "target_modules": [target.split(".")[1] for target in TARGETS],
        **method.config,
    }
    tensors = {
        f"base_model.model.{name}.{part}": tensor
        for name, module in modules.items()
        for part, tensor in method.names(module.parts).items()
    }
    if method.names is ldmole_names:
        parts = next(iter(modules.values())).parts
        tensors |= shared_names(parts, "base_model.sparsegen_fn")
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, directory / "adapter_model.bin")


def author(root: Path, method: Method, seed: int) -> Authored:
    """Writes an adapter below `root`."""
    model, generator = tiny_llama(), torch.Generator().manual_seed(seed)
    mlps = new_mlps(generator)
    modules = {}
    for target in TARGETS:
        for layer in range(LAYERS):
            name = f"model.layers.{layer}.{target}"
            base = model.get_submodule(name)
            modules[name] = Mixture(base, new_parts(base, mlps, generator), method)
    write(root / method.name, method, modules)
    with replaced(model, modules), torch.no_grad():
        prompts = answers(method.name, model)
        model(input_ids=torch.tensor([prompts[0].ids]), use_cache=False)
    routes = {name.removeprefix("model."): module.weights for name, module in modules.items()}
    return Authored(method.name, root / method.name, prompts, routes)


def save_lora(directory: Path, seed: int, **config: Any) -> None:
    """A LoRA by PEFT. Each rank acts less than the one before: the first singular value stands out,
    or PEFT's power iteration would not have converged."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **config}
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator)
            columns = parameter.shape[1]
            falling = 0.5 * 0.3 ** torch.arange(columns)
            parameter.data = values * (falling if "lora_B" in name else columns**-0.5)
    model.save_pretrained(directory)


TASKS = {"poems": 5, "code": 9, "letters": 2}
GENERAL = ("english", "french")


def author_arrow(root: Path, name: str, general: Sequence[str] = (), k: int = 2) -> Authored:
    """An Arrow adapter below `root`, and what PEFT's own answers."""
    from peft import ArrowConfig
    from peft.tuners.lora.arrow import create_arrow_model

    directory, temperature = root / name, 0.8
    for seed, (task, alpha) in enumerate(TASKS.items()):
        save_lora(directory / task, 10 + seed, lora_alpha=alpha)
    for seed, adapter in enumerate(general):
        save_lora(directory / adapter, 20 + seed, lora_alpha=7)
    document = {
        "kind": "arrow",
        "adapters": list(TASKS),
        "top_k": k,
        "router_temperature": temperature,
        "general": list(general),
    }
    (directory / "molehill_mix.json").write_text(json.dumps(document))
    config = ArrowConfig(top_k=k, router_temperature=temperature, use_gks=bool(general), rng_seed=1)
    model = create_arrow_model(
        tiny_llama(),
        [str(directory / task) for task in TASKS],
        config,
        [str(directory / adapter) for adapter in general],
    )
    return Authored(name, directory, answers(name, model.eval()))


SCALES = {"formal": 0.75, "german": -0.4}


def author_mix(root: Path, name: str = "mix") -> Authored:
    """A static mix of two LoRAs of other ranks and targets, and what PEFT's own answers."""
    directory = root / name
    save_lora(directory / "formal", 30)
    targets = ["q_proj", "v_proj", "up_proj"]
    save_lora(directory / "german", 31, r=2, use_rslora=True, target_modules=targets)
    document = {"kind": "mix", "adapters": SCALES}
    (directory / "molehill_mix.json").write_text(json.dumps(document))
    prompts = weighted_answers(name, {part: directory / part for part in SCALES}, SCALES)
    return Authored(name, directory, prompts)


def weighted_answers(
    name: str, paths: Mapping[str, Path], scales: Mapping[str, float]
) -> tuple[Prompt, ...]:
    """What PEFT's weighted sum of LoRAs answers."""
    from peft import PeftModel

    first, *others = paths
    model = PeftModel.from_pretrained(tiny_llama(), str(paths[first]), adapter_name=first)
    for other in others:
        model.load_adapter(str(paths[other]), adapter_name=other)
    model.add_weighted_adapter(list(scales), list(scales.values()), name, "cat")
    model.set_adapter(name)
    return answers(name, model.eval())


def author_renamed(root: Path, name: str = "renamed") -> Authored:
    """A LoRA by PEFT, chosen and scaled by patterns, and what PEFT answers; then in two files, with
    the names that FSDP and a multimodal model give it and its adapter's own name."""
    from peft import PeftModel

    directory = root / name
    save_lora(
        directory,
        33,
        target_modules=r".*\.layers\.[0-2]\..*(q_proj|down_proj)$",
        rank_pattern={r".*\.layers\.1\..*(q_proj|k_proj)$": 4},
        alpha_pattern={r"layers\.\d\.mlp\.(?:down|up)_proj": 7},
    )
    model = PeftModel.from_pretrained(tiny_llama(), str(directory)).eval()
    prompts = answers(name, model)
    whole = directory / "adapter_model.safetensors"
    tensors = {
        f"_fsdp_wrapped_module.{key}".replace(".model.layers.", ".model.language_model.layers.")
        .replace("lora_A.", "lora_A.tuned.")
        .replace("lora_B.", "lora_B.tuned."): tensor
        for key, tensor in load_file(whole).items()
    }
    whole.unlink()
    weight_map = {}
    for i in (0, 1):
        file = f"adapter_model-{i}.safetensors"
        part = dict(list(tensors.items())[i::2])
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = directory / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return Authored(name, directory, prompts)


def author_all(root: Path) -> list[Authored]:
    cases = [author(root, method, seed) for seed, method in enumerate(METHODS)]
    arrows = [author_arrow(root, "arrow"), author_arrow(root, "arrow-general", GENERAL)]
    return [*cases, *arrows, author_mix(root), author_renamed(root)]
