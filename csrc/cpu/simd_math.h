// Element-wise functions on SIMD vectors, such as exp and tanh, and the activations of ../common/activation.h for them.
#pragma once

#include <math.h>

#include "simd.h"

namespace advdl_ops {
namespace math {

// x limited to [low, high]; NaN stays. It uses min and max instructions, because comparisons and selections would take a
// fifth of the time of exp.
ADVDL_INLINE FloatVec clamp(FloatVec x, float low, float high) {
  const FloatVec lower = broadcast(low), upper = broadcast(high);
#if defined(__AVX512F__)
  // The masked forms, because gcc 12 warns about its own header in the plain ones.
  const __m512 bounded = _mm512_maskz_min_ps(0xffff, (__m512)upper, (__m512)x);
  return (FloatVec)_mm512_maskz_max_ps(0xffff, (__m512)lower, bounded);
#elif defined(__AVX2__)
  return (FloatVec)_mm256_max_ps((__m256)lower, _mm256_min_ps((__m256)upper, (__m256)x));
#else
  const FloatVec bounded = select(x > upper, upper, x);
  return select(bounded < lower, lower, bounded);
#endif
}

// Added to a value below 2^22, it rounds that to an integer in the low bits of the sum: n, or n + 127.
constexpr float kRound = 12582912.f, kRoundToExponent = kRound + 127.f;

// exp(r) - 1 for |r| <= ln 2 / 2, with a minimax polynomial for (exp(r) - 1 - r) / r^2. The error is 4e-9 of exp(r).
ADVDL_INLINE FloatVec expm1_of_rest(FloatVec r) {
  FloatVec q = broadcast(1.381459872e-3f);
  q = q * r + 8.368718750e-3f;
  q = q * r + 4.166838809e-2f;
  q = q * r + 1.666652061e-1f;
  q = q * r + 4.999999345e-1f;
  return q * (r * r) + r;
}

// exp(x) = 2^n exp(r) with r = x - n ln 2, |r| <= ln 2 / 2: returns exp(r) - 1 and n.
ADVDL_INLINE FloatVec expm1_reduced(FloatVec x, IntVec& n) {
  const FloatVec shifted = x * 1.44269504088896341f + kRound;
  n = (IntVec)shifted - (IntVec)broadcast(kRound);
  const FloatVec count = shifted - kRound;
  FloatVec r = x - count * 0.693359375f;
  r = r + count * 2.12194440e-4f;
  return expm1_of_rest(r);
}

// 2^n for n in [-126, 127]; infinity for 128.
ADVDL_INLINE FloatVec power_of_two(IntVec n) { return (FloatVec)((n + 127) << 23); }

// Measured over all floats: at most 1.5 ulp in the normal range; overflow gives inf, NaN stays.
ADVDL_INLINE FloatVec exp(FloatVec x) {
  IntVec n;
  const FloatVec p = expm1_reduced(clamp(x, -104.f, 89.f), n) + 1.f;
  // Two factors, because 2^n itself may exceed the exponent range although the product does not.
  const IntVec half = n >> 1;
  return p * power_of_two(half) * power_of_two(n - half);
}

// 1 + exp(x). Below the lower bound it is 1, so 2^n needs no second factor; it may overflow to infinity slightly early.
// Silu and the sigmoid spend their time here, so a shift makes n the exponent, and with FMA ln 2 is one constant instead
// of two. Its error is 2e-9 n: less than one rounding up to |x| = 20, and two roundings at 87.
ADVDL_INLINE FloatVec one_plus_exp(FloatVec x) {
  x = clamp(x, -87.f, 89.f);
  const FloatVec shifted = x * 1.44269504088896341f + kRoundToExponent;
  const FloatVec count = shifted - kRoundToExponent;
#if defined(__FMA__)
  const FloatVec r = x - count * 0.693147182f;
#else
  const FloatVec r = (x - count * 0.693359375f) + count * 2.12194440e-4f;
#endif
  const FloatVec power = (FloatVec)((IntVec)shifted << 23);
  return (expm1_of_rest(r) + 1.f) * power + 1.f;
}

ADVDL_INLINE FloatVec expm1(FloatVec x) {
  IntVec n;
  const FloatVec p = expm1_reduced(clamp(x, -30.f, 89.f), n);
  const IntVec half = n >> 1;
  const FloatVec scale = power_of_two(half);
  const FloatVec rest = power_of_two(n - half);
  return (p * scale) * rest + (scale * rest - 1.f);
}

// tanh x = e / (e + 2) with e = expm1(2 x); odd except for rounding. Within the bounds 2^n cannot overflow, so one
// factor is enough.
ADVDL_INLINE FloatVec tanh(FloatVec x) {
  IntVec n;
  const FloatVec p = expm1_reduced(clamp(x, -10.f, 10.f) * 2.f, n);
  const FloatVec power = power_of_two(n);
  const FloatVec e = p * power + (power - 1.f);
  return e / (e + 2.f);
}

// The cumulative normal distribution. Below zero it is half of erfc(|z| / sqrt 2) = p(|z|)^-4, with p by minimax on
// [0, 6] (the form of Abramowitz & Stegun 7.1.28): no branch, no exp, no cancellation. Error: at most 2 units of 2^-23.
ADVDL_INLINE FloatVec normal_cdf(FloatVec z) {
  const FloatVec a = (FloatVec)((IntVec)z & 0x7fffffff);
  FloatVec p = broadcast(7.705181702e-07f);
  p = p * a - 8.709649592e-06f;
  p = p * a + 5.070278712e-05f;
  p = p * a - 1.467448747e-04f;
  p = p * a + 3.478362341e-04f;
  p = p * a - 1.051216168e-04f;
  p = p * a + 1.699895482e-03f;
  p = p * a + 5.286666099e-03f;
  p = p * a + 2.631891891e-02f;
  p = p * a + 9.946683794e-02f;
  p = p * a + 1.994713545e-01f;
  p = p * a + 1.f;
  p = p * p;
  const FloatVec tail = 0.5f / (p * p);
  return select(z < 0.f, tail, 1.f - tail);
}

// fp64 is for gradient checks and references, so it calls the C library for each lane.
#define ADVDL_LANEWISE(name)                                           \
  ADVDL_INLINE DoubleVec name(DoubleVec x) {                           \
    DoubleVec y = x;                                                   \
    for (int i = 0; i < Simd<double>::lanes; ++i) y[i] = ::name(x[i]); \
    return y;                                                          \
  }
ADVDL_LANEWISE(exp)
ADVDL_LANEWISE(expm1)
ADVDL_LANEWISE(tanh)
#undef ADVDL_LANEWISE
ADVDL_INLINE DoubleVec one_plus_exp(DoubleVec x) { return exp(x) + 1.0; }
ADVDL_INLINE DoubleVec normal_cdf(DoubleVec z) {
  DoubleVec y;
  for (int i = 0; i < Simd<double>::lanes; ++i) y[i] = 0.5 * ::erfc(z[i] * -0.70710678118654752440);
  return y;
}

}  // namespace math
}  // namespace advdl_ops

