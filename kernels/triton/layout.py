"""The slot table's layout, shared by the kernels and by the code that fills it.

Device tensors at fixed addresses, one record per (slot, linear), (slot, linear, piece) and
(slot, FFN). Integers are int64; offsets into the arena count elements of the type that they point
at. A record of zeros is an empty one, and every kernel returns at once on it.

Rank rows and router rows of all pieces of a (slot, linear) are stacked, so that one program reads
the input once for all of them; `ROW` and `GATE` say where a piece's own begin.
"""

from triton import language as tl

# Multiple of elements between the starts of stored rows: vectorised reads stay aligned.
PITCH = tl.constexpr(16)

# Linear record: stacked rank rows and their matrix A, stacked router rows and their matrix. Rank
# rows from HEAD_RANK on are those that an FFN mixture's kernel computes for its down linear.
HEAD = tl.constexpr(8)
HEAD_RANK = tl.constexpr(0)
HEAD_A = tl.constexpr(1)
HEAD_GATES = tl.constexpr(2)
HEAD_ROUTERS = tl.constexpr(3)

# Piece record: first router row, experts (0: no router), policy; output columns, rank rows, B
# transposed `[rank, pitch]`, int32 expert of each rank row (only with a router; EVERY_TOKEN where
# the weight is 1), float32 output scale `[max(experts, 1), pitch]` and bias `[width]`, and a bias
# `[width]` that is added, -1 where there is none (SCALE is NO_SCALE beside an added bias), and
# where its finished rows begin, in steps of PITCH. An FFN mixture is one more piece of its gate_up
# linear, which writes no columns: it routes, and its rank rows are those of gate and of up, which
# are finished UNGATED (rows of experts that are not chosen are 0 all the same). HIDDEN router rows
# after the experts' are those of an MLP whose biases and output weights are float32 `[2, pitch]` at
# MLP.
PIECE = tl.constexpr(20)
GATE = tl.constexpr(0)
EXPERTS = tl.constexpr(1)
KEEP = tl.constexpr(2)
NUCLEUS = tl.constexpr(3)
NORMALIZE = tl.constexpr(4)
ENTROPY = tl.constexpr(5)
SCORES = tl.constexpr(6)

START = tl.constexpr(7)
WIDTH = tl.constexpr(8)
ROW = tl.constexpr(9)
RANK = tl.constexpr(10)
B = tl.constexpr(11)
OWNER = tl.constexpr(12)
SCALE = tl.constexpr(13)
BIAS = tl.constexpr(14)
FINISHED = tl.constexpr(15)
UNGATED = tl.constexpr(16)
HIDDEN = tl.constexpr(17)
MLP = tl.constexpr(18)
ADDED_BIAS = tl.constexpr(19)
EVERY_TOKEN = tl.constexpr(-1)
# Values of SCALE beside a place: nothing but B z is added, or a bias as well.
PLAIN_PIECE = tl.constexpr(-1)
NO_SCALE = tl.constexpr(-2)

# FFN record: GATE and EXPERTS as its piece has them, first finished rows of gate and up, B of both,
# A of down, int32 `[3, experts + 1]` of the experts' first rows in each, activation, rank rows of
# down, whether one more carries (sum of weights - 1) for down's bias; DoRA's factors of gate and
# up, float32 `[experts, pitch]`, and the base's biases `[width]`, -1 where there is none.
FFN = tl.constexpr(24)
GATE_ROW = tl.constexpr(7)
UP_ROW = tl.constexpr(8)
GATE_B = tl.constexpr(9)
UP_B = tl.constexpr(10)
DOWN_A = tl.constexpr(11)
STARTS = tl.constexpr(12)
ACTIVATION = tl.constexpr(13)
DOWN_RANK = tl.constexpr(14)
DOWN_BIAS = tl.constexpr(15)
GATE_SCALE = tl.constexpr(16)
GATE_BIAS = tl.constexpr(17)
UP_SCALE = tl.constexpr(18)
UP_BIAS = tl.constexpr(19)

# Policy parameters, float32; from BIASES on, those that each expert has.
POLICY = tl.constexpr(64)
DIVISOR = tl.constexpr(0)
TOP_P = tl.constexpr(1)
THRESHOLD = tl.constexpr(2)
INDEX = tl.constexpr(3)
EPS = tl.constexpr(4)
MOST = tl.constexpr(5)
TEMPERATURE = tl.constexpr(6)
FLOOR = tl.constexpr(7)
OFFSET = tl.constexpr(8)
LEAST = tl.constexpr(9)
BIASES = tl.constexpr(16)

# Values of NUCLEUS: which experts are kept beside the first KEEP, by what runs up to them.
NO_NUCLEUS = tl.constexpr(0)
BEFORE_AT_MOST = tl.constexpr(1)
WITH_AT_MOST = tl.constexpr(2)
BEFORE_UNDER = tl.constexpr(3)

# Values of SCORES: what the probabilities are made of, and held against. BIASED has logits and
# biases in their place. LEARNED has one more router row, whose logits make each token's floor;
# SPARSE has an MLP's, whose output makes each token's sparsity.
PLAIN = tl.constexpr(0)
ABSOLUTE = tl.constexpr(1)
BIASED = tl.constexpr(2)
FLOORED = tl.constexpr(3)
LEARNED = tl.constexpr(4)
SPARSE = tl.constexpr(5)

# Values of ENTROPY.
SHANNON = tl.constexpr(0)
TSALLIS = tl.constexpr(1)
RENYI = tl.constexpr(2)

# Values of ACTIVATION.
SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
RELU = tl.constexpr(3)

# Counters, int64 `[experts + 3]`: tokens per expert, then these. Entropy in units of 2^-24, so that
# sums are exact and do not depend on the order of the programs.
DECISIONS = tl.constexpr(0)
SOFT = tl.constexpr(1)
TOTAL_ENTROPY = tl.constexpr(2)
TOTALS = tl.constexpr(3)
ENTROPY_UNIT = tl.constexpr(1 << 24)

# The steps buffer, int32: a head, the small tiles, the large tiles and the order of the tokens,
# each at a place that the capacity fixes. Tiles are (slot, first place in the order, tokens, first
# token); those that a step does not need have the slot NO_TILE. ROUTE_FIRST says that the tiles of
# one row have their rank rows computed after routing, for chosen experts alone. ADAPTED is how many
# tokens are in tiles; after them the order has the base's among the first ANNOUNCED tokens, so that
# it is a permutation of those, and every later token is at its own place.
STEP_HEAD = tl.constexpr(4)
ROUTE_FIRST = tl.constexpr(0)
ADAPTED = tl.constexpr(1)
ANNOUNCED = tl.constexpr(2)
TILE = tl.constexpr(4)
NO_TILE = tl.constexpr(-1)

UNSERVED = tl.constexpr(-2)
