"""Tiny bases in fewer bits, as their quantisers save them, and the same on Transformers.

The definition: a linear multiplies by the numbers that its bits stand for, and, where its scheme
says so, reads inputs that are rounded to int8. Transformers' model has these numbers for weights,
and rounds the inputs of each base linear; an adapter beside it reads them as they are.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.hra.layer import HRALinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GROUP = 32
# Of int8 weights: with more, oneDNN's sums of two products overflow on x86 without VNNI.
MOST = 63

# A weight `[out, in]` to its tensors by suffix, and what they stand for.
Packed = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Scheme:
    """pack: a weight to its tensors. config: `quantization_config` of config.json. dtype: what the
    base is computed in. inputs: to int8 by the row, by a fixed scale of each input, or not.
    four_bits: whether its kernel needs AVX-512 on x86."""

    pack: Callable[[Tensor], Packed]
    config: Mapping[str, Any]
    dtype: str
    inputs: str = ""
    four_bits: bool = False


def _int8(w: Tensor) -> Packed:
    scale = w.abs().amax(1, keepdim=True) / MOST
    q = (w / scale).round()
    return {"weight": q.to(torch.int8), "weight_scale": scale}, q * scale


def _by_group(w: Tensor, zero: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers from 0 to 15 `[in, out]`, what stands for zero and scales `[groups, out]`, which
    float16 and bfloat16 both have."""
    groups = w.T.view(-1, GROUP, w.shape[0])
    least = groups.amin(1).clamp(max=0) if zero else -groups.abs().amax(1)
    most = groups.amax(1).clamp(min=0) if zero else groups.abs().amax(1)
    scale = ((most - least) / 15).bfloat16().float()
    middle = (-least / scale).round().clamp(0, 15) if zero else torch.full_like(scale, 8)
    q = (groups / scale[:, None] + middle[:, None]).round().clamp(0, 15)
    return q.view(w.T.shape).int(), middle.int(), scale


def _numbers(q: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
    """W `[out, in]`, float32."""
    zeros, scales = zero.repeat_interleave(GROUP, 0), scale.repeat_interleave(GROUP, 0)
    return ((q - zeros) * scales).T.contiguous()


def _pack(q: Tensor, dim: int, order: Sequence[int] = range(8)) -> Tensor:
    """Eight numbers of `dim` in one int32, in this order from the lowest bits on."""
    eights = q.unflatten(dim, (-1, 8)).movedim(dim + 1, 0)
    return torch.stack([eights[n].long() << 4 * i for i, n in enumerate(order)]).sum(0).int()


def _awq(w: Tensor) -> Packed:
    q, zero, scale = _by_group(w, zero=True)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {"qweight": _pack(q, 1, order), "qzeros": _pack(zero, 1, order)}
    return {**tensors, "scales": scale.half()}, _numbers(q, zero, scale)


def _gptq(w: Tensor) -> Packed:
    q, zero, scale = _by_group(w, zero=False)
    tensors = {"qweight": _pack(q, 0), "qzeros": _pack(zero - 1, 1), "scales": scale.half()}
    tensors["g_idx"] = torch.arange(len(q), dtype=torch.int32) // GROUP
    return tensors, _numbers(q, zero, scale)


def _w4a16(w: Tensor) -> Packed:
    q, zero, scale = _by_group(w, zero=False)
    tensors = {"weight_packed": _pack(q.T.contiguous(), 1), "weight_scale": scale.T.bfloat16()}
    tensors["weight_shape"] = torch.tensor(w.shape)
    return tensors, _numbers(q, zero, scale)


def _compressed(form: str, weights: Mapping[str, Any], **inputs: Any) -> dict[str, Any]:
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {"type": "int", **weights}}
    if inputs:
        group["input_activations"] = {"type": "int", "num_bits": 8, "symmetric": True, **inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


_BY_CHANNEL = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
_BY_4_BITS = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": GROUP}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(
        _int8,
        _compressed("int-quantized", _BY_CHANNEL, strategy="token", dynamic=True),
        "float32",
        "rows",
    ),
    "int8-fixed": Scheme(
        _int8,
        _compressed("int-quantized", _BY_CHANNEL, strategy="tensor", dynamic=False),
        "float32",
        "fixed",
    ),
    "w4a16": Scheme(_w4a16, _compressed("pack-quantized", _BY_4_BITS), "bfloat16", four_bits=True),
    "awq": Scheme(_awq, {**_AWQ, "version": "gemm"}, "bfloat16", four_bits=True),
    "gptq": Scheme(_gptq, _GPTQ, "bfloat16", four_bits=True),
}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Those inside the layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if ".layers." in name and isinstance(module, nn.Linear)
    }


