"""What the C++ library and the Triton kernels make of a policy, and of one that they lack."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import pytest
import torch
from support.backend_cases import experts, router
from support.triton_cases import CAPACITY
from support.triton_cases import CPU as DEVICE

from molehill.kernels.cpu import CpuBackend
from molehill.kernels.cpu.policy_codec import encode
from molehill.kernels.interface import CapacityError, LinearPiece, LinearShape, SlotWeights
from molehill.kernels.policy import (
    POLICIES,
    AdaMoLE,
    Constant,
    DynMoLE,
    FlyLoRA,
    JsonFields,
    Policy,
    Routing,
    Soft,
    TopK,
)
from molehill.kernels.triton.backend import TritonBackend

INPUTS, OUT, RANKS = 8, 12, (2, 1, 2)
TOP_K = {"k": [2.0], "normalize": [1.0]}
FLYLORA = {"k": [1.0], "experts": [3.0], "parameters": [0.0] * 3}
DYNMOLE = encode(DynMoLE(), None)[1]


@dataclass(frozen=True)
class OnlyInPython(Policy):
    """A policy that has no entry in a backend."""

    sharpness: float = 2.0

    @classmethod
    def from_json(cls, fields: JsonFields) -> Self:
        return cls(fields.number("sharpness"))

    @property
    def sums_to_one(self) -> bool:
        return True

    def route(self, probabilities: torch.Tensor) -> Routing:
        return Soft().route(probabilities)


@pytest.mark.parametrize(
    ("policy", "parameters", "expected"),
    [
        (Constant((0.5, 1.0)), None, {"weights": [0.5, 1.0]}),
        (Soft(), None, {}),
        (TopK(2), None, TOP_K),
        (AdaMoLE(0.5), torch.tensor([0.25]), {"max_threshold": [0.5], "parameters": [0.25]}),
        (
            FlyLoRA(1, experts=2),
            torch.tensor([0.5, -1.0]),
            {"k": [1.0], "experts": [2.0], "parameters": [0.5, -1.0]},
        ),
    ],
    ids=str,
)
def test_fields_go_by_their_names(policy, parameters, expected):
    assert encode(policy, parameters) == (type(policy).__name__, expected)


def test_a_choice_is_a_field_of_its_own():
    assert DYNMOLE.keys() == {
        "entropy_type=tsallis",
        *(f.name for f in dataclasses.fields(DynMoLE) if f.name != "entropy_type"),
    }


def test_the_library_has_a_class_for_every_policy():
    CpuBackend()
    assert set(torch.ops.molehill_cpu.policies()) == set(POLICIES)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("TopK", {"k": [2.0]}, "TopK: no field normalize"),
        ("TopK", {**TOP_K, "temperature": [1.0]}, "TopK: unknown field temperature"),
        ("TopK", {**TOP_K, "k": []}, "TopK: k has 0 numbers, expected 1"),
        ("TopK", {**TOP_K, "k": [1.0, 2.0]}, "TopK: k has 2 numbers, expected 1"),
        ("AdaMoLE", {"max_threshold": [0.5]}, "AdaMoLE: no field parameters"),
        ("FlyLoRA", {**FLYLORA, "parameters": [0.0]}, "parameters has 1 numbers, expected 3"),
        ("FlyLoRA", {**FLYLORA, "experts": [2.0], "parameters": [0.0] * 2}, "biases of 2 experts"),
        ("DynMoLE", {**DYNMOLE, "entropy_type=shannon": []}, "unknown field entropy_type=shannon"),
        ("Sharp", {}, "unknown policy Sharp"),
        ("Constant", {"weights": [0.5] * 3}, "Constant beside a router"),
    ],
)
def test_the_library_takes_every_field_and_no_other(name, fields, message):
    backend = CpuBackend()
    linear = backend.register_linear(LinearShape("linear", INPUTS, OUT))
    ops, pair = torch.ops.molehill_cpu, experts(INPUTS, OUT, RANKS)
    ticket = ops.stage(backend._id, 0)
    extra = 1 if name == "AdaMoLE" else 0
    gate = router(len(RANKS) + extra, INPUTS)
    none = (None, None, None)
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.pack_linear(ticket, linear, 0, 0, 0, pair.a, pair.b, RANKS, name, fields, gate, *none)
    ops.drop(backend._id, ticket)


@pytest.mark.parametrize("make", [CpuBackend, lambda: TritonBackend(DEVICE, CAPACITY)])
def test_a_policy_that_a_backend_lacks_is_refused_by_its_name(make):
    backend = make()
    linear = backend.register_linear(LinearShape("linear", INPUTS, OUT))
    gate = router(len(RANKS), INPUTS)
    piece = LinearPiece("q", 0, experts(INPUTS, OUT, RANKS), OnlyInPython(), gate)
    with pytest.raises(CapacityError, match=r"q: found the policy OnlyInPython\(sharpness=2.0\)"):
        backend.store(0, SlotWeights({linear: [piece]}, {}))
    assert backend.resident_bytes(0) == 0
