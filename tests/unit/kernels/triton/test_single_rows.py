"""Steps in which many adapters have a row or two each: routed first, against the definition."""

from dataclasses import replace

import pytest
import torch
from support import native
from support.triton_cases import (
    CAPACITY,
    assert_close,
    backend,
    ffn_experts,
    ffn_piece,
    ffn_setup,
    ffn_weights,
    mixture,
    piece,
    random,
    rounded,
    run_ffn,
)

from molehill.kernels import reference
from molehill.kernels.interface import LinearShape, Run, SlotWeights
from molehill.kernels.mixture import FfnMixture
from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK
from molehill.kernels.triton import gate, tiling
from molehill.kernels.triton.layout import ROUTE_FIRST

pytestmark = pytest.mark.usefixtures("interpreted")

MANY = replace(CAPACITY, adapters=6, slots=6)


def routes_first(serving) -> bool:
    return serving._steps[ROUTE_FIRST.value].item() == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_of_a_row_each_agree_with_the_definition(dtype) -> None:
    """Every kind of piece, beside an adapter of more rows, which keeps its large tile."""
    features, out = 1100, 40
    mixtures = [
        mixture(TopK(1), (3, 1, 20), features, out, seed=1),
        mixture(DynMoLE(top_p=0.5, keep_top_k=1), (8, 8), features, out, seed=2),
        mixture(Constant((0.5, -1.0)), (2, 9), features, out, seed=3),
        mixture(Soft(), (1,) * 5, features, out, seed=4),
        replace(
            mixture(TopK(1), (4, 2), features, out, seed=5),
            shared=mixture(Constant((1.0,)), (3,), features, out, seed=6).experts,
        ),
    ]
    serving = backend(MANY)
    handle = serving.register_linear(LinearShape("linear", features, out, dtype))
    for slot, linear_mixture in enumerate(mixtures):
        served = replace(piece(linear_mixture), shared=linear_mixture.shared)
        serving.store(slot, SlotWeights({handle: [served]}, {}))
    x = random(10, features, seed=8).to(dtype)
    weight = random(out, features, seed=7, scale=features**-0.5).to(dtype)
    y = (x.float() @ weight.float().T).to(dtype)
    expected = y.clone().float()
    runs = [Run(slot, slot, slot + 1) for slot in range(4)] + [Run(0, 4, 5), Run(4, 6, 9)]
    serving.begin_step(runs)
    assert routes_first(serving)
    serving.linear(y, x, handle)
    for run in runs:
        part = slice(run.start, run.stop)
        linear_mixture = rounded(mixtures[run.slot], dtype)
        if linear_mixture.shared is not None:
            linear_mixture = replace(
                linear_mixture,
                shared=rounded(
                    replace(linear_mixture, experts=linear_mixture.shared), dtype
                ).experts,
            )
        expected[part] = reference.linear_mixture(x[part], weight, None, linear_mixture)[0].float()
    assert_close(y, expected)
    assert torch.equal(y[[5, 9]].float(), expected[[5, 9]])
    for slot, linear_mixture in enumerate(mixtures):
        if linear_mixture.router is not None:
            rows = [row for run in runs if run.slot == slot for row in range(run.start, run.stop)]
            w = reference.route(
                x[rows],
                linear_mixture.router,
                linear_mixture.policy,
                len(linear_mixture.experts.ranks),
            ).weights
            site = serving.counters(slot).sites["site"]
            assert (site.decisions, site.expert_tokens) == (len(rows), (w > 0).sum(0).tolist())


