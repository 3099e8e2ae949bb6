"""Fixtures of the kernel tests."""

import numpy as np
import pytest
from support import native
from support.cpu_cases import thread_count, usable_isas
from triton import language as tl
from triton.experimental.gluon import language as gluon
from triton.language import standard
from triton.language.core import is_builtin
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    InterpreterOptions,
    TensorHandle,
)
from triton.runtime.jit import JITFunction

from molehill.kernels.cpu.backend import ISAS
from molehill.kernels.triton import (
    activate,
    activate_rows,
    activations,
    expand,
    ffn,
    gate,
    routing,
    shrink,
)


@pytest.fixture
def interpreted(request, monkeypatch) -> None:
    """Runs Triton kernels in Triton's interpreter, on CPU tensors, for one test; natively on a
    machine with a GPU. `pytest -m gpu` asks for the latter only.

    TRITON_INTERPRET=1 would do so only if it were set before anything imports Triton, and then for
    the whole process.
    """
    if native.is_here():
        return
    if request.config.option.markexpr == "gpu":
        pytest.skip(native.NO_GPU)
    # The interpreter imports gluon when it is first used, and gluon wants the compiled functions.
    assert gluon
    kernels = (routing, shrink, gate, expand, activations, activate_rows, ffn, activate)
    for module in (tl, standard, *kernels):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                monkeypatch.setattr(module, name, _Interpreted(value.fn))
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _create_dot)
    # Checks of integer overflow are computed, but only its debug mode looks at them.
    unchecked = InterpreterOptions(sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", unchecked)


class _Interpreted(InterpretedFunction):
    """Triton 3.9's interpreter looks for builtins of the language to replace whenever a kernel
    calls a function, which takes longer than the function, though the launch has replaced them."""

    def __call__(self, *arguments, **options):
        known = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
        if any(is_builtin(language.load) for language in known):
            return super().__call__(*arguments, **options)
        return self.rewrite()(*arguments, **options)


_interpreted_dot = InterpreterBuilder.create_dot


def _create_dot(self, a, b, *rest):
    """Triton 3.9's interpreter keeps bfloat16 as uint16 and multiplies those integers in tl.dot.
    Widened to float32, products are what the hardware computes."""
    return _interpreted_dot(self, _widened(a), _widened(b), *rest)


def _widened(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@pytest.fixture(params=ISAS)
def isa(request):
    if request.param not in usable_isas():
        pytest.skip(f"this processor does not run {request.param}")
    return request.param


@pytest.fixture(params=[1, 2], ids=["1_thread", "2_threads"])
def threads(request):
    with thread_count(request.param):
        yield request.param
