"""The Triton kernels for linear mixtures, run by Triton's interpreter, against the definition.

MOLEHILL_LONG_TESTS=1 runs the whole matrix of policies, shapes and dtypes: minutes, because the
interpreter runs every program in numpy.
"""

import itertools
import math
import os
from dataclasses import replace

import pytest
import torch
from support.triton_cases import (
    CAPACITY,
    assert_close,
    backend,
    mixture,
    piece,
    random,
    rounded,
)

from molehill.kernels import reference
from molehill.kernels.interface import UNSERVED, LinearPiece, LinearShape, Run, SlotWeights
from molehill.kernels.mixture import Experts, LinearMixture
from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK, TopP
from molehill.kernels.triton import tiling

pytestmark = pytest.mark.usefixtures("interpreted")


LONG = os.environ.get("MOLEHILL_LONG_TESTS") == "1"


POLICIES = [
    Soft(),
    TopK(1),
    TopK(2),
    TopK(1, normalize=False),
    TopP(0.6),
    TopP(0.9, temperature=0.7),
    TopP(1.0),
    DynMoLE(),
    DynMoLE(top_p=0.3, keep_top_k=1, entropy_threshold=2.0),
    DynMoLE(entropy_type="renyi", entropy_index=0.5, entropy_threshold=0.8),
    DynMoLE(entropy_index=1.0, entropy_threshold=0.7),
    DynMoLE(top_p=0.5, keep_top_k=1, normalize_weights=True),
    DynMoLE(top_p=0.5, keep_top_k=1, include_crossing=True),
    DynMoLE(normalize_entropy=False, entropy_index=1.5, entropy_threshold=0.5),
]


def check_linear(mixture: LinearMixture, tokens: int, dtype: torch.dtype = torch.float32) -> None:
    """One adapter on all rows but the first and the last, which are the base's."""
    features, out = mixture.experts.a.shape[1], mixture.experts.b.shape[0]
    capacity = CAPACITY if tokens <= CAPACITY.tokens else replace(CAPACITY, tokens=tokens)
    serving = backend(capacity)
    handle = serving.register_linear(LinearShape("linear", features, out, dtype))
    serving.store(1, SlotWeights({handle: [piece(mixture)]}, {}))
    weight = random(out, features, seed=7, scale=features**-0.5).to(dtype)
    x = random(tokens, features, seed=8).to(dtype)
    y = (x.float() @ weight.float().T).to(dtype)
    base = y.clone()
    serving.begin_step([Run(1, 1, tokens - 1)])
    serving.linear(y, x, handle)
    expected, routing = reference.linear_mixture(x[1:-1], weight, None, rounded(mixture, dtype))
    assert_close(y[1:-1], expected)
    assert torch.equal(y[[0, -1]], base[[0, -1]])
    counters = serving.counters(1)
    assert counters.tokens == tokens - 2
    if mixture.router is None:
        assert counters.sites == {}
        return
    site = counters.sites["site"]
    assert site.decisions == tokens - 2
    assert site.expert_tokens == (routing.weights > 0).sum(0).tolist()
    assert site.soft == routing.soft.sum()
    assert math.isclose(site.entropy, routing.entropy.sum(), rel_tol=1e-4, abs_tol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_every_policy_agrees_with_its_definition(policy) -> None:
    check_linear(mixture(policy, (4, 4, 4, 4, 4, 4), 40, 24), 18)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Constant((1.0,)), Constant((0.25, 0.5, -1.0))], ids=repr)