// Included after the overloads above, because its formulas must find them.
#include "../common/activation.h"

namespace advdl_ops {

template <>
struct Lanes<FloatVec> {
  static ADVDL_INLINE FloatVec set(double v) { return broadcast(static_cast<float>(v)); }
};
template <>
struct Lanes<DoubleVec> {
  static ADVDL_INLINE DoubleVec set(double v) { return broadcast(v); }
};

namespace ADVDL_CAPABILITY_NAMESPACE {

// values[0..n) = act(values) or act'(values); n must be a multiple of the lanes.
template <bool kGrad, class Acc>
void activate_block(Activation act, Acc param, Acc* values, int64_t n) {
  using Vec = typename Simd<Acc>::Vec;
  const Vec p = broadcast(param);
  switch (act) {
#define ADVDL_CASE(name)                                                                       \
  case Activation::name:                                                                       \
    for (int64_t i = 0; i < n; i += Simd<Acc>::lanes) {                                        \
      const Vec z = load(values + i);                                                          \
      store(values + i,                                                                        \
            kGrad ? activate_grad(Activation::name, z, p) : activate(Activation::name, z, p)); \
    }                                                                                          \
    break;
    ADVDL_CASE(identity)
    ADVDL_CASE(relu)
    ADVDL_CASE(leaky_relu)
    ADVDL_CASE(elu)
    ADVDL_CASE(silu)
    ADVDL_CASE(gelu)
    ADVDL_CASE(gelu_tanh)
    ADVDL_CASE(sigmoid)
    ADVDL_CASE(tanh)
    ADVDL_CASE(hardswish)
    ADVDL_CASE(relu6)
#undef ADVDL_CASE
  }
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
