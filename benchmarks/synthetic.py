"""Adapters of random weights for a base model, in molehill's native format or PEFT's."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native
from molehill.engine.hf.shapes import canonical_name
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture, Mixture
from molehill.kernels.policy import Constant, DynMoLE, TopK

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Large enough to change what is generated, small enough to leave the model a language model.
WEIGHT = 0.01


def random(*shape: int, generator: torch.Generator, scale: float) -> Tensor:
    return torch.randn(*shape, generator=generator) * scale


def experts(shape: tuple[int, int], number: int, rank: int, generator: torch.Generator) -> Experts:
    """`number` experts of one rank for a linear of (in, out) features."""
    inputs, outputs = shape
    a = random(number * rank, inputs, generator=generator, scale=WEIGHT)
    b = random(outputs, number * rank, generator=generator, scale=WEIGHT)
    return Experts(a, b, (rank,) * number)


def input_sizes(model: str, tokens: int = 256) -> dict[str, float]:
    """Root mean square of what each linear of a model reads, by site, on random tokens.

    Routers of random weights need it: inputs of 0.05 would make every one of them uniform.
    """
    from transformers import AutoModelForCausalLM

    device, dtype = (
        ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    )
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
    result: dict[str, float] = {}
    for name, module in causal.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(partial(_measure, result, canonical_name(name)))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, causal.config.vocab_size, (1, tokens), generator=generator)
    with torch.inference_mode():
        causal(ids.to(device))
    return result


def _measure(sizes: dict[str, float], site: str, module: torch.nn.Module, args: Any) -> None:
    sizes[site] = float(args[0].float().square().mean().sqrt())


def router(
    inputs: int, number: int, sharpness: float, size: float, generator: torch.Generator
) -> Tensor:
    """sharpness: standard deviation of the logits for an input of root mean square `size`."""
    return random(number, inputs, generator=generator, scale=sharpness / size / inputs**0.5)


def dynmole(
    base: BaseModel,
    number: int,
    rank: int,
    sharpness: float,
    sizes: Mapping[str, float],
    seed: int,
) -> Adapter:
    """DynMoLE with the defaults of its official code on all projections. sizes: `input_sizes`."""
    generator = torch.Generator().manual_seed(seed)
    sites: dict[str, Mixture] = {
        site: LinearMixture(
            experts(shape, number, rank, generator),
            DynMoLE(),
            router(shape[0], number, sharpness, sizes[site], generator),
        )
        for site, shape in base.linears.items()
        if site.rpartition(".")[2] in PROJECTIONS
    }
    return Adapter("dynmole", sites, base.name)


def mixlora(
    base: BaseModel,
    number: int,
    rank: int,
    sharpness: float,
    sizes: Mapping[str, float],
    seed: int,
) -> Adapter:
    """MixLoRA, top-2, experts on all three projections of every FFN. sizes: `input_sizes`."""
    generator = torch.Generator().manual_seed(seed)
    sites: dict[str, Mixture] = {}
    for ffn in base.ffns:
        shapes = {name: base.linears[f"{ffn}.{name}"] for name in PROJECTIONS[4:]}
        pairs = {name: experts(shape, number, rank, generator) for name, shape in shapes.items()}
        width, size = shapes["gate_proj"][0], sizes[f"{ffn}.gate_proj"]
        gate = router(width, number, sharpness, size, generator)
        sites[ffn] = FfnMixture(pairs, TopK(2), gate)
    return Adapter("mixlora", sites, base.name)


def lora(base: BaseModel, rank: int, seed: int) -> Adapter:
    """A plain LoRA on all projections."""
    generator = torch.Generator().manual_seed(seed)
    sites: dict[str, Mixture] = {
        site: LinearMixture(experts(shape, 1, rank, generator), Constant((1.0,)))
        for site, shape in base.linears.items()
        if site.rpartition(".")[2] in PROJECTIONS
    }
    return Adapter("lora", sites, base.name)


def save(make: Callable[..., Adapter], directory: Path, **options: object) -> Path:
    """Writes `make(**options)` to `directory` and returns it."""
    native.write(make(**options), directory)
    return directory


def save_dynmoles(base: BaseModel, num_bytes: int, directories: Sequence[Path]) -> list[Path]:
    """Two experts on every linear, with the rank that comes nearest to `num_bytes` each; no two are
    alike."""
    sizes = dict.fromkeys(base.linears, 1.0)
    one, two = (dynmole(base, 2, rank, 2.0, sizes, 0).num_bytes for rank in (1, 2))
    rank = max(1, 1 + round((num_bytes - one) / (two - one)))
    return [
        save(
            dynmole,
            directory,
            base=base,
            number=2,
            rank=rank,
            sharpness=2.0,
            sizes=sizes,
            seed=seed,
        )
        for seed, directory in enumerate(directories)
    ]


def save_lora(base: BaseModel, rank: int, directory: Path, seed: int = 0) -> Path:
    """A plain LoRA on all projections as PEFT writes it, for vLLM's own LoRA."""
    tensors = {}
    for name, tensor in lora(base, rank, seed).tensors():
        site, _, half = name.rpartition(".")
        key = f"base_model.model.model.{site}.lora_{half.upper()}.weight"
        tensors[key] = tensor.bfloat16().contiguous()
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(PROJECTIONS),
        "base_model_name_or_path": base.name,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def save_tiny(base: BaseModel, folder: Path, number: int) -> list[Path]:
    """`number` LoRAs of rank 1 on one linear, all different, as `<folder>/small-<i>`."""
    site, shape = next(iter(base.linears.items()))
    folders = []
    for seed in range(number):
        pair = experts(shape, 1, 1, torch.Generator().manual_seed(seed))
        adapter = Adapter("lora", {site: LinearMixture(pair, Constant((1.0,)))}, base.name)
        native.write(adapter, folder / f"small-{seed}")
        folders.append(folder / f"small-{seed}")
    return folders


def touched_bytes(adapter: Adapter, share: float) -> float:
    """Bytes of a bfloat16 serving copy that a step reads if `share` of the experts are touched.

    Routers are float32 and always read whole.
    """
    total = 0.0
    for mixture in adapter.sites.values():
        stacks = []
        if isinstance(mixture, LinearMixture):
            stacks = [mixture.experts]
        elif isinstance(mixture, FfnMixture):
            stacks = list(mixture.experts.values())
        total += sum(2 * (pair.a.numel() + pair.b.numel()) for pair in stacks) * share
        total += 4 * mixture.router.numel() if mixture.router is not None else 0
    return total