class RoundedInputs:
    """A hook before a base linear that rounds what it reads to int8."""

    def __init__(self, scale: float | None) -> None:
        self._scale = scale

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = args[0]
        scale = x.abs().amax(-1, keepdim=True) / 127 if self._scale is None else self._scale
        return ((x / scale).round().clamp(-128, 127) * scale,)


def input_scales(model: nn.Module, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Of each linear's inputs, such that those of these prompts fit."""
    greatest: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def seen(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            greatest[name] = max(greatest.get(name, 0.0), args[0].abs().max().item())

        return seen

    hooks = [
        module.register_forward_pre_hook(watch(name)) for name, module in linears(model).items()
    ]
    with torch.no_grad():
        for prompt in prompts:
            model(torch.tensor([list(prompt)]))
    for hook in hooks:
        hook.remove()
    return {name: value / 127 for name, value in greatest.items()}


def quantise(
    scheme: Scheme, source: Path, model: nn.Module, target: Path, prompts: Sequence[Sequence[int]]
) -> Path:
    """Writes the base of `source` as `scheme` has it, and makes `model`, the same on Transformers,
    what that stands for. prompts: whose inputs fit into fixed scales."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    scales = input_scales(model, prompts) if scheme.inputs == "fixed" else {}
    for name, linear in linears(model).items():
        packed, numbers = scheme.pack(tensors.pop(f"{name}.weight"))
        linear.weight.data = numbers
        if name in scales:
            packed["input_scale"] = torch.tensor([scales[name]])
        if scheme.inputs:
            linear.register_forward_pre_hook(RoundedInputs(scales.get(name)))
        tensors |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in packed.items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = dict(scheme.config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def adapters(model: nn.Module, directory: Path) -> Iterator[tuple[str, nn.Module]]:
    """Names of PEFT's adapters, each saved below `directory`, and the model with it, until the
    next is asked for."""
    import peft

    rank = {"r": 3, "lora_alpha": 5, "use_rslora": True, "task_type": "CAUSAL_LM"}
    configs = {
        "lora": peft.LoraConfig(target_modules="all-linear", **rank),
        "dora": peft.LoraConfig(target_modules="all-linear", use_dora=True, **rank),
        "hra": peft.HRAConfig(r=3, target_modules=["q_proj", "o_proj", "down_proj"]),
    }
    for name, config in configs.items():
        torch.manual_seed(11)
        wrapped: Any = peft.get_peft_model(model, config)
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.25)
            elif "hra_u" in key:
                parameter.data += 0.3 * torch.randn(parameter.shape)
        wrapped.eval().save_pretrained(directory / name)
        layers: list[Any] = [m for m in wrapped.modules() if isinstance(m, HRALinear)]
        for layer in layers:
            layer.forward = _reflected(layer)
        yield name, wrapped
        wrapped.unload()


def _reflected(layer: Any) -> Callable[[Tensor], Tensor]:
    """W R x as W x + W (R - 1) x, of which only the first has the base's rounded inputs; PEFT
    multiplies W and R."""
    base = layer.get_base_layer()
    rotation = layer.get_delta_weight("default").detach()
    change = base.weight @ (rotation - torch.eye(len(rotation)))
    return lambda x: base(x) + nn.functional.linear(x, change)
