"""Device code of the routing policies: gate weights of a tile of tokens.

p = softmax(logits), or of |logits| / temperature; q = p / divisor. With the experts by falling q,
ties by index, an expert is kept if it is among the first `keep`, or by what the q before it (and
with it) sum to, or if the token is soft: entropy(p) > threshold. Sparsegen's p is not a softmax:
p = w = sparsemax(logits / (eps + softplus(-MLP))). Where there is a floor, only
experts that reach it are kept; it is a number, or the token's own, which q is then less by. w = q
where kept, else 0; w / sum(w) if normalised and not all 0. Where experts have biases, logit + bias
has the place of p, and w = 1 where kept. Every class of molehill.kernels.policy
that has a place here is one choice of these parameters (molehill.kernels.triton.policy_encoding).
"""

import triton
from triton import language as tl

from molehill.kernels.triton import layout as at


@triton.jit
def entropy_of(p: tl.tensor, valid: tl.tensor, kind: tl.tensor, parameters: tl.tensor) -> tl.tensor:
    """Shannon, Tsallis or Renyi entropy of p + eps over `most`. p `[T, E]`: `[T]`."""
    index = tl.load(parameters + at.INDEX)
    p += tl.load(parameters + at.EPS)
    valid = valid & (p > 0)
    log_p = tl.log(tl.where(valid, p, 1.0))
    if kind == at.SHANNON:
        value = -tl.sum(tl.where(valid, p * log_p, 0.0), axis=1)
    else:
        power = tl.sum(tl.where(valid, tl.exp(index * log_p), 0.0), axis=1)
        if kind == at.TSALLIS:
            value = (1.0 - power) / (index - 1.0)
        else:
            value = tl.log(power + 1e-10) / (1.0 - index)
    return value / tl.load(parameters + at.MOST)


@triton.jit
def sparse_mask(q: tl.tensor, experts: tl.tensor, record: tl.tensor, top_p: tl.tensor) -> tl.tensor:
    """Which experts the first `keep` and the nucleus hold. q `[T, E]`: bool `[T, E]`."""
    expert = tl.arange(0, q.shape[1])[None, :]
    place = tl.zeros_like(q)
    before = tl.zeros_like(q)
    for other in range(experts):
        v = tl.sum(tl.where(expert == other, q, 0.0), axis=1)[:, None]
        precedes = (v > q) | ((v == q) & (other < expert))
        place += tl.where(precedes, 1.0, 0.0)
        before += tl.where(precedes, v, 0.0)
    nucleus = tl.load(record + at.NUCLEUS)
    kept = place < tl.load(record + at.KEEP).to(tl.float32)
    if nucleus == at.BEFORE_AT_MOST:
        kept = kept | (before <= top_p)
    elif nucleus == at.WITH_AT_MOST:
        kept = kept | (before + q <= top_p)
    elif nucleus == at.BEFORE_UNDER:
        kept = kept | (before < top_p)
    return kept


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def sparsemax(v: tl.tensor, valid: tl.tensor, experts: tl.tensor) -> tl.tensor:
    """The distribution nearest to v `[T, E]` (arXiv 1602.02068), by each v's place and by what the
    larger ones sum to, in place of sorting them."""
    expert = tl.arange(0, v.shape[1])[None, :]
    place = tl.full(v.shape, 1.0, dtype=tl.float32)
    upto = tl.where(valid, v, 0.0)
    for other in range(experts):
        u = tl.sum(tl.where(expert == other, tl.where(valid, v, 0.0), 0.0), axis=1)[:, None]
        precedes = (u > v) | ((u == v) & (other < expert))
        place += tl.where(precedes, 1.0, 0.0)
        upto += tl.where(precedes, u, 0.0)
    support = valid & (1.0 + place * v > upto)
    total = tl.sum(tl.where(support, v, 0.0), axis=1)
    size = tl.sum(tl.where(support, 1.0, 0.0), axis=1)
    return tl.where(valid, tl.maximum(v - ((total - 1.0) / size)[:, None], 0.0), 0.0)


