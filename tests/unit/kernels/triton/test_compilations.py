"""What is launched at start leaves no kernel to be compiled later; and what is, is counted."""

import logging
from importlib import import_module
from pkgutil import iter_modules
from types import SimpleNamespace

import pytest
import torch
from support.triton_cases import CPU
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from molehill.engine.vllm.model import warmup
from molehill.kernels import triton as package
from molehill.kernels.interface import UNSERVED, BaseActivation, FfnShape, LinearShape, Run
from molehill.kernels.pytorch.backend import TorchBackend
from molehill.kernels.triton.backend import TritonBackend
from molehill.kernels.triton.compilations import Compilations
from molehill.kernels.triton.launch_config import Capacity

TARGET = make_backend(GPUTarget("cuda", 90, 32))


class Launcher:
    """In a kernel's place, finds out what Triton would compile it for, as Triton's own launcher
    does on a GPU, and launches nothing."""

    def __init__(self, kernel: JITFunction, compiled: set) -> None:
        self._kernel, self._compiled = kernel, compiled
        self._bind = create_function_from_signature(kernel.signature, kernel.params, TARGET)

    def __getitem__(self, grid):
        def launch(*args, **options):
            bound, specialisation, rest = self._bind(*args, **options)
            constants = [
                (n, bound[n])
                for n, p in zip(bound, self._kernel.params, strict=True)
                if p.is_constexpr
            ]
            key = self._kernel.fn.__name__, specialisation, constants, sorted(rest.items())
            self._compiled.add(str(key))

        return launch


@pytest.fixture
def compiled(monkeypatch) -> set:
    """What has been launched, and would have been compiled for it."""
    result: set[str] = set()
    for info in iter_modules(package.__path__):
        module = import_module(f"{package.__name__}.{info.name}")
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Launcher(value, result))
    return result


MOST = 400
STEPS = [*range(1, 36), *range(40, 250, 23), *range(254, 260), *range(263, MOST, 29), MOST]
SILU = BaseActivation("silu", is_rounded=False)
# (in, out) of the fused linears of two layers. One whose widths are no multiples of 16.
WIDTHS = {"qkv": (64, 96), "o": (64, 64), "gate_up": (64, 176), "down": (88, 64), "odd": (72, 40)}


def serving(dtype: torch.dtype):
    backend = TritonBackend(CPU, Capacity(adapters=4, tokens=MOST, memory=1 << 12))
    linears, ffns = {}, {}
    for layer in range(2):
        for name, (inputs, outputs) in WIDTHS.items():
            shape = LinearShape(f"{layer}.{name}", inputs, outputs, dtype)
            linears[backend.register_linear(shape)] = shape
        handle = {shape.name: handle for handle, shape in linears.items()}
        linear = handle[f"{layer}.gate_up"], handle[f"{layer}.down"]
        ffn = FfnShape(f"{layer}.mlp", *linear, 88, (None, SILU)[layer])
        ffns[backend.register_ffn(ffn)] = ffn
    backend.seal()
    return backend, linears, ffns


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_steps_of_any_length_compile_nothing_after_the_warm_up(compiled, dtype) -> None:
    backend, linears, ffns = serving(dtype)
    warmup.run(backend, linears, ffns, MOST)
    ready = set(compiled)
    assert ready
    with torch.inference_mode():
        for tokens in STEPS:
            backend.begin_step([Run(UNSERVED, 0, tokens)])
            for handle, shape in linears.items():
                x = torch.empty(tokens, shape.in_features, dtype=dtype)
                backend.linear(torch.empty(tokens, shape.out_features, dtype=dtype), x, handle)
            for handle, shape in ffns.items():
                gate_up = torch.empty(tokens, 176, dtype=dtype)
                run = backend.ffn if shape.activation is None else backend.activate
                run(torch.empty(tokens, shape.intermediate, dtype=dtype), gate_up, handle)
    assert not sorted(compiled - ready)


def test_the_launcher_sees_what_triton_would_compile_anew(compiled) -> None:
    """Or the test above could not fail."""
    backend, linears, _ = serving(torch.float32)
    for tokens in (16, 300):
        backend.begin_step([Run(UNSERVED, 0, tokens)])
        shape = linears[0]
        backend.begin_linear(torch.empty(tokens, shape.in_features), 0)
        if tokens == 16:
            before = len(compiled)
    assert len(compiled) > before > 0


def test_token_counts_go_up_to_the_longest_step() -> None:
    assert warmup.token_counts(1) == [1]
    counts = warmup.token_counts(MOST)
    assert counts == sorted(set(counts))
    assert (counts[0], counts[-1]) == (1, MOST)
    assert {15, 16, 17, 255, 256, 257, 272} <= set(counts)


def test_a_late_compilation_of_our_kernels_is_counted_and_told(caplog) -> None:
    compilations = Compilations()
    ours = SimpleNamespace(module=f"{package.__name__}.expand", name="expand_kernel")
    compilations.note(ours)
    assert compilations.late == 0
    compilations.expect_none()
    with caplog.at_level(logging.WARNING, logger="vllm.molehill.kernels"):
        logging.getLogger("vllm.molehill.kernels").addHandler(caplog.handler)
        try:
            compilations.note(ours)
            compilations.note(SimpleNamespace(module="vllm.attention", name="kernel"))
        finally:
            logging.getLogger("vllm.molehill.kernels").removeHandler(caplog.handler)
    assert compilations.late == 1
    assert "expand_kernel was compiled while requests waited" in caplog.text


def test_triton_tells_of_compilations_and_an_earlier_hook_still_hears_them(monkeypatch) -> None:
    from triton import knobs

    heard = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **event: heard.append(event))
    compilations = TritonBackend(CPU, Capacity(adapters=1, tokens=8)).watch_compilations()
    compilations.expect_none()
    ours = SimpleNamespace(module=f"{package.__name__}.gate", name="gate_kernel")
    knobs.runtime.jit_post_compile_hook(fn=ours, key="", repr="", compile={})
    assert compilations.late == 1
    assert [event["fn"] for event in heard] == [ours]


def test_a_backend_that_compiles_nothing_at_run_time_has_none_to_count() -> None:
    assert TorchBackend().watch_compilations() is None
