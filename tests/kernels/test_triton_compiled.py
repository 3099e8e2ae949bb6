"""The Triton kernels compile for Hopper, and nothing spills. Needs no GPU, but Triton's ptxas."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from triton import knobs

NO_PTXAS = "neither Triton's package nor this machine has ptxas"


def has_ptxas() -> bool:
    try:
        return bool(knobs.nvidia.ptxas.path)
    except RuntimeError:
        return shutil.which("ptxas") is not None


@pytest.mark.skipif(not has_ptxas(), reason=NO_PTXAS)
def test_kernels_compile_for_hopper_without_spills() -> None:
    """In a process of its own: kernels imported under TRITON_INTERPRET cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = [sys.executable, "-m", "molehill.benchmarks.launches"]
    command = [*script, "--compile", "90", "--dtype", "bf16", "--json"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    found = {(row["kernel"], row["step"]) for row in rows}
    assert found == {(k, s) for k in ("shrink", "expand", "ffn") for s in ("decode", "prefill")}
    # Two programs of the largest fit in the 227 KB of a multiprocessor.
    assert all(row["spilled"] == 0 and row["shared"] <= 113 * 1024 for row in rows)
    assert all(row["registers"] <= 255 for row in rows)