@triton.jit
def above_floor(
    q: tl.tensor, extra: tl.tensor, scores: tl.tensor, parameters: tl.tensor
) -> tl.tensor:
    """q where it reaches the floor, or what it has above the token's own floor. q `[T, E]`."""
    floor = tl.load(parameters + at.FLOOR)
    w = tl.where(q >= floor, q, 0.0)
    if scores == at.LEARNED:
        token_floor = floor * tl.sigmoid(extra + tl.load(parameters + at.OFFSET))
        w = tl.maximum(q - token_floor[:, None], 0.0)
    return w


@triton.jit
def route(
    logits: tl.tensor,
    extra: tl.tensor,
    experts: tl.tensor,
    record: tl.tensor,
    parameters: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """logits float32 `[T, E]`, of which `experts` columns count: p, w `[T, E]`, entropy, soft.

    extra: float32 `[T]`, the logits of the router's extra row where scores are LEARNED, what the
    hidden layer comes to where they are SPARSE.
    """
    valid = (tl.arange(0, logits.shape[1]) < experts)[None, :]
    scores = tl.load(record + at.SCORES)
    if scores == at.ABSOLUTE:
        logits = tl.abs(logits) / tl.load(parameters + at.TEMPERATURE)
    biased = scores == at.BIASED
    if biased:
        expert = tl.arange(0, logits.shape[1])
        biases = tl.load(parameters + at.BIASES + expert, mask=expert < experts, other=0.0)
        logits += biases[None, :]
    logits = tl.where(valid, logits, float("-inf"))
    # Neither softmax nor sparsemax changes if all logits move.
    moved = logits - tl.max(logits, axis=1)[:, None]
    if scores == at.SPARSE:
        sparsity = softplus(-(extra + tl.load(parameters + at.OFFSET)))
        p = sparsemax(moved / (sparsity + tl.load(parameters + at.LEAST))[:, None], valid, experts)
    else:
        p = tl.exp(moved)
        p = p / tl.sum(p, axis=1)[:, None]
    entropy = entropy_of(p, valid, tl.load(record + at.ENTROPY), parameters)
    soft = entropy > tl.load(parameters + at.THRESHOLD)
    q = p / tl.load(parameters + at.DIVISOR)
    if biased:
        p = tl.where(valid, logits, 0.0)
        q = p
    kept = valid & (q == q)
    if tl.load(record + at.KEEP) < experts:
        kept = kept & sparse_mask(q, experts, record, tl.load(parameters + at.TOP_P))
        kept = kept | (valid & soft[:, None])
    w = tl.where(kept, tl.where(biased, 1.0, q), 0.0)
    if scores >= at.FLOORED:
        w = above_floor(w, extra, scores, parameters)
    if tl.load(record + at.NORMALIZE) != 0:
        total = tl.sum(w, axis=1)[:, None]
        w = w / tl.where(total == 0, 1.0, total)
    return p, w, entropy, soft


@triton.jit
def count(
    counters: tl.tensor, w: tl.tensor, entropy: tl.tensor, soft: tl.tensor, valid: tl.tensor
) -> None:
    """Adds a tile's decisions to a site's counters `[E + TOTALS]`. valid: bool `[T]`."""
    expert = tl.arange(0, w.shape[1])
    chosen = tl.sum(tl.where((w > 0) & valid[:, None], 1, 0), axis=0).to(tl.int64)
    tl.atomic_add(counters + expert, chosen, mask=chosen > 0, sem="relaxed")
    totals = counters + w.shape[1]
    tl.atomic_add(totals + at.DECISIONS, tl.sum(valid.to(tl.int64)), sem="relaxed")
    softs = tl.sum((soft & valid).to(tl.int64))
    tl.atomic_add(totals + at.SOFT, softs, sem="relaxed")
    units = tl.where(valid, entropy * at.ENTROPY_UNIT, 0.0).to(tl.int64)
    tl.atomic_add(totals + at.TOTAL_ENTROPY, tl.sum(units), sem="relaxed")