def test_constant_weights_agree_with_their_definition(policy) -> None:
    check_linear(mixture(policy, (5, 2, 3)[: len(policy.weights)], 40, 24), 5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_ties_go_to_the_lower_expert(policy) -> None:
    linear_mixture = mixture(policy, (2, 2, 2, 2), 16, 16)
    router = linear_mixture.router[[0, 1, 1, 0]] if linear_mixture.router is not None else None
    check_linear(replace(linear_mixture, router=router), 6)
    check_linear(replace(linear_mixture, router=torch.zeros(4, 16)), 4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "features", "out", "ranks"),
    [
        (3, 1, 1, (1,)),
        (5, 123, 123, (3, 1, 7)),
        (17, 64, 65, (16,) * 4),
        (3, 1100, 40, (2, 3)),
        (4, 33, 17, (1,) * 16),
        (19, 130, 70, (33,)),
    ],
)
def test_odd_shapes_agree_with_the_definition(tokens, features, out, ranks, dtype) -> None:
    check_linear(mixture(TopK(2), ranks, features, out), tokens, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_steps_agree_with_the_definition(dtype) -> None:
    check_linear(mixture(TopK(2), (4, 3), 30, 20), tiling.DECODE_TOKENS + 5, dtype)


@pytest.mark.slow
def test_more_rank_rows_and_routers_than_programs_agree_with_the_definition() -> None:
    """Programs take several blocks of rank rows and of router rows each."""
    capacity = replace(CAPACITY, rank=1024, gates=96, experts=32)
    mixtures = [mixture(TopK(3), (9,) * 32, 20, 24, seed=10 * i) for i in range(3)]
    serving = backend(capacity)
    handle = serving.register_linear(LinearShape("qkv", 20, 72))
    pieces = [piece(linear_mixture, 24 * i, str(i)) for i, linear_mixture in enumerate(mixtures)]
    serving.store(0, SlotWeights({handle: pieces}, {}))
    x, y = random(4, 20, seed=8), torch.zeros(4, 72)
    serving.begin_step([Run(0, 0, 4)])
    serving.linear(y, x, handle)
    nothing = torch.zeros(24, 20)
    expected = [
        reference.linear_mixture(x, nothing, None, linear_mixture)[0] for linear_mixture in mixtures
    ]
    assert_close(y, torch.cat(expected, dim=1))


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="minutes in the interpreter; MOLEHILL_LONG_TESTS=1 runs it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize(
    ("tokens", "shape"), list(itertools.product((3, 17, 300), ((123, 123), (576, 192))))
)
def test_the_whole_matrix_agrees_with_the_definition(tokens, shape, policy, dtype) -> None:
    for ranks in ((1,), (8, 8, 8), (1, 5, 2, 9, 1, 1, 1, 3), (2,) * 16):
        if dtype == torch.float32 or len(ranks) == 3:
            check_linear(mixture(policy, ranks, *shape), tokens, dtype)


@pytest.mark.slow
def test_fused_projections_keep_their_own_routers_and_columns() -> None:
    widths, features = (40, 24, 24), 48
    policies = (TopK(1), Constant((0.5, 0.5)), DynMoLE(top_p=0.5, keep_top_k=1))
    mixtures = [
        mixture(policy, (3, 2), features, width, seed=10 * i)
        for i, (policy, width) in enumerate(zip(policies, widths, strict=True))
    ]
    serving = backend()
    handle = serving.register_linear(LinearShape("qkv", features, sum(widths)))
    starts = [0, 40, 64]
    pieces = [
        piece(linear_mixture, start, str(start))
        for linear_mixture, start in zip(mixtures, starts, strict=True)
    ]
    serving.store(0, SlotWeights({handle: pieces}, {}))
    serving.store(2, SlotWeights({handle: pieces[2:]}, {}))
    weight = random(sum(widths), features, seed=7)
    x = random(9, features, seed=8)
    y = x @ weight.T
    expected = y.clone()
    serving.begin_step([Run(0, 0, 4), Run(2, 6, 9)])
    serving.linear(y, x, handle)
    for linear_mixture, start, width in zip(mixtures, starts, widths, strict=True):
        columns = slice(start, start + width)
        rows = [slice(0, 4), slice(6, 9)] if start == 64 else [slice(0, 4)]
        for part in rows:
            expected[part, columns] = reference.linear_mixture(
                x[part], weight[columns], None, linear_mixture
            )[0]
    assert_close(y, expected)
    assert torch.equal(y[4:6], expected[4:6])
    assert set(serving.counters(0).sites) == {"0", "64"}


