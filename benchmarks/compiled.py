"""Compiles the Triton kernels for CUDA architectures on a machine without a GPU.

Registers, spills, stack and shared memory are what ptxas reports for the code that would run.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from molehill.kernels.triton import layout as at
from molehill.kernels.triton.activate import activate_kernel
from molehill.kernels.triton.expand import PART, expand_kernel
from molehill.kernels.triton.ffn import ffn_kernel
from molehill.kernels.triton.gate import gate_kernel
from molehill.kernels.triton.launch_config import MAX_REGISTERS, Capacity, launch_config_for
from molehill.kernels.triton.shrink import shrink_kernel

# A step of each kind, tokens: a decode step and a prefill step.
STEPS = {"decode": 32, "prefill": 4096}
ELEMENTS = {"bf16": 2, "fp16": 2, "fp32": 4}
ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Specialisation:
    """One kernel for one dtype, kind of step and number of splits."""

    kernel: Any
    dtype: str
    step: str
    features: int
    capacity: Capacity

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__).removesuffix("_kernel")

    @property
    def constants(self) -> dict[str, Any]:
        tokens = STEPS[self.step]
        config = launch_config_for(tokens, self.capacity)
        precise = self.dtype == "fp32"
        kernel: Any = self.kernel
        shared: dict[str, Any] = {"LIST": config.tile_list, "ORDER": config.order}
        shared |= {"TILE": config.tile, "MAX_GATES": config.max_gates}
        if kernel is not expand_kernel:
            shared["MAX_RANK"] = config.max_rank
        if kernel is not shrink_kernel:
            shared["MAX_FINISHED"] = config.max_finished
        if kernel is not ffn_kernel:
            shared["SINGLE"] = config.single
        pairs: dict[str, Any] = {"PAIR_TILE": 16 if precise else config.pair_tile}
        pair_rank = 16 if precise else config.ffn_rank
        pair_block = config.ffn_columns // (2 if precise else 1)
        if kernel is not gate_kernel:
            shared["PRECISION"] = "ieee" if precise else "tf32"
        if kernel is shrink_kernel:
            return shared | {
                "SPLITS": config.splits(tokens, self.features),
                "BLOCK_IN": config.inputs // (2 if precise else 1),
                "BLOCK_RANK": config.rank,
                "BLOCK_GATES": config.gates,
                "RANK_PROGRAMS": config.rank_programs,
                "GATE_PROGRAMS": config.gate_programs,
                "HALVES": not precise,
            }
        if kernel is gate_kernel:
            return shared | {
                "SPLITS": config.splits(tokens, self.features),
                "LOGIT_SPLITS": config.splits(tokens, self.features),
                "MAX_EXPERTS": config.max_experts,
                "MAX_PIECES": config.max_pieces,
                "COUNTERS": config.counters,
                "BLOCK_RANK": config.route_rank,
                "SINGLE_RANK": config.single_rank,
                "SINGLE_IN": config.single_inputs // (2 if precise else 1),
                "MIXED": False,
                "PAIRS": True,
                "TRACE": False,
            }
        if kernel is expand_kernel:
            columns = min(config.columns, PART) if precise else config.columns
            return shared | {
                "MAX_PIECES": config.max_pieces,
                "BLOCK_RANK": config.expand_rank,
                "BLOCK_OUT": columns,
                "PART": min(columns, PART),
            }
        shared |= pairs | {"MAX_EXPERTS": config.max_experts}
        if kernel is activate_kernel:
            return shared | {
                "MAX_PIECES": config.max_pieces,
                "BLOCK_RANK": config.expand_rank,
                "BLOCK": config.activate_columns // (2 if precise else 1),
                "PAIR_RANK": pair_rank,
                "PAIR_BLOCK": pair_block,
                # As the definition in torch that vLLM compiles, of the commonest.
                "ACTIVATION": at.SILU.value,
                "ROUNDED": False,
            }
        return shared | {"BLOCK_RANK": pair_rank, "BLOCK": pair_block}

    @property
    def options(self) -> dict[str, int]:
        config = launch_config_for(STEPS[self.step], self.capacity)
        warps = {
            shrink_kernel: config.shrink_warps,
            gate_kernel: config.gate_warps,
            expand_kernel: config.expand_warps,
            ffn_kernel: config.ffn_warps,
            activate_kernel: config.activate_warps,
        }
        stages = {shrink_kernel: 3, gate_kernel: 1}
        return {
            "num_warps": warps[self.kernel],
            "num_stages": stages.get(self.kernel, 2),
            "maxnreg": MAX_REGISTERS,
        }


# Pointers by argument name; every other argument is a 32-bit integer.
SERVING = {"x", "out", "h", "gate_up", "weights", "finished"}
POINTERS = {
    **dict.fromkeys(("heads", "pieces", "records", "counters"), "*i64"),
    **dict.fromkeys(("steps", "owners", "ints", "pairs"), "*i32"),
    **dict.fromkeys(
        ("routers", "rows", "logits", "gates", "floats", "parameters", "strips", "trace"), "*fp32"
    ),
}
# Integers that are no multiple of 16.
ODD = {"tokens", "parts", "tiles"}


@dataclass(frozen=True)
class Compiled:
    """What ptxas says. Shared memory and spills in bytes per program, registers per thread.

    instructions: of the machine code, each counted once.
    """

    registers: int
    spilled: int
    stack: int
    shared: int
    instructions: int


def specialisations(capacity: Capacity, features: int = 4096) -> Iterator[Specialisation]:
    for kernel in (shrink_kernel, gate_kernel, expand_kernel, ffn_kernel, activate_kernel):
        for step in STEPS:
            for dtype in ("bf16", "fp16", "fp32"):
                yield Specialisation(kernel, dtype, step, features, capacity)


def compile_for(specialisation: Specialisation, architecture: int) -> Compiled:
    """Raises whatever Triton or ptxas raise when the kernel does not compile."""
    constants = specialisation.constants
    names = [name for name in specialisation.kernel.arg_names if name not in constants]
    signature = {name: _type(name, specialisation.dtype) for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    indices = {name: i for i, name in enumerate(specialisation.kernel.arg_names)}
    attributes = {(indices[name],): [["tt.divisibility", 16]] for name in names if name not in ODD}
    source = ASTSource(
        specialisation.kernel,
        signature,
        {(indices[name],): value for name, value in constants.items()},
        attributes,
    )
    target = GPUTarget("cuda", architecture, 32)
    built = triton.compile(source, target=target, options=specialisation.options)
    report = _ptxas(built.asm["ptx"], architecture)
    numbers = [
        int(match.group(1)) if (match := re.search(pattern, report)) else 0
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes stack")
    ]
    registers, spilled, stack = numbers
    instructions = _instructions(built.asm["cubin"])
    return Compiled(registers, spilled, stack, built.metadata.shared, instructions)


def _type(name: str, dtype: str) -> str:
    return f"*{dtype}" if name in SERVING else POINTERS.get(name, "i32")


def _instructions(cubin: bytes) -> int:
    """SASS instructions by nvdisasm, the version that Triton brings; the padding is left out."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(binary)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(\S+)", done.stdout, re.MULTILINE)
    return sum(not line.startswith("NOP") for line in lines)


def _ptxas(ptx: str, architecture: int) -> str:
    """ptxas's verbose report. The version that Triton brings, chosen as Triton does."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = sm_arch_from_capability(architecture)
        command = [get_ptxas(architecture).path, "-v", f"-arch={target}", source.name]
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stderr
