// Loops over runs of contiguous elements, a vector at a time, with the ragged end handled once for all kernels.
#pragma once

#include "simd.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

ADVDL_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
ADVDL_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
// Towards minus and plus infinity; b > 0.
ADVDL_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
ADVDL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }
ADVDL_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <int i>
struct Index {
  static constexpr int value = i;
};

// How a vector at the current position is read, written and counted.
struct FullLanes {
  ADVDL_INLINE int64_t count(int64_t lanes) const { return lanes; }
  template <class T>
  ADVDL_INLINE auto read(const T* p) const {
    return load(p);
  }
  template <class T, class Vec>
  ADVDL_INLINE void write(T* p, Vec v) const {
    store(p, v);
  }
  // To an output that streams, if `streams`; p is then aligned to the vector.
  template <class T, class Vec>
  ADVDL_INLINE void write_out(T* p, Vec v, bool streams) const {
    streams ? stream(p, v) : store(p, v);
  }
  // v with zeros in lanes that do not count, for sums.
  template <class Vec>
  ADVDL_INLINE Vec counted(Vec v) const {
    return v;
  }
};
// The last vector of a run, moved back to end with it: its first `seen` lanes were processed before.
struct OverlapLanes : FullLanes {
  int32_t seen;
  ADVDL_INLINE explicit OverlapLanes(int64_t n) : seen(static_cast<int32_t>(n)) {}
  template <class T, class Vec>
  ADVDL_INLINE void write_out(T* p, Vec v, bool) const {
    store(p, v);
  }
  template <class Vec>
  ADVDL_INLINE Vec counted(Vec v) const {
    return math::select(lane_index<decltype(v < v)>() >= seen, v, Vec{});
  }
};
// A run shorter than a vector.
struct PartialLanes {
  int32_t first;
  ADVDL_INLINE int64_t count(int64_t) const { return first; }
  template <class T>
  ADVDL_INLINE auto read(const T* p) const {
    return load_partial(p, first);
  }
  template <class T, class Vec>
  ADVDL_INLINE void write(T* p, Vec v) const {
    store_partial(p, v, first);
  }
  template <class T, class Vec>
  ADVDL_INLINE void write_out(T* p, Vec v, bool) const {
    store_partial(p, v, first);
  }
  template <class Vec>
  ADVDL_INLINE Vec counted(Vec v) const {
    return math::select(lane_index<decltype(v < v)>() < first, v, Vec{});
  }
};

// f(position, lanes, Index<k>) over [0, n); with kChains = 4, k cycles through 0..3, so that sums can keep four
// additions in flight. With kOverlap the last vector may overlap the one before: what is written must not be read again.
template <class Acc, int kChains, bool kOverlap = true, class F>
ADVDL_INLINE void for_vectors(int64_t n, F&& f) {
  constexpr int64_t lanes = Simd<Acc>::lanes;
  int64_t i = 0;
  if constexpr (kChains == 4) {
    for (; i + 4 * lanes <= n; i += 4 * lanes) {
      f(i, FullLanes{}, Index<0>{});
      f(i + lanes, FullLanes{}, Index<1>{});
      f(i + 2 * lanes, FullLanes{}, Index<2>{});
      f(i + 3 * lanes, FullLanes{}, Index<3>{});
    }
  }
  for (; i + lanes <= n; i += lanes) f(i, FullLanes{}, Index<0>{});
  if (i == n) return;
  if (kOverlap && n >= lanes) {
    f(n - lanes, OverlapLanes{lanes - (n - i)}, Index<0>{});
  } else {
    f(i, PartialLanes{static_cast<int32_t>(n - i)}, Index<0>{});
  }
}

// Constants of the channels along a run: the same for every element (channels_first), or one for each (channels_last;
// the array is readable up to a full vector past the end).
template <class Acc, bool kVary>
struct ChannelValue {
  typename Simd<Acc>::Vec same;
  const Acc* each;
  ADVDL_INLINE explicit ChannelValue(const Acc* p) : same{}, each(p) {
    if constexpr (!kVary) same = broadcast(*p);
  }
  ADVDL_INLINE typename Simd<Acc>::Vec at(int64_t i) const {
    if constexpr (kVary) return load(each + i);
    return same;
  }
};

// values[0..n) = act(values) or act'(values); n is a multiple of the lanes.
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

// f<T>() for the element type.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f64:
      return f.template operator()<double>();
    case DType::f16:
      return f.template operator()<Float16>();
    case DType::bf16:
      return f.template operator()<BFloat16>();
  }
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
