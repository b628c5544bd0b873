// What both layouts of the depthwise convolution share: conversion of parameters to the type of the arithmetic, and the
// epilogue. The other convolutions use the same epilogue.
#pragma once

#include <cstdlib>

#include "../common/depthwise_conv2d.h"
#include "dispatch.h"
#include "simd_math.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

// Prefetches into the second-level cache. These loops multiply so much between two reads that, with the hardware's
// prefetchers and out-of-order execution alone, half of the time would be spent waiting. `p` may be past the end of the
// array.
ADVDL_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

ADVDL_INLINE float widened(float v) { return v; }
ADVDL_INLINE double widened(double v) { return v; }
ADVDL_INLINE float widened(BFloat16 v) { return to_float(v); }
ADVDL_INLINE float widened(Float16 v) { return to_float(v); }

// Memory of one thread, in whole cache lines.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(count == 0
                  ? nullptr
                  : static_cast<T*>(std::aligned_alloc(64, round_up(count * sizeof(T), 64)))) {
    if (data_ == nullptr && count != 0) std::abort();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }

 private:
  T* data_;
};

// to[i * step] = from[i], or `absent` if `from` is null.
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

// Outputs of at least this many bytes bypass the caches, so that the inputs stay there (docs/performance.md).
inline constexpr int64_t kConvStreamBytes = 4 << 20;

// The epilogue: act(sum * scale + shift + residual), stored as T.
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
  bool streams = false;  // bypass the caches; every vector that is written must then be aligned

  // Finishes kColumns vectors of one run, `step` elements apart, from out[at] on, with their scale and shift. The loops
  // are unrolled explicitly, as gcc would otherwise keep the sums in memory.
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
