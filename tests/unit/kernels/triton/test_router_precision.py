"""Two TF32 passes for the router of a 16-bit model, with the tensor core's rounding emulated."""

import numpy as np
import pytest
import torch
from support import native
from support.triton_cases import random
from triton import language as tl
from triton.runtime.interpreter import InterpretedFunction

from molehill.kernels.triton import shrink

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.skipif(native.is_here(), reason="reads the kernel's numbers in the interpreter"),
]


def cut_to_tf32(values: np.ndarray) -> np.ndarray:
    """What a tensor core reads of a float32: the sign, the exponent and ten bits."""
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def halves(g: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The kernel's own two numbers of each weight, as the tensor core reads them."""
    source, high, low = g.numpy().ravel(), torch.zeros(g.numel()), torch.zeros(g.numel())

    def store_halves(g, high, low, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        first, rest = shrink.tf32_halves(tl.load(g + i))
        tl.store(high + i, first)
        tl.store(low + i, rest)

    InterpretedFunction(store_halves)[(1,)](torch.from_numpy(source), high, low, SIZE=g.numel())
    return cut_to_tf32(high.numpy()), cut_to_tf32(low.numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_halves_give_float32s_logits(dtype) -> None:
    """Their error stays below that of adding up in float32, which any kernel has."""
    rows, features = 4, 1024
    g = random(rows, features, seed=1, scale=features**-0.5)
    x = random(16, features, seed=2).to(dtype)
    high, low = (part.reshape(rows, features) for part in halves(g))
    inputs = x.float().numpy()
    assert np.array_equal(cut_to_tf32(inputs), inputs), "a 16-bit input is a TF32 number"
    exact = x.double() @ g.double().T
    # Products of TF32 numbers are exact; what is lost is lost in the weights.
    represented = inputs.astype(np.float64) @ (high.astype(np.float64) + low).T
    lost = np.abs(represented - exact.numpy()).max()
    float32 = (x.float() @ g.T).double()
    summed = (float32 - exact).abs().max().item()
    one_pass = np.abs(inputs.astype(np.float64) @ high.T - exact.numpy()).max()
    assert lost < summed, f"lost {lost:.1e}, float32 {summed:.1e}"
    assert one_pass > 50 * lost, "a single pass would lose more"


def test_the_halves_of_a_weight_differ_from_it_by_2_to_the_minus_22() -> None:
    g = random(512, seed=3) * torch.exp2(torch.arange(512) % 60 - 30.0)
    high, low = halves(g)
    error = np.abs(high.astype(np.float64) + low - g.double().numpy())
    assert (error <= np.abs(g.numpy()) * 2.0**-22).all()
    assert np.array_equal(cut_to_tf32(high), high)
