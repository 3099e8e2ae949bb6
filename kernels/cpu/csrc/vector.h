// As many floats at a time as a register holds, in the compiler's own vector types: every
// instruction set from one text. (Vectors that are wider than registers GCC keeps in memory, float
// by float.)
#pragma once
#include <cstdint>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace molehill::MOLEHILL_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWide = 16;
#elif defined(__AVX2__)
constexpr int kWide = 8;
#else
constexpr int kWide = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWide)));
typedef int32_t Ints __attribute__((vector_size(4 * kWide)));
typedef uint32_t Words __attribute__((vector_size(4 * kWide)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWide)));

struct bf16 {
  uint16_t bits;
};

INLINE Floats splat(float x) { return x - Floats{}; }

INLINE Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

INLINE Floats load(const bf16* p) {
#if defined(__AVX512BW__)
  // One shuffle instead of a widening and a shift, which would compete with the multiplications.
  const __m512i words = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  const __m512i halves =
      (__m512i)(Words{0x00000000, 0x00010000, 0x00020000, 0x00030000, 0x00040000, 0x00050000,
                      0x00060000, 0x00070000, 0x00080000, 0x00090000, 0x000a0000, 0x000b0000,
                      0x000c0000, 0x000d0000, 0x000e0000, 0x000f0000});
  return (Floats)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, halves, words);
#else
  Halves h;
  __builtin_memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Words) << 16);
#endif
}

INLINE void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

#ifdef __AVX512BF16__

INLINE void store(bf16* p, Floats v) {
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &h, sizeof h);
}

#else

// Rounds to nearest even. A NaN must not round up into an infinity, so it becomes the quiet NaN.
INLINE void store(bf16* p, Floats v) {
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words nan = (Words)(v != v);
  const Halves h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Halves);
  __builtin_memcpy(p, &h, sizeof h);
}

#endif

// kWide elements of which only `count` exist, 0 or more.
template <class T>
INLINE Floats load_some(const T* p, int count) {
  if (count >= kWide) return load(p);
  T padded[kWide] = {};
  for (int i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

#ifdef __AVX512F__
template <>
INLINE Floats load_some(const float* p, int count) {
  return (Floats)_mm512_maskz_loadu_ps(count >= 16 ? 0xffff : (1 << count) - 1, p);
}
#endif

template <class T>
INLINE void store_some(T* p, Floats v, int count) {
  if (count >= kWide) return store(p, v);
  T padded[kWide];
  store(padded, v);
  for (int i = 0; i < count; ++i) p[i] = padded[i];
}

#ifdef __AVX512F__
template <>
INLINE void store_some(float* p, Floats v, int count) {
  _mm512_mask_storeu_ps(p, count >= 16 ? 0xffff : (1 << count) - 1, (__m512)v);
}
#endif

INLINE Floats smaller(Floats a, Floats b) { return a > b ? b : a; }
INLINE Floats larger(Floats a, Floats b) { return a < b ? b : a; }
INLINE int larger(int a, int b) { return a < b ? b : a; }

// 1 / x of positive x.
INLINE Floats reciprocal(Floats x) {
#ifdef __AVX512F__
  // An estimate of 14 bits and a Newton step: a division takes as long as sixteen multiplications.
  const Floats estimate = (Floats)_mm512_rcp14_ps((__m512)x);
  return estimate * (2.0f - x * estimate);
#else
  return 1.0f / x;
#endif
}

// e^x by e^x = 2^n e^r, |r| <= ln 2 / 2, and the Taylor polynomial of degree 7 (error < 1e-8).
// Saturates beyond the range of float.
INLINE Floats exponential(Floats x) {
  x = smaller(larger(x, splat(-87.0f)), splat(88.0f));
  const Floats shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = (x * 1.44269504f + shifter) - shifter;
  const Floats r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Floats y = r * (1.0f / 5040) + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return (Floats)((Ints)y + (__builtin_convertvector(n, Ints) << 23));
}

// ln x of positive normal x: x = 2^n m with m in [1/sqrt 2, sqrt 2), and ln m = 2 artanh s,
// s = (m - 1) / (m + 1), by its series to s^11 (error < 1e-8).
INLINE Floats logarithm(Floats x) {
  const Ints bits = (Ints)x;
  const Ints n = (bits - 0x3f3504f3) >> 23;
  const Floats m = (Floats)(bits - (n << 23));
  const Floats s = (m - 1.0f) * reciprocal(m + 1.0f), q = s * s;
  Floats y = q * (2.0f / 11) + 2.0f / 9;
  y = y * q + 2.0f / 7;
  y = y * q + 2.0f / 5;
  y = y * q + 2.0f / 3;
  y = y * q * s + 2.0f * s;
  return __builtin_convertvector(n, Floats) * 0.69314718f + y;
}

INLINE Floats sigmoid(Floats x) { return reciprocal(1.0f + exponential(-x)); }

// Abramowitz and Stegun, 7.1.26: |error| <= 1.5e-7.
INLINE Floats error_function(Floats x) {
  const Floats size = larger(x, -x);
  const Floats t = reciprocal(1.0f + 0.3275911f * size);
  Floats y = t * 1.061405429f - 1.453152027f;
  y = y * t + 1.421413741f;
  y = y * t - 0.284496736f;
  y = y * t + 0.254829592f;
  y = 1.0f - y * t * exponential(-size * size);
  return x < 0.0f ? -y : y;
}

INLINE Floats activate(Activation activation, Floats x) {
  switch (activation) {
    case Activation::silu:
      return x * sigmoid(x);
    case Activation::gelu:
      return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
    case Activation::gelu_tanh:
      // 1 + tanh(v) = 2 sigmoid(2 v)
      return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    case Activation::relu:
      return larger(x, Floats{});
  }
  return x;
}

}  // namespace
}  // namespace molehill::MOLEHILL_ISA
