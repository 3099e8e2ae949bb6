// The two products of a low-rank pair, for a type of weights: A x ("dot") and B z ("columns").
#pragma once
#include "kernels.h"
#include "vector.h"

namespace molehill::MOLEHILL_ISA {
namespace {

// How many rows of the batch share a load of the weights, and how many tiles one of its operands:
// as many as the registers hold.
#if defined(__AVX512F__)
constexpr int kFloatRows = 8;
constexpr int kTilesAtOnce = 2;
#elif defined(__AVX2__)
constexpr int kFloatRows = 2;
constexpr int kTilesAtOnce = 1;
#else
constexpr int kFloatRows = 1;
constexpr int kTilesAtOnce = 1;
#endif

// Four floats, over and over.
INLINE Floats repeated(const float* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif defined(__AVX2__)
  return (Floats)_mm256_broadcast_ps((const __m128*)p);
#else
  return load(p);
#endif
}

// Vectors of a step's panel, 8 rows of 4 inputs, and of a tile's columns.
constexpr int kPanelVectors = 32 / kWide;
constexpr int kTileVectors = kTileColumns / kWide;
// Columns of a tile whose sums are in registers at once: all, or where there are few registers,
// half.
constexpr int kSumsAtOnce = kTileVectors < 8 ? kTileVectors : 8;

// Weights of type T times floats, in float.
template <class T>
struct FloatMath {
  using Element = T;
  using Operand = float;
  static constexpr int kRanksPerStep = 1;

  template <int R>
  static INLINE void dot_rows(const float* const* x, const T* panel, int steps, float* sums) {
    Floats acc[R][kPanelVectors] = {};
    for (int s = 0; s < steps; ++s) {
      Floats v[R];
      for (int r = 0; r < R; ++r) v[r] = repeated(x[r] + s * 4);
      for (int i = 0; i < kPanelVectors; ++i) {
        const Floats a = load(panel + s * 32 + i * kWide);
        for (int r = 0; r < R; ++r) acc[r][i] += a * v[r];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 8; ++i) {
        const Floats& four = acc[r][4 * i / kWide];
        const int at = 4 * i % kWide;
        sums[r * 8 + i] = four[at] + four[at + 1] + four[at + 2] + four[at + 3];
      }
  }

  static INLINE void dot_row(const float* const* x, const T* panel, int steps, float* sums) {
    dot_rows<1>(x, panel, steps, sums);
  }

  static void dot(const float* const* x, int rows, const T* panel, int steps, float* sums) {
    int r = 0;
    if constexpr (kFloatRows >= 8)
      for (; r + 8 <= rows; r += 8) dot_rows<8>(x + r, panel, steps, sums + r * 8);
    if constexpr (kFloatRows >= 4)
      for (; r + 4 <= rows; r += 4) dot_rows<4>(x + r, panel, steps, sums + r * 8);
    if constexpr (kFloatRows >= 2)
      for (; r + 2 <= rows; r += 2) dot_rows<2>(x + r, panel, steps, sums + r * 8);
    for (; r < rows; ++r) dot_rows<1>(x + r, panel, steps, sums + r * 8);
  }

  // N tiles of an output row, to which B z is added expert by expert.
  template <int N>
  struct Columns {
    Floats sums[N][kTileVectors];

    INLINE void add(const float* z, const T* tile, ptrdiff_t tile_stride, int ranks) {
      for (int first = 0; first < kTileVectors; first += kSumsAtOnce)
        for (int k = 0; k < ranks; ++k)
          for (int n = 0; n < N; ++n) {
            const T* b = tile + n * tile_stride + k * kTileColumns;
            for (int c = first; c < first + kSumsAtOnce; ++c)
              sums[n][c] += z[k] * load(b + c * kWide);
          }
    }
  };
};

#ifdef __AVX512BF16__

// bfloat16 weights times bfloat16 operands, in float (VDPBF16PS sums two products per lane).
struct Bf16Math {
  using Element = bf16;
  using Operand = bf16;
  static constexpr int kRanksPerStep = 2;

  static INLINE __m512bh weights(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

  static INLINE __m512bh four_times(const bf16* p) {
    int64_t bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return (__m512bh)_mm512_set1_epi64(bits);
  }

  static INLINE __m512bh two_times(const bf16* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
  }

  // U sums per row hide the instruction's latency when there are few rows.
  template <int R, int U>
  static INLINE void dot_rows(const bf16* const* x, const bf16* panel, int steps, float* sums) {
    __m512 acc[R][U];
    for (int r = 0; r < R; ++r)
      for (int u = 0; u < U; ++u) acc[r][u] = _mm512_setzero_ps();
    int s = 0;
    for (; s + U <= steps; s += U)
      for (int u = 0; u < U; ++u) {
        const __m512bh a = weights(panel + (s + u) * 32);
        for (int r = 0; r < R; ++r)
          acc[r][u] = _mm512_dpbf16_ps(acc[r][u], a, four_times(x[r] + (s + u) * 4));
      }
    for (; s < steps; ++s)
      for (int r = 0; r < R; ++r)
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], weights(panel + s * 32), four_times(x[r] + s * 4));
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
    for (int r = 0; r < R; ++r) {
      for (int u = 1; u < U; ++u) acc[r][0] = _mm512_add_ps(acc[r][0], acc[r][u]);
      const __m512 pairs = _mm512_add_ps(acc[r][0], _mm512_movehdup_ps(acc[r][0]));
      _mm256_storeu_ps(sums + r * 8, _mm512_castps512_ps256(_mm512_permutexvar_ps(even, pairs)));
    }
  }

  static INLINE void dot_row(const bf16* const* x, const bf16* panel, int steps, float* sums) {
    dot_rows<1, 4>(x, panel, steps, sums);
  }

  static void dot(const bf16* const* x, int rows, const bf16* panel, int steps, float* sums) {
    switch (rows) {
      case 8:
        return dot_rows<8, 1>(x, panel, steps, sums);
      case 7:
        return dot_rows<7, 1>(x, panel, steps, sums);
      case 6:
        return dot_rows<6, 2>(x, panel, steps, sums);
      case 5:
        return dot_rows<5, 2>(x, panel, steps, sums);
      case 4:
        return dot_rows<4, 2>(x, panel, steps, sums);
      case 3:
        return dot_rows<3, 4>(x, panel, steps, sums);
      case 2:
        return dot_rows<2, 4>(x, panel, steps, sums);
      case 1:
        return dot_rows<1, 8>(x, panel, steps, sums);
    }
  }

  template <int N>
  struct Columns {
    Floats sums[N][4];

    INLINE void add(const bf16* z, const bf16* tile, ptrdiff_t tile_stride, int ranks) {
      for (int k = 0; k < ranks; k += 2) {
        const __m512bh pair = two_times(z + k);
        for (int n = 0; n < N; ++n) {
          const bf16* b = tile + n * tile_stride + k * kTileColumns;
          for (int c = 0; c < 4; ++c)
            sums[n][c] = (Floats)_mm512_dpbf16_ps((__m512)sums[n][c], pair, weights(b + c * 32));
        }
      }
    }
  };
};

#endif

}  // namespace
}  // namespace molehill::MOLEHILL_ISA
