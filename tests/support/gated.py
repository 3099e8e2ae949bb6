"""A learned gate, and a table of token ids, over LoRAs by PEFT, on the tiny model, and what they
answer.

The oracle is plain modules, written from the definition in docs/format.md; none of it is molehill.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from support.authored import Authored, answers, replaced, save_lora, tiny_llama, top_k

# By adapter, of 512 token ids; those of 400 to 420 and the rest that is not named have none.
TOKEN_ADAPTERS: dict[str, list[Any]] = {
    "poems": [[0, 150], 421, [430, 470]],
    "code": [[151, 290]],
    "letters": [[291, 399], [422, 429]],
}
GATED = {"poems": ("q_proj", "down_proj"), "code": ("q_proj", "v_proj"), "letters": ("down_proj",)}


class Gated(nn.Module):
    """y = W x + sum_e w_e (alpha / r) B_e A_e x over LoRAs that PEFT saved, as docs/format.md has
    it; keeps the w of its last call. loras: A and B with its factor, None where there is none."""

    def __init__(self, base: nn.Linear, gate: Tensor, loras: Sequence[Any], k: int) -> None:
        super().__init__()
        self.base, self.gate, self.loras, self.k = base, gate, loras, k

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        self.weights = top_k(rows, SimpleNamespace(gate=self.gate), self.k)
        y = self.base(x)
        for e, lora in enumerate(self.loras):
            if lora is not None:
                a, b = lora
                y = y + self.weights[:, e].view(*x.shape[:-1], 1) * F.linear(F.linear(x, a), b)
        return y


class ByToken(nn.Module):
    """y = W x + (alpha / r) B_e A_e x, e the adapter of the token's id, none for -1. loras: as
    Gated's. ids: the model's input, `[T]` of the whole sequence."""

    def __init__(
        self, base: nn.Linear, loras: Sequence[Any], table: Tensor, ids: list[Tensor]
    ) -> None:
        super().__init__()
        self.base, self.loras, self.table, self.ids = base, loras, table, ids

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x).clone()
        for position, token in enumerate(self.ids[0].flatten().tolist()):
            e = int(self.table[token])
            if e >= 0 and self.loras[e] is not None:
                a, b = self.loras[e]
                y[..., position, :] += b @ (a @ x[0, position])
        return y


def author_by_token(root: Path, name: str = "molora-by-token") -> Authored:
    """LoRAs of unequal ranks on unequal linears, by PEFT, one for each token by its id."""
    directory, model = root / name, tiny_llama()
    files = save_gated(directory)
    table = torch.full((512,), -1)
    for e, spans in enumerate(TOKEN_ADAPTERS.values()):
        for span in spans:
            first, last = span if isinstance(span, list) else (span, span)
            table[first : last + 1] = e
    ids: list[Tensor] = []
    model.model.embed_tokens.register_forward_pre_hook(
        lambda _, args: ids.__setitem__(slice(None), args)
    )
    modules = {
        module: ByToken(base, loras, table, ids) for module, base, loras in loras_of(model, files)
    }
    document = {"kind": "molora", "adapters": list(GATED), "token_adapters": TOKEN_ADAPTERS}
    (directory / "molehill_mix.json").write_text(json.dumps(document))
    with replaced(model, modules), torch.no_grad():
        prompts = answers(name, model)
    return Authored(name, directory, prompts)


def save_gated(directory: Path) -> dict[str, dict[str, Tensor]]:
    """The LoRAs' tensors by adapter."""
    files = {}
    for e, (adapter, targets) in enumerate(GATED.items()):
        save_lora(directory / adapter, 40 + e, r=2 + e, target_modules=list(targets))
        files[adapter] = load_file(directory / adapter / "adapter_model.safetensors")
    return files


def loras_of(
    model: nn.Module, files: dict[str, dict[str, Tensor]]
) -> Iterator[tuple[str, Any, list[Any]]]:
    """Every adapted linear with its name, and A and B of each adapter, None where it has none."""
    for module, base in model.named_modules():
        stem = f"base_model.model.{module}.lora_"
        loras = [
            (file[f"{stem}A.weight"], file[f"{stem}B.weight"] * 5 / (2 + e))
            if f"{stem}A.weight" in file
            else None
            for e, file in enumerate(files.values())
        ]
        if any(lora is not None for lora in loras):
            yield module, base, loras


def author_molora(root: Path, name: str = "molora") -> Authored:
    """LoRAs of unequal ranks on unequal linears, by PEFT, and a learned gate over them: one for all
    linears that read the hidden state, others for each of those that read the FFN's."""
    directory, model, k = root / name, tiny_llama(), 2
    generator = torch.Generator().manual_seed(41)
    files = save_gated(directory)

    def gate(width: int) -> Tensor:
        return torch.randn(len(GATED), width, generator=generator) * 1.5 * width**-0.5

    routers = {"router": gate(model.config.hidden_size)}
    modules: dict[str, Gated] = {}
    for module, base, loras in loras_of(model, files):
        own = f"{module.removeprefix('model.')}.router"
        if module.endswith("down_proj"):
            routers[own] = gate(base.in_features)
        modules[module] = Gated(base, routers.get(own, routers["router"]), loras, k)
    save_file(routers, directory / "gate.safetensors")
    document = {"kind": "molora", "adapters": list(GATED), "router": "gate.safetensors", "top_k": k}
    (directory / "molehill_mix.json").write_text(json.dumps(document))
    with replaced(model, modules), torch.no_grad():
        prompts = answers(name, model)
        model(input_ids=torch.tensor([prompts[0].ids]), use_cache=False)
    routes = {site.removeprefix("model."): module.weights for site, module in modules.items()}
    return Authored(name, directory, prompts, routes)
