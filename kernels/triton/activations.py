"""Device code of the FFNs' activations."""

import triton
from triton import language as tl

from molehill.kernels.triton import layout as at


@triton.jit
def activated(x: tl.tensor, kind: tl.tensor) -> tl.tensor:
    y = x
    if kind == at.SILU:
        y = x * tl.sigmoid(x)
    elif kind == at.GELU:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif kind == at.GELU_TANH:
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def gated(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    ACTIVATION: tl.constexpr,
    ROUNDED: tl.constexpr,
) -> tl.tensor:
    """act(gate) * up, as the base computes it for a pointer of `out`'s type: float32.

    gate, up: float32 of values of that type. ROUNDED: whether act(gate) is rounded to it first.
    """
    active = activated(gate, ACTIVATION)
    if ROUNDED:
        active = active.to(out.dtype.element_ty).to(tl.float32)
    return active * up
