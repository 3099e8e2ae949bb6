"""The Triton kernels compile for Hopper, and nothing spills. Needs no GPU, but Triton's ptxas."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from triton import knobs

from molehill.benchmarks.compiled import STEPS, specialisations
from molehill.kernels.interface import BaseActivation, FfnShape, LinearShape, Run
from molehill.kernels.triton import activate, expand, ffn, gate, shrink
from molehill.kernels.triton.backend import TritonBackend
from molehill.kernels.triton.launch_config import Capacity

MODULES = {
    "shrink": shrink,
    "gate": gate,
    "expand": expand,
    "ffn": ffn,
    "activate": activate,
}
NO_PTXAS = "neither Triton's package nor this machine has ptxas"


def has_ptxas() -> bool:
    try:
        return bool(knobs.nvidia.ptxas.path)
    except RuntimeError:
        return shutil.which("ptxas") is not None


@pytest.mark.slow
@pytest.mark.skipif(not has_ptxas(), reason=NO_PTXAS)
def test_kernels_compile_for_hopper_without_spills() -> None:
    """In a process of its own: kernels imported under TRITON_INTERPRET cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = [sys.executable, "-m", "molehill.benchmarks.launches"]
    command = [*script, "--compile", "90", "--dtype", "bf16", "--json"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    result = {(row["kernel"], row["step"]) for row in rows}
    assert result == {(kernel, step) for kernel in MODULES for step in ("decode", "prefill")}
    # Two programs of the largest fit in the 227 KB of a multiprocessor.
    assert all(row["spilled"] == 0 and row["shared"] <= 113 * 1024 for row in rows)
    assert all(row["registers"] <= 255 for row in rows)


class Launches:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, launched: list) -> None:
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launched.append(constants)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("step", sorted(STEPS))
def test_what_is_compiled_is_what_is_launched(step, dtype, monkeypatch) -> None:
    """The benchmark names the constants anew; they must be the launchers' own."""
    tokens, features = STEPS[step], 1024
    capacity = Capacity(adapters=8, tokens=tokens, memory=1 << 12)
    serving = TritonBackend(torch.device("cpu"), capacity)
    silu = BaseActivation("silu", is_rounded=False)
    ffns = []
    for activation in (None, silu):
        up = serving.register_linear(LinearShape("gate_up", features, 32, dtype))
        down = serving.register_linear(LinearShape("down", 16, features, dtype))
        ffns.append((up, serving.register_ffn(FfnShape("mlp", up, down, 16, activation))))
    launched: list = []
    for name, module in MODULES.items():
        monkeypatch.setattr(module, f"{name}_kernel", Launches(launched))
    x, h = torch.zeros(tokens, features, dtype=dtype), torch.zeros(tokens, 16, dtype=dtype)
    gate_up = torch.zeros(tokens, 32, dtype=dtype)
    serving.begin_step([Run(0, 0, tokens)])
    serving.linear(gate_up, x, ffns[0][0])
    serving.ffn(h, gate_up, ffns[0][1])
    serving.activate(h, gate_up, ffns[1][1])
    short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    expected = [
        {**specialisation.constants, **specialisation.options}
        for specialisation in specialisations(capacity, features)
        if (specialisation.step, specialisation.dtype) == (step, short)
    ]
    assert launched == expected
