// The inner loops. Compiled once per instruction set, with MOLEHILL_ISA as its name.
#include "kernels.h"

#include "multiply.h"
#include "vector.h"

namespace molehill::MOLEHILL_ISA {
namespace {

template <class From, class To>
void convert(const void* x, void* y, size_t count) {
  size_t i = 0;
  for (; i + kWide <= count; i += kWide) store((To*)y + i, load((const From*)x + i));
  if (i < count)
    store_some((To*)y + i, load_some((const From*)x + i, int(count - i)), int(count - i));
}

template <class T>
void narrow(const float* x, void* y, size_t count) {
  convert<float, T>(x, y, count);
}

void route(const float* const* x, int rows, const float* panel, int steps, float* logits) {
  FloatMath<float>::dot(x, rows, panel, steps, logits);
}

void exponentials(float* values, size_t count) {
  for (size_t i = 0; i < count; i += kWide) {
    const int some = count - i < kWide ? int(count - i) : kWide;
    const Floats x = load_some(values + i, some);
    // exponential() saturates where a probability is as good as zero.
    store_some(values + i, x < -87.0f ? Floats{} : exponential(x), some);
  }
}

void powers(const float* values, float exponent, float* results, size_t count) {
  for (size_t i = 0; i < count; i += kWide) {
    const int some = count - i < kWide ? int(count - i) : kWide;
    const Floats x = load_some(values + i, some);
    // 0^p is 0 for p > 0; exponential() would saturate above it.
    const Floats y = exponential(exponent * logarithm(x));
    store_some(results + i, x > 0.0f ? y : Floats{}, some);
  }
}

void entropies(const float* values, float* results, size_t count) {
  for (size_t i = 0; i < count; i += kWide) {
    const int some = count - i < kWide ? int(count - i) : kWide;
    const Floats x = load_some(values + i, some);
    store_some(results + i, x > 0.0f ? -x * logarithm(x) : Floats{}, some);
  }
}

// Counts those ahead of each expert instead of sorting: no branches to mispredict.
void rank(const float* values, int experts, uint16_t* order) {
  for (int e = 0; e < experts; ++e) order[e] = uint16_t(e);
  Ints expert;
  for (int i = 0; i < kWide; ++i) expert[i] = i;
  for (int first = 0; first < experts; first += kWide, expert += kWide) {
    const Floats of_expert = load_some(values + first, experts - first);
    Ints ahead = {};
    for (int other = 0; other < experts; ++other) {
      const Floats value = splat(values[other]);
      ahead -= (value > of_expert) | ((value == of_expert) & (expert > other));
    }
    for (int i = 0; i < kWide && first + i < experts; ++i) order[ahead[i]] = uint16_t(first + i);
  }
}

INLINE void store_panel(float* z, const float* sums, float weight) {
  for (int i = 0; i < kPanelRows; ++i) z[i] = weight * sums[i];
}

INLINE void store_panel(bf16* z, const float* sums, float weight) {
  constexpr int count = kPanelRows < kWide ? kWide : kPanelRows;
  float weighted[count] = {};
  bf16 rounded[count];
  for (int i = 0; i < kPanelRows; ++i) weighted[i] = weight * sums[i];
  for (int i = 0; i < kPanelRows; i += kWide) store(rounded + i, load(weighted + i));
  __builtin_memcpy(z, rounded, kPanelRows * sizeof *z);
}

template <class M>
void shrink(const ShrinkJob& job) {
  using Operand = typename M::Operand;
  const Operand* x[kChunkRows];
  int row_of[kChunkRows], chosen = 0;
  for (int row = 0; row < job.rows; ++row) {
    x[chosen] = (const Operand*)job.x + row * job.x_stride;
    row_of[chosen] = row;
    chosen += job.weights[row] != 0;
  }
  for (int first = 0; first < chosen; first += kBlockRows) {
    const int rows = chosen - first < kBlockRows ? chosen - first : kBlockRows;
    float sums[kBlockRows * kPanelRows];
    M::dot(x + first, rows, (const typename M::Element*)job.panel, job.steps, sums);
    for (int i = 0; i < rows; ++i) {
      const int row = row_of[first + i];
      store_panel((Operand*)job.z + ptrdiff_t(row) * job.ranks, sums + i * kPanelRows,
                  job.weighted ? job.weights[row] : 1.0f);
    }
  }
}

// DoRA: the base output without its bias, times sum_e w_e scale_e.
INLINE Floats rescale(const ExpandJob& job, int row, int column, int some, Floats y) {
  const Choice& choice = job.choice;
  Floats scale = {};
  for (int i = 0; i < choice.counts[row]; ++i) {
    const int e = choice.experts[row * choice.max_experts + i];
    const float* of_expert = job.scale + e * job.scale_stride + column;
    scale += choice.weights[e * choice.rows + row] * load_some(of_expert, some);
  }
  const Floats bias = job.bias ? load_some(job.bias + column, some) : Floats{};
  return (y - bias) * scale + bias;
}

template <class T>
INLINE Floats base_column(const ExpandJob& job, int row, int column, int some) {
  Floats y = load_some((const T*)job.out + row * job.out_stride + column, some);
  if (job.scale) y = rescale(job, row, column, some, y);
  if (job.shift) y += (job.factor ? job.factor[row] : 1.0f) * load_some(job.shift + column, some);
  return y;
}

// N tiles of all rows. `plain`: whole tiles, to which only B z is added; the common case, which the
// compiler must see by itself to keep the sums in registers.
template <class M, int N, bool plain>
void expand_tiles(const ExpandJob& job, int column) {
  using T = typename M::Element;
  const Choice choice = job.choice;
  const ptrdiff_t ranks = job.ranks, out_stride = job.out_stride;
  const int* first_rank = job.first_rank;
  const ptrdiff_t all_columns = job.all_columns, target_column = job.column + column;
  const auto* z = (const typename M::Operand*)job.z;
  T* out = (T*)job.out + column;
  for (ptrdiff_t row = 0; row < choice.rows; ++row, z += ranks, out += out_stride) {
    typename M::template Columns<N> columns;
#pragma GCC unroll 16
    for (int c = 0; c < kTileVectors * N; ++c) {
      const int some = plain ? kWide : job.columns - column - c * kWide;
      if constexpr (plain)
        columns.sums[c / kTileVectors][c % kTileVectors] = load(out + c * kWide);
      else
        columns.sums[c / kTileVectors][c % kTileVectors] =
            some > 0 ? base_column<T>(job, int(row), column + c * kWide, some) : Floats{};
    }
    const uint16_t* expert = choice.experts + row * choice.max_experts;
    for (const uint16_t* end = expert + choice.counts[row]; expert != end; ++expert) {
      const ptrdiff_t first = first_rank[*expert], ranks = first_rank[*expert + 1] - first;
      const T* tiles = (const T*)job.b + first * all_columns + ranks * target_column;
      columns.add(z + first, tiles, ranks * kTileColumns, int(ranks));
    }
#pragma GCC unroll 16
    for (int c = 0; c < kTileVectors * N; ++c) {
      const int some = plain ? kWide : job.columns - column - c * kWide;
      if constexpr (plain)
        store(out + c * kWide, columns.sums[c / kTileVectors][c % kTileVectors]);
      else if (some > 0)
        store_some(out + c * kWide, columns.sums[c / kTileVectors][c % kTileVectors], some);
    }
  }
}

template <class M>
void expand(const ExpandJob& job) {
  const bool plain = !job.scale && !job.shift;
  int column = 0;
  for (int step; column < job.columns; column += step) {
    const int left = job.columns - column;
    step =
        plain && left >= kTilesAtOnce * kTileColumns ? kTilesAtOnce * kTileColumns : kTileColumns;
    if (step > kTileColumns)
      expand_tiles<M, kTilesAtOnce, true>(job, column);
    else if (plain && left >= kTileColumns)
      expand_tiles<M, 1, true>(job, column);
    else
      expand_tiles<M, 1, false>(job, column);
  }
}

template <class M>
using Tile = typename M::template Columns<1>;

template <class M>
INLINE void add_side(Tile<M>& tile, int row, int e, const FfnSide& side) {
  if (!side.z) return;
  const ptrdiff_t first = side.first_rank[e], ranks = side.first_rank[e + 1] - first;
  const auto* b =
      (const typename M::Element*)side.b + first * side.all_columns + ranks * side.column;
  tile.add((const typename M::Operand*)side.z + ptrdiff_t(row) * side.ranks + first, b, 0,
           int(ranks));
}

template <class M>
INLINE void shrink_down(const FfnJob& job, int row, int e, const Floats* u) {
  typename M::Operand operands[kTileColumns];
  for (int c = 0; c < kTileVectors; ++c) store(operands + c * kWide, u[c]);
  const typename M::Operand* x = operands;
  for (int k = job.down_first_rank[e]; k < job.down_first_rank[e + 1]; k += kPanelRows) {
    const auto* panel =
        (const typename M::Element*)job.down + ptrdiff_t(k / kPanelRows) * job.panel_stride;
    float sums[kPanelRows];
    M::dot_row(&x, panel, (job.columns + kPanelInputs - 1) / kPanelInputs, sums);
    float* total = job.down_sums + ptrdiff_t(row) * job.down_ranks + k;
    for (int i = 0; i < kPanelRows; ++i) total[i] += sums[i];
  }
}

// DoRA: the base's pre-activation without its bias, times the expert's factor.
INLINE Floats rescale(const FfnSide& side, int e, int column, int some, Floats y) {
  if (!side.scale) return y;
  const Floats bias = side.bias ? load_some(side.bias + column, some) : Floats{};
  return (y - bias) * load_some(side.scale + e * side.scale_stride + column, some) + bias;
}

// One row of one tile; `full` as `plain` above. `scaled`: some side has a scale.
template <class M, bool full, bool scaled>
INLINE void ffn_row(const FfnJob& job, ptrdiff_t row) {
  using T = typename M::Element;
  const Choice& choice = job.choice;
  const T* base_gate = (const T*)job.gate + row * job.gate_up_stride;
  const T* base_up = (const T*)job.up + row * job.gate_up_stride;
  T* out = (T*)job.h + row * job.h_stride;
  Floats h[kTileVectors] = {};
  for (int i = 0; i < choice.counts[row]; ++i) {
    const int e = choice.experts[row * choice.max_experts + i];
    const float weight = choice.weights[ptrdiff_t(e) * choice.rows + row];
    Tile<M> gate, up;
#pragma GCC unroll 16
    for (int c = 0; c < kTileVectors; ++c) {
      const int some = full ? kWide : larger(job.columns - c * kWide, 0);
      gate.sums[0][c] = full ? load(base_gate + c * kWide) : load_some(base_gate + c * kWide, some);
      up.sums[0][c] = full ? load(base_up + c * kWide) : load_some(base_up + c * kWide, some);
      if constexpr (scaled) {
        gate.sums[0][c] = rescale(job.gate_side, e, c * kWide, some, gate.sums[0][c]);
        up.sums[0][c] = rescale(job.up_side, e, c * kWide, some, up.sums[0][c]);
      }
    }
    add_side<M>(gate, int(row), e, job.gate_side);
    add_side<M>(up, int(row), e, job.up_side);
    Floats u[kTileVectors];
#pragma GCC unroll 16
    for (int c = 0; c < kTileVectors; ++c) {
      u[c] = activate(job.activation, gate.sums[0][c]) * up.sums[0][c];
      h[c] += weight * u[c];
    }
    if (job.down) shrink_down<M>(job, int(row), e, u);
  }
#pragma GCC unroll 16
  for (int c = 0; c < kTileVectors; ++c) {
    const int some = full ? kWide : larger(job.columns - c * kWide, 0);
    if (full)
      store(out + c * kWide, h[c]);
    else
      store_some(out + c * kWide, h[c], some);
  }
}

template <class M, bool scaled>
void ffn_rows(const FfnJob& job) {
  for (int row = 0; row < job.choice.rows; ++row)
    if (job.columns >= kTileColumns)
      ffn_row<M, true, scaled>(job, row);
    else
      ffn_row<M, false, scaled>(job, row);
}

template <class M>
void ffn(const FfnJob& job) {
  if (job.gate_side.scale || job.up_side.scale)
    ffn_rows<M, true>(job);
  else
    ffn_rows<M, false>(job);
}

template <class T>
void scale(const ScaleJob& job) {
  for (int column = 0; column < job.width; column += kWide) {
    const int some = job.width - column < kWide ? job.width - column : kWide;
    Floats factor = {};
    for (int e = 0; e < job.experts; ++e)
      if (job.weights[e] != 0)
        factor += job.weights[e] * load_some(job.vectors + ptrdiff_t(e) * job.width + column, some);
    T* u = (T*)job.u + column;
    store_some(u, load_some(u, some) * factor, some);
  }
}

template <class M>
constexpr Kernels table(const char* name) {
  using T = typename M::Element;
  using Z = typename M::Operand;
  return {.name = name,
          .element = sizeof(T),
          .operand = sizeof(Z),
          .ranks_per_step = M::kRanksPerStep,
          .widen = convert<T, float>,
          .stage = convert<T, Z>,
          .narrow = narrow<Z>,
          .route = route,
          .exponentials = exponentials,
          .powers = powers,
          .entropies = entropies,
          .rank = rank,
          .shrink = shrink<M>,
          .expand = expand<M>,
          .ffn = ffn<M>,
          .scale = scale<T>};
}

}  // namespace

#define TEXT_OF(name) #name
#define NAME_OF(isa) TEXT_OF(isa)

const Kernels& kernels(bool bf16) {
#ifdef __AVX512BF16__
  using Halves = Bf16Math;
#else
  using Halves = FloatMath<MOLEHILL_ISA::bf16>;
#endif
  static constexpr Kernels floats = table<FloatMath<float>>(NAME_OF(MOLEHILL_ISA));
  static constexpr Kernels halves = table<Halves>(NAME_OF(MOLEHILL_ISA));
  return bf16 ? halves : floats;
}

}  // namespace molehill::MOLEHILL_ISA
