"""The C++ backend's slots, its errors and its ops."""

import dataclasses
import gc
import os
import subprocess
import sys
import threading

import pytest
import torch
from support.backend_cases import assert_near, experts, piece_delta, random, router
from support.cpu_cases import one_linear

from molehill.kernels.cpu import BuildError, CpuBackend
from molehill.kernels.cpu.build import NoCompilerError
from molehill.kernels.interface import LinearPiece, LinearShape, Run, SlotWeights
from molehill.kernels.policy import Constant, Soft


def test_an_erased_slot_can_be_stored_again_and_leaves_no_bytes():
    inputs, out = 64, 64
    first = LinearPiece("q", 0, experts(inputs, out, [8] * 2), Soft(), router(2, inputs))
    second = LinearPiece("q", 0, experts(inputs, out, [8], 9), Constant((1.0,)))
    backend, handle = one_linear(inputs, out, [first], torch.float32)
    # A and B of 16 ranks, and a router padded to 8 experts.
    assert backend.resident_bytes(0) == 4 * (16 * 64 + 64 * 16 + 8 * 64)
    backend.begin_step([Run(0, 0, 2)])
    backend.erase(0)
    y, x = torch.ones(2, out), random(2, inputs)
    backend.linear(y, x, handle)
    assert y.count_nonzero() == 0
    assert backend.resident_bytes(0) == 0
    backend.store(0, SlotWeights({handle: [second]}, {}))
    assert backend.counters(0).tokens == 0
    backend.begin_step([Run(0, 0, 2)])
    backend.linear(y, x, handle)
    assert_near(y, piece_delta(x, second, torch.float32), torch.float32)


def test_adapters_are_packed_in_another_thread_while_steps_run():
    """What a step computes and what was packed beside it are both right."""
    inputs = out = 256
    pieces = [
        LinearPiece("q", 0, experts(inputs, out, [8] * 4, seed), Soft(), router(4, inputs))
        for seed in range(12)
    ]
    backend, handle = one_linear(inputs, out, [pieces[0]], torch.float32)
    x = random(4, inputs)
    packed, done = [], threading.Event()

    def pack() -> None:
        for piece in pieces[1:]:
            packed.append(backend.pack(SlotWeights({handle: [piece]}, {})))
        done.set()

    thread = threading.Thread(target=pack)
    thread.start()
    expected, steps = piece_delta(x, pieces[0], torch.float32), 0
    while not done.is_set() or not steps:
        backend.begin_step([Run(0, 0, 4)])
        y = torch.zeros(4, out)
        backend.linear(y, x, handle)
        assert_near(y, expected, torch.float32)
        steps += 1
    thread.join()
    assert len(packed) == 11
    for slot, slot_weights in enumerate(packed, 1):
        assert backend.resident_bytes(slot) == 0
        backend.store(slot, slot_weights)
    backend.begin_step([Run(slot, slot, slot + 1) for slot in range(1, 12)])
    rows = random(12, inputs)
    y = torch.zeros(12, out)
    backend.linear(y, rows, handle)
    for slot in range(1, 12):
        wanted = piece_delta(rows[slot : slot + 1], pieces[slot], torch.float32)
        assert_near(y[slot : slot + 1], wanted, torch.float32)


@pytest.mark.slow
def test_packed_weights_are_stored_once_and_go_with_their_object():
    piece = LinearPiece("q", 0, experts(64, 64, [8]), Constant((1.0,)))
    backend, handle = one_linear(64, 64, [piece], torch.float32)
    weights = SlotWeights({handle: [piece]}, {})
    packed = backend.pack(weights)
    backend.store(1, packed)
    with pytest.raises(RuntimeError, match="no staged slot"):
        backend.store(2, packed)
    assert backend.resident_bytes(2) == 0
    dropped = backend.pack(weights)
    number = dropped.layout.number
    del dropped
    gc.collect()
    with pytest.raises(RuntimeError, match="no staged slot"):
        torch.ops.molehill_cpu.store(backend._id, number, 2)
    assert backend.resident_bytes(1) > 0


