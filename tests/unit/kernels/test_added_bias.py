"""Biases that an adapter adds to a linear's output, on every backend."""

from dataclasses import replace

import pytest
import torch
from support import triton_cases
from support.backend_cases import assert_near, experts, random, rounded, router

from molehill.kernels.checks import WeightsError
from molehill.kernels.cpu import CpuBackend
from molehill.kernels.interface import LinearPiece, LinearShape, Run, SlotWeights
from molehill.kernels.mixture import Bias, Experts, LinearMixture
from molehill.kernels.policy import Constant, Soft, TopK
from molehill.kernels.pytorch.backend import TorchBackend
from molehill.kernels.reference import linear_mixture

INPUTS, OUT, MORE = 40, 48, 21
PLAIN = Constant((1.0,))
NOTHING = Experts(torch.zeros(0, INPUTS), torch.zeros(OUT, 0), (0,))


@pytest.fixture(params=["cpu", "torch", pytest.param("triton", marks=pytest.mark.gpu)])
def make(request):
    if request.param == "triton":
        request.getfixturevalue("interpreted")
        return triton_cases.backend
    return TorchBackend if request.param == "torch" else CpuBackend


def pieces_of(kind):
    """A mixture on the first projection. The second one has a bias by itself."""
    if kind == "bias alone":
        return LinearMixture(NOTHING, PLAIN)
    if kind == "pair":
        return LinearMixture(experts(INPUTS, OUT, [5], 1), PLAIN)
    policy = Soft() if kind == "soft" else TopK(1)
    return LinearMixture(experts(INPUTS, OUT, [2, 3], 2), policy, router(2, INPUTS))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["bias alone", "pair", "soft"])
def test_only_its_slots_rows_get_it(make, kind, dtype):
    mixture, backend = pieces_of(kind), make()
    served = replace(mixture, experts=rounded(mixture.experts, dtype))
    added = Bias(added=random(OUT, seed=3)), Bias(added=random(MORE, seed=4))
    handle = backend.register_linear(LinearShape("linear", INPUTS, OUT + MORE, dtype))
    plain = LinearPiece("q", 0, mixture.experts, mixture.policy, mixture.router)
    nothing = Experts(NOTHING.a, torch.zeros(MORE, 0), (0,))
    biased = [
        replace(plain, added_bias=added[0].added),
        LinearPiece("k", OUT, nothing, PLAIN, added_bias=added[1].added),
    ]
    backend.store(0, SlotWeights({handle: biased}, {}))
    backend.store(2, SlotWeights({handle: [plain]}, {}))
    rows = {0: [slice(1, 4), slice(7, 8)], 2: [slice(4, 6)], None: [slice(0, 1), slice(6, 7)]}
    x = random(9, INPUTS, seed=5).to(dtype)
    weight = random(OUT + MORE, INPUTS, seed=6, scale=INPUTS**-0.5).to(dtype)
    base = random(OUT + MORE, seed=7).to(dtype)
    y = (x.float() @ weight.float().T + base.float()).to(dtype)
    before = y.clone()
    backend.begin_step([Run(0, 1, 4), Run(2, 4, 6), Run(0, 7, 8)])
    backend.linear(y, x, handle)

    def expected(part, biases):
        first = linear_mixture(x[part], weight[:OUT], biases[0].whole(base[:OUT]), served)[0]
        second = x[part].float() @ weight[OUT:].float().T + biases[1].whole(base[OUT:])
        return torch.cat([first, second], dim=1)

    for part in rows[0]:
        assert_near(y[part], expected(part, added), dtype)
    for part in rows[2]:
        assert_near(y[part], expected(part, (Bias(), Bias())), dtype)
    for part in rows[None]:
        assert torch.equal(y[part], before[part])
    assert backend.resident_bytes(0) >= backend.resident_bytes(2) + 4 * (OUT + MORE)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [PLAIN, TopK(1)], ids=repr)
def test_it_is_outside_an_output_scale(make, policy):
    """DoRA's factor spares both biases, the base's and the added one."""
    count = 1 if policy is PLAIN else 2
    pair = experts(INPUTS, OUT, [2] * count, 2)
    gate = None if policy is PLAIN else router(2, INPUTS)
    scale = 1 + random(count, OUT, seed=4, scale=0.3)
    weight, base, added = random(OUT, INPUTS, seed=6), random(OUT, seed=7), random(OUT, seed=8)
    backend = make()
    handle = backend.register_linear(LinearShape("linear", INPUTS, OUT))
    piece = LinearPiece("q", 0, pair, policy, gate, scale, base, added_bias=added)
    backend.store(1, SlotWeights({handle: [piece]}, {}))
    x = random(6, INPUTS, seed=5)
    y = x @ weight.T + base
    backend.begin_step([Run(1, 0, 6)])
    backend.linear(y, x, handle)
    logits = torch.zeros(6, 1) if gate is None else x @ gate.T
    weights = torch.ones(6, 1) if gate is None else policy.decide(logits, None)[1].weights
    delta = (x @ pair.a.T * weights[:, pair.expert_of_row]) @ pair.b.T
    assert_near(y, x @ weight.T * (weights @ scale) + delta + base + added, torch.float32)


def test_one_that_does_not_fit_is_refused(make):
    backend = make()
    handle = backend.register_linear(LinearShape("linear", INPUTS, OUT))
    piece = LinearPiece("q", 0, NOTHING, PLAIN, added_bias=torch.ones(OUT + 1))
    with pytest.raises(WeightsError, match=r"q: added_bias: found \(49,\), expected \(48,\)"):
        backend.store(0, SlotWeights({handle: [piece]}, {}))
