// What both layouts of the depthwise convolution share: parameters in the type of the arithmetic, and the epilogue, which is that
// of the dense one as well.
#pragma once

#include "../common/depthwise_conv2d.h"
#include "dispatch.h"
#include "simd_math.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

// What is read soon, into the second-level cache: these loops multiply so much between two reads that the hardware's
// prefetchers and the reordering of instructions leave half of the time for waiting. `p` may lie past the end.
ADVDL_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

ADVDL_INLINE float widened(float v) { return v; }
ADVDL_INLINE double widened(double v) { return v; }
ADVDL_INLINE float widened(BFloat16 v) { return to_float(v); }
ADVDL_INLINE float widened(Float16 v) { return to_float(v); }

// to[i * step] = from[i], or `absent` where there is no array.
template <class Acc>
void widen(DType dtype, const void* from, Acc absent, Acc* to, int64_t count, int64_t step = 1) {
  if (from == nullptr) {
    for (int64_t i = 0; i < count; ++i) to[i * step] = absent;
    return;
  }
  with_type(dtype, [&]<class T>() {
    const T* source = static_cast<const T*>(from);
    for (int64_t i = 0; i < count; ++i) to[i * step] = static_cast<Acc>(widened(source[i]));
  });
}

// Outputs of so many bytes and more are written past the caches: so their inputs stay there (docs/performance.md).
inline constexpr int64_t kConvStreamBytes = 4 << 20;

// What follows the sum: act(sum * scale + shift + residual), stored as T.
template <class T>
struct Epilogue {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  const Acc* scale;   // [C]
  const Acc* shift;   // [C]
  const T* residual;  // as out, or null
  T* out;
  Activation act;
  Acc act_param;
  bool is_affine;
  bool streams = false;  // every vector that is written is then aligned

  // kColumns vectors of one run, `step` elements apart, from out[at] on; scale and shift are theirs. Loops are unrolled by
  // name, else gcc keeps the sums in memory.
  template <int kColumns, class Lanes>
  ADVDL_INLINE void finish(Vec (&sums)[kColumns], Vec scale_, Vec shift_, int64_t at, int64_t step,
                           const Lanes& lanes) const {
    if (is_affine) {
#pragma GCC unroll 8
      for (int k = 0; k < kColumns; ++k) sums[k] = sums[k] * scale_ + shift_;
    }
    if (residual != nullptr) {
#pragma GCC unroll 8
      for (int k = 0; k < kColumns; ++k) sums[k] += lanes.read(residual + at + k * step);
    }
    if (act == Activation::relu) {
      const Vec zero{};
#pragma GCC unroll 8
      for (int k = 0; k < kColumns; ++k) sums[k] = math::select(sums[k] < zero, zero, sums[k]);
    } else if (act != Activation::identity) {
      constexpr int64_t width = Simd<Acc>::lanes;
      alignas(64) Acc values[kColumns * width];
#pragma GCC unroll 8
      for (int k = 0; k < kColumns; ++k) store(values + k * width, sums[k]);
      activate_block<false>(act, act_param, values, kColumns * width);
#pragma GCC unroll 8
      for (int k = 0; k < kColumns; ++k) sums[k] = load(values + k * width);
    }
#pragma GCC unroll 8
    for (int k = 0; k < kColumns; ++k) lanes.write_out(out + at + k * step, sums[k], streams);
  }
};

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