@pytest.mark.slow
def test_adapters_of_every_kind_share_a_batch() -> None:
    """Interleaved runs, unequal ranks, E and policies, base and padding rows, an unserved one."""
    features, out = 50, 36
    mixtures = {
        0: mixture(TopK(2), (1, 4, 2), features, out, seed=1),
        1: mixture(Soft(), (3,) * 16, features, out, seed=2),
        3: mixture(Constant((1.0,)), (5,), features, out, seed=3),
    }
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", features, out))
    for slot, linear_mixture in mixtures.items():
        serving.store(slot, SlotWeights({handle: [piece(linear_mixture)]}, {}))
    weight, bias = random(out, features, seed=7), random(out, seed=9)
    x = random(30, features, seed=8)
    y = x @ weight.T + bias
    expected = y.clone()
    runs = [Run(1, 0, 3), Run(0, 3, 4), Run(1, 5, 9), Run(UNSERVED, 9, 12), Run(3, 12, 20)]
    serving.begin_step([*runs, Run(0, 20, 23)])
    serving.linear(y, x, handle)
    for run in [*runs, Run(0, 20, 23)]:
        part = slice(run.start, run.stop)
        expected[part] = 0
        if run.slot in mixtures:
            expected[part] = reference.linear_mixture(x[part], weight, bias, mixtures[run.slot])[0]
    assert_close(y, expected)
    assert torch.equal(y[23:], expected[23:])
    assert y[9:12].count_nonzero() == 0


@pytest.mark.slow
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("policy", [Constant((1.0, 0.5)), TopK(1), Soft()], ids=repr)
def test_output_scales_agree_with_the_formula(policy, with_bias) -> None:
    linear_mixture = mixture(policy, (2, 3), 20, 26)
    scale = 1 + random(2, 26, seed=4, scale=0.3)
    weight, bias = random(26, 20, seed=7), random(26, seed=9) if with_bias else None
    serving = backend()
    handle = serving.register_linear(LinearShape("linear", 20, 30))
    scaled = replace(piece(linear_mixture, start=4), output_scale=scale, bias=bias)
    serving.store(0, SlotWeights({handle: [scaled]}, {}))
    x = random(6, 20, seed=8)
    base = x @ weight.T
    y = torch.cat([torch.ones(6, 4), base if bias is None else base + bias], dim=1)
    serving.begin_step([Run(0, 0, 6)])
    serving.linear(y, x, handle)
    w = reference.route(x, linear_mixture.router, policy, 2).weights
    rows = (x @ linear_mixture.experts.a.T) * w[:, linear_mixture.experts.expert_of_row]
    expected = base * (w @ scale) + rows @ linear_mixture.experts.b.T
    assert_close(y[:, 4:], expected if bias is None else expected + bias)
    assert torch.equal(y[:, :4], torch.ones(6, 4))


@pytest.mark.slow
def test_sharded_inputs_route_on_the_sum_of_all_ranks_logits() -> None:
    linear_mixture, features, out = mixture(TopK(1), (2, 3), 40, 24), 40, 24
    x = random(5, features, seed=8)
    weight = random(out, features, seed=7)
    parts = slice(0, 24), slice(24, 40)

    def run(rows_of_one: slice, others: slice) -> torch.Tensor:
        def reduce(logits: torch.Tensor) -> torch.Tensor:
            total = logits.clone()
            total[0, :, :2] += x[:, others] @ linear_mixture.router[:, others].T
            return total

        serving = backend()
        shape = LinearShape("o", rows_of_one.stop - rows_of_one.start, out, reduce=reduce)
        handle = serving.register_linear(shape)
        cut = Experts(
            linear_mixture.experts.a[:, rows_of_one],
            linear_mixture.experts.b,
            linear_mixture.experts.ranks,
        )
        cut_piece = LinearPiece(
            "site", 0, cut, linear_mixture.policy, linear_mixture.router[:, rows_of_one]
        )
        serving.store(0, SlotWeights({handle: [cut_piece]}, {}))
        y = x[:, rows_of_one] @ weight[:, rows_of_one].T
        serving.begin_step([Run(0, 0, 5)])
        serving.linear(y, x[:, rows_of_one].contiguous(), handle)
        return y

    y = run(*parts) + run(*reversed(parts))
    assert_close(y, reference.linear_mixture(x, weight, None, linear_mixture)[0])