def test_a_piece_that_does_not_fit_is_refused_and_the_slot_stays_empty():
    backend = CpuBackend()
    handle = backend.register_linear(LinearShape("linear", 16, 16))
    good = LinearPiece("q", 0, experts(16, 16, [2, 2]), Soft(), router(2, 16))
    broken = {
        "columns 8 to 24": dataclasses.replace(good, start=8),
        r"a: found \(4, 15\)": dataclasses.replace(good, experts=experts(15, 16, [2, 2])),
        r"router: found \(3, 16\)": dataclasses.replace(good, router=router(3, 16)),
        "constant weights: found 1, expected 2": dataclasses.replace(
            good, policy=Constant((1.0,)), router=None
        ),
        r"output_scale: found \(2, 15\)": dataclasses.replace(good, output_scale=random(2, 15)),
    }
    for message, piece in broken.items():
        with pytest.raises(ValueError, match=message):
            backend.store(0, SlotWeights({handle: [piece]}, {}))
    backend.store(0, SlotWeights({handle: [good]}, {}))
    with pytest.raises(ValueError, match="expected an empty slot"):
        backend.store(0, SlotWeights({handle: [good]}, {}))


def test_wrong_activations_are_an_error_and_no_crash():
    piece = LinearPiece("q", 0, experts(16, 16, [2]), Constant((1.0,)))
    backend, handle = one_linear(16, 16, [piece], torch.float32)
    backend.begin_step([Run(0, 0, 2)])
    with pytest.raises(RuntimeError, match=r"x: found Float \[2, 8\]"):
        backend.linear(torch.zeros(2, 16), torch.zeros(2, 8), handle)
    with pytest.raises(RuntimeError, match="out: found BFloat16"):
        backend.linear(torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(2, 16), handle)
    with pytest.raises(RuntimeError, match="no layer with handle"):
        backend.linear_op(torch.zeros(2, 16), torch.zeros(2, 16), torch.tensor([1 << 40]))


def test_rows_that_are_not_contiguous_are_read_and_written_in_place():
    piece = LinearPiece("q", 0, experts(16, 24, [4]), Constant((1.0,)))
    backend, handle = one_linear(16, 24, [piece], torch.float32)
    x, wide = random(16, 6).T, torch.zeros(6, 40)
    backend.begin_step([Run(0, 0, 6)])
    backend.linear(wide[:, 8:32], x, handle)
    transposed = torch.zeros(24, 6).T
    backend.linear(transposed, x, handle)
    expected = piece_delta(x, piece, torch.float32)
    assert_near(wide[:, 8:32], expected, torch.float32)
    assert_near(transposed, expected, torch.float32)
    assert wide[:, :8].count_nonzero() == wide[:, 32:].count_nonzero() == 0


@pytest.mark.slow
def test_the_ops_trace_under_torch_compile():
    piece = LinearPiece("q", 0, experts(16, 24, [4]), Constant((1.0,)))
    backend, handle = one_linear(16, 24, [piece], torch.float32)
    name, op = torch.tensor([handle]), backend.linear_op

    def model(x, weight):
        out = x @ weight.T
        op(out, x, name)
        return out * 2

    x, weight = random(3, 16), random(24, 16, seed=2)
    backend.begin_step([Run(0, 0, 3)])
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x, weight)
    expected = 2 * (x @ weight.T + piece_delta(x, piece, torch.float32))
    assert_near(y, expected, torch.float32)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="MOLEHILL_CPU_ISA: found 'sse9'"):
        CpuBackend(isa="sse9")


@pytest.mark.slow
def test_without_a_compiler_and_a_library_the_reason_is_told(tmp_path):
    # An installation may have a library beside the package.
    code = (
        "import pathlib, sys; from molehill.kernels.cpu import build; "
        "build.HERE = pathlib.Path(sys.argv[1]); build.load()"
    )
    environment = {**os.environ, "MOLEHILL_CACHE_DIR": str(tmp_path), "PATH": "", "CXX": ""}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode != 0
    assert b"NoCompilerError: no C++ compiler" in done.stderr
    assert issubclass(NoCompilerError, BuildError)
    assert issubclass(BuildError, RuntimeError)
