// The inner loops. Compiled once per instruction set, with MOLEHILL_ISA as its name.
#include "kernels.h"
#include "multiply.h"
#include "vector.h"

namespace molehill::MOLEHILL_ISA {
namespace {

template <class From, class To>
void convert(const void* x, void* y, size_t count) {
  for (size_t i = 0; i < count; i += 16) {
    const int some = count - i < 16 ? int(count - i) : 16;
    store_some((To*)y + i, load_some((const From*)x + i, some), some);
  }
}

template <class T>
void widen(const void* x, float* y, size_t count) {
  convert<T, float>(x, y, count);
}

template <class T>
void narrow(const float* x, void* y, size_t count) {
  convert<float, T>(x, y, count);
}

void route(const float* const* x, int rows, const float* panel, int steps, float* logits) {
  FloatMath<float>::dot(x, rows, panel, steps, logits);
}

INLINE void store_panel(float* z, const float* sums, float weight) {
  for (int i = 0; i < kPanelRows; ++i) z[i] = weight * sums[i];
}

INLINE void store_panel(bf16* z, const float* sums, float weight) {
  Floats padded = {};
  for (int i = 0; i < kPanelRows; ++i) padded[i] = weight * sums[i];
  bf16 rounded[16];
  store(rounded, padded);
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

template <class M>
INLINE void add_experts(typename M::Columns& sums, const Choice& choice, int row, const void* z,
                        int ranks, const int* first_rank, const void* tile) {
  const auto* operands = (const typename M::Operand*)z + ptrdiff_t(row) * ranks;
  for (int i = 0; i < choice.counts[row]; ++i) {
    const int e = choice.experts[row * choice.max_experts + i], first = first_rank[e];
    const auto* weights = (const typename M::Element*)tile + ptrdiff_t(first) * kTileColumns;
    sums.add(operands + first, weights, first_rank[e + 1] - first);
  }
}

template <class M>
void expand(const ExpandJob& job) {
  using T = typename M::Element;
  for (int row = 0; row < job.choice.rows; ++row) {
    typename M::Columns sums;
    add_experts<M>(sums, job.choice, row, job.z, job.ranks, job.first_rank, job.tile);
    T* out = (T*)job.out + row * job.out_stride;
    for (int c = 0; c < 4; ++c) {
      const int some = job.columns - c * 16;
      if (some <= 0) break;
      Floats y = load_some(out + c * 16, some);
      if (job.scale) y = rescale(job, row, c * 16, some, y);
      if (job.shift) y += job.factor[row] * load_some(job.shift + c * 16, some);
      store_some(out + c * 16, y + sums.get(c), some);
    }
  }
}

template <class M>
INLINE void add_side(Floats* values, int row, int e, const FfnSide& side) {
  if (!side.z) return;
  typename M::Columns sums;
  const int first = side.first_rank[e];
  sums.add((const typename M::Operand*)side.z + ptrdiff_t(row) * side.ranks + first,
           (const typename M::Element*)side.tile + ptrdiff_t(first) * kTileColumns,
           side.first_rank[e + 1] - first);
  for (int c = 0; c < 4; ++c) values[c] += sums.get(c);
}

template <class M>
INLINE void shrink_down(const FfnJob& job, int row, int e, const Floats* u) {
  typename M::Operand operands[kTileColumns];
  for (int c = 0; c < 4; ++c) store(operands + c * 16, u[c]);
  const typename M::Operand* x = operands;
  for (int k = job.down_first_rank[e]; k < job.down_first_rank[e + 1]; k += kPanelRows) {
    const auto* panel =
        (const typename M::Element*)job.down + ptrdiff_t(k / kPanelRows) * job.panel_stride;
    float sums[kPanelRows];
    M::dot(&x, 1, panel, (job.columns + kPanelInputs - 1) / kPanelInputs, sums);
    float* total = job.down_sums + ptrdiff_t(row) * job.down_ranks + k;
    for (int i = 0; i < kPanelRows; ++i) total[i] += sums[i];
  }
}

template <class M>
void ffn(const FfnJob& job) {
  using T = typename M::Element;
  const Choice& choice = job.choice;
  for (int row = 0; row < choice.rows; ++row) {
    const T* base_gate = (const T*)job.gate + row * job.gate_up_stride;
    const T* base_up = (const T*)job.up + row * job.gate_up_stride;
    Floats h[4] = {};
    for (int i = 0; i < choice.counts[row]; ++i) {
      const int e = choice.experts[row * choice.max_experts + i];
      const float weight = choice.weights[e * choice.rows + row];
      Floats gate[4] = {}, up[4] = {};
      for (int c = 0; c < 4 && c * 16 < job.columns; ++c) {
        gate[c] = load_some(base_gate + c * 16, job.columns - c * 16);
        up[c] = load_some(base_up + c * 16, job.columns - c * 16);
      }
      add_side<M>(gate, row, e, job.gate_side);
      add_side<M>(up, row, e, job.up_side);
      for (int c = 0; c < 4; ++c) {
        gate[c] = activate(job.activation, gate[c]) * up[c];
        h[c] += weight * gate[c];
      }
      if (job.down) shrink_down<M>(job, row, e, gate);
    }
    T* out = (T*)job.h + row * job.h_stride;
    for (int c = 0; c < 4 && c * 16 < job.columns; ++c)
      store_some(out + c * 16, h[c], job.columns - c * 16);
  }
}

template <class M>
constexpr Kernels table(const char* name) {
  using T = typename M::Element;
  using Z = typename M::Operand;
  return {name,      sizeof(T), sizeof(Z),  M::kRanksPerStep, widen<T>, convert<T, Z>,
          narrow<Z>, route,     shrink<M>, expand<M>,        ffn<M>};
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