@pytest.mark.slow
@pytest.mark.skipif(native.is_here(), reason="reads the kernel's masks in the interpreter")
def test_a_of_experts_that_are_not_chosen_is_not_read(monkeypatch) -> None:
    """What the rank rows' product is asked for: its masks, and that it ends at once without any."""
    asked = []
    project_one = gate.project_one

    def recorded(x, weights, wanted, begin, end, BLOCK_IN):
        asked.append((int(wanted.handle.data.sum()), int(end.handle.data.item())))
        return project_one(x, weights, wanted, begin, end, BLOCK_IN)

    monkeypatch.setattr(gate, "project_one", recorded)
    serving = backend(MANY)
    handle = serving.register_linear(LinearShape("linear", 20, 16))
    x, rows = random(4, 20, seed=8), 0
    for slot in range(4):
        linear_mixture = mixture(TopK(1), (9, 16), 20, 16, seed=10 * slot)
        w = reference.route(
            x[slot : slot + 1], linear_mixture.router, linear_mixture.policy, 2
        ).weights[0]
        rows += int((w[linear_mixture.experts.expert_of_row] > 0).sum())
        serving.store(slot, SlotWeights({handle: [piece(linear_mixture)]}, {}))
    serving.begin_step([Run(slot, slot, slot + 1) for slot in range(4)])
    serving.begin_linear(x, handle)
    assert sum(wanted for wanted, _ in asked) == rows
    assert {end for wanted, end in asked if not wanted} == {0}
    assert {end for wanted, end in asked if wanted} == {20}


@pytest.mark.slow
def test_scaled_and_odd_pieces_of_single_rows_agree_with_the_formula() -> None:
    """A piece that begins and ends at odd columns, one of them with an output scale."""
    serving = backend(MANY)
    handle = serving.register_linear(LinearShape("linear", 20, 90))
    linear_mixture, scale = mixture(TopK(1), (2, 3), 20, 83), 1 + random(2, 83, seed=4, scale=0.3)
    for slot in range(4):
        scaled = replace(piece(linear_mixture, start=3), output_scale=scale if slot % 2 else None)
        serving.store(slot, SlotWeights({handle: [scaled]}, {}))
    x, base = random(4, 20, seed=8), random(4, 90, seed=9)
    y = base.clone()
    serving.begin_step([Run(slot, slot, slot + 1) for slot in range(4)])
    serving.linear(y, x, handle)
    w = reference.route(x, linear_mixture.router, linear_mixture.policy, 2).weights
    expected = base.clone()
    expected[1::2, 3:86] *= (w @ scale)[1::2]
    rows = (x @ linear_mixture.experts.a.T) * w[:, linear_mixture.experts.expert_of_row]
    expected[:, 3:86] += rows @ linear_mixture.experts.b.T
    assert_close(y, expected)


@pytest.mark.slow
def test_ffn_mixtures_of_single_rows_agree_with_the_definition() -> None:
    d, width = 24, 40
    weights = ffn_weights(d, width, torch.float32)
    serving, handle, linears = ffn_setup(d, width, torch.float32, MANY)
    names = ("gate_proj", "up_proj", "down_proj")
    x, mixtures = random(4, d, seed=25), []
    for slot in range(4):
        ffn_mixture = FfnMixture(
            ffn_experts(names, d, width, 3), TopK(2), random(3, d, seed=40 + slot)
        )
        mixtures.append(ffn_mixture)
        serving.store(slot, SlotWeights({}, {handle: ffn_piece(ffn_mixture, random(d, seed=23))}))
    serving.begin_step([Run(slot, slot, slot + 1) for slot in range(4)])
    assert routes_first(serving)
    bias = random(d, seed=23)
    y = run_ffn(serving, handle, linears, weights, x, bias)
    biases = {"gate_proj": None, "up_proj": None, "down_proj": bias}
    for slot, ffn_mixture in enumerate(mixtures):
        row = slice(slot, slot + 1)
        assert_close(y[row], reference.ffn_mixture(x[row], weights, biases, "silu", ffn_mixture)[0])


def test_few_adapters_are_not_routed_first() -> None:
    serving = backend(MANY)
    handle = serving.register_linear(LinearShape("linear", 16, 16))
    for slot in range(tiling.ROUTE_FIRST_ROWS):
        linear_mixture = mixture(TopK(1), (2, 2), 16, 16, seed=slot)
        serving.store(slot, SlotWeights({handle: [piece(linear_mixture)]}, {}))
    runs = [Run(slot, slot, slot + 1) for slot in range(tiling.ROUTE_FIRST_ROWS)]
    serving.begin_step(runs[:-1])
    assert not routes_first(serving)
    serving.begin_step(runs)
    assert routes_first(serving)
