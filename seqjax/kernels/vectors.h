// Vectors of numbers of type `real`, and their exponential, sigmoid and tanh. Each variant of the loops includes this
// file once. All is in an unnamed namespace, because variants must not share code.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace seqjax {
namespace {

using real = SEQJAX_REAL;

// Numbers per vector. The compiler splits vectors that are wider than those of the processor.
#ifdef __AVX512F__
constexpr int W = 64 / sizeof(real);
constexpr bool has_32_registers = true;
#else
constexpr int W = 32 / sizeof(real);
constexpr bool has_32_registers = false;
#endif

template <class number>
struct WholeNumber;
template <>
struct WholeNumber<float> {
  using type = int32_t;
};
template <>
struct WholeNumber<double> {
  using type = int64_t;
};
using whole = WholeNumber<real>::type;

typedef real V __attribute__((vector_size(W * sizeof(real))));
typedef whole I __attribute__((vector_size(W * sizeof(real))));

// A vector at any address. This is a struct and not a V with a lower alignment, because clang forgets the alignment of
// a typedef in some templates, and then takes an array of vectors for aligned that is not.
struct __attribute__((packed, may_alias)) Unaligned {
  V v;
};

inline V splat(real x) { return x - V{}; }
inline V load(const real* p) { return reinterpret_cast<const Unaligned*>(p)->v; }
inline void store(real* p, V v) { reinterpret_cast<Unaligned*>(p)->v = v; }

// The first `count` numbers of a vector, if it has so many; zeros take the place of the others.
#if defined(__AVX512F__)
inline uint32_t first(int64_t count) { return count >= W ? (1u << W) - 1 : (1u << count) - 1; }
inline __m512 load_first(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(__mmask16(first(count)), p); }
inline __m512d load_first(const double* p, int64_t count) { return _mm512_maskz_loadu_pd(__mmask8(first(count)), p); }
inline void store_first(float* p, __m512 v, int64_t count) { _mm512_mask_storeu_ps(p, __mmask16(first(count)), v); }
inline void store_first(double* p, __m512d v, int64_t count) { _mm512_mask_storeu_pd(p, __mmask8(first(count)), v); }
#elif defined(__AVX2__)
inline __m256i first(const float*, int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count >= 8 ? 8 : count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first(const double*, int64_t count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline __m256 load_first(const float* p, int64_t count) { return _mm256_maskload_ps(p, first(p, count)); }
inline __m256d load_first(const double* p, int64_t count) { return _mm256_maskload_pd(p, first(p, count)); }
inline void store_first(float* p, __m256 v, int64_t count) { _mm256_maskstore_ps(p, first(p, count), v); }
inline void store_first(double* p, __m256d v, int64_t count) { _mm256_maskstore_pd(p, first(p, count), v); }
#endif

#ifdef __AVX2__
#ifdef __AVX512F__
inline __m512 as_register(V v, float) { return __m512(v); }
inline __m512d as_register(V v, double) { return __m512d(v); }
#else
inline __m256 as_register(V v, float) { return __m256(v); }
inline __m256d as_register(V v, double) { return __m256d(v); }
#endif
inline V load(const real* p, int64_t count) { return V(load_first(p, count)); }
inline void store(real* p, V v, int64_t count) { store_first(p, as_register(v, real{}), count); }
#else
inline V load(const real* p, int64_t count) {
  if (count >= W) return load(p);
  real part[W] = {};
  std::memcpy(part, p, sizeof(real) * count);
  return load(part);
}
inline void store(real* p, V v, int64_t count) {
  if (count >= W) return store(p, v);
  real part[W];
  store(part, v);
  std::memcpy(p, part, sizeof(real) * count);
}
#endif

// x = k ln(2) + r with a whole k and |r| <= ln(2)/2; returns 2^k. Adding `shift`, which is 1.5 * 2^(bits of the
// fraction) plus the exponent's bias, rounds to a whole number in the last bits.
template <int fraction>
inline V power_of_two(V x, real shift, real high, real low, V& r) {
  V k = x * splat(real(1.44269504088896340736)) + splat(shift);
  const I power = reinterpret_cast<I>(k) << fraction;
  k -= splat(shift);
  r = x - k * splat(high) - k * splat(low);
  return reinterpret_cast<V>(power);
}

inline V between(V x, real low, real high) {  // NaN propagates
  x = x > splat(high) ? splat(high) : x;
  return x < splat(low) ? splat(low) : x;
}

// exp by the minimax functions of Cephes. The unused argument chooses the precision.
inline V exponential(V x, float) {
  V r;
  const V power = power_of_two<23>(between(x, -87, 88), 12583039, real(0.693359375), real(-2.12194440e-4), r);
  const V s = r * r;
  const V high_terms = (splat(1.9875691500e-4f) * r + splat(1.3981999507e-3f)) * s;
  const V middle_terms = splat(8.3334519073e-3f) * r + splat(4.1665795894e-2f);
  const V low_terms = splat(1.6666665459e-1f) * r + splat(5.0000001201e-1f);
  return (((high_terms + middle_terms) * s + low_terms) * s + (r + splat(1))) * power;
}

inline V exponential(V x, double) {
  V r;
  const V power = power_of_two<sizeof(real) == 8 ? 52 : 0>(
      between(x, -708, 709), real(6755399441056767.0), real(6.93145751953125e-1), real(1.42860682030941723212e-6), r);
  const V s = r * r;
  const V p =
      r * ((splat(real(1.26177193074810590878e-4)) * s + splat(real(3.02994407707441961300e-2))) * s + splat(1));
  const V q = ((splat(real(3.00198505138664455042e-6)) * s + splat(real(2.52448340349684104192e-3))) * s +
               splat(real(2.27265548208155028766e-1))) *
                  s +
              splat(2);
  return (splat(1) + splat(2) * p / (q - p)) * power;
}

inline V exponential(V x) { return exponential(x, real{}); }

inline V sigmoid(V x) { return splat(1) / (splat(1) + exponential(-x)); }

// tanh by the rational function of Eigen, accurate to two units in the last place.
inline V tangent(V x, float) {
  x = between(x, real(-7.90531110763549805), real(7.90531110763549805));
  const V s = x * x, s2 = s * s, s4 = s2 * s2;
  const V p =
      (splat(-2.76076847742355e-16f) * s2 + (splat(2.00018790482477e-13f) * s + splat(-8.60467152213735e-11f))) * s4 +
      ((splat(5.12229709037114e-08f) * s + splat(1.48572235717979e-05f)) * s2 +
       (splat(6.37261928875436e-04f) * s + splat(4.89352455891786e-03f)));
  const V q = (splat(1.19825839466702e-06f) * s + splat(1.18534705686654e-04f)) * s2 +
              (splat(2.26843463243900e-03f) * s + splat(4.89352518554385e-03f));
  return x * p / q;
}

// tanh by the rational function of Cephes for a small |x|, and by exp for a large one.
inline V tangent(V x, double) {
  const V size = x < V{} ? -x : x, s = x * x;
  const V p = (splat(real(-9.64399179425052238628e-1)) * s + splat(real(-9.92877231001918586564e1))) * s +
              splat(real(-1.61468768441708447952e3));
  const V q = ((s + splat(real(1.12811678491632931402e2))) * s + splat(real(2.23548839060100448583e3))) * s +
              splat(real(4.84406305325125486048e3));
  const V large = splat(1) - splat(2) / (exponential(size + size) + splat(1));
  return size < splat(real(0.625)) ? x + x * s * p / q : x < V{} ? -large : large;
}

inline V tangent(V x) { return tangent(x, real{}); }

// Forces a vector into a register, because the compiler would read it from memory again for every row.
inline void keep(V& v) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v));
#elif defined(__AVX__)
  asm volatile("" : "+x"(v));
#endif
}

}  // namespace
}  // namespace seqjax
