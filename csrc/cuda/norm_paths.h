// Host code: the choice between one fused launch and several launches over splits, and the choice of the instantiation.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/activation.h"
#include "norm_passes.h"

namespace advdl_ops::cuda {

inline constexpr int64_t kSplitElements = 16384;  // elements of a tile per split, about, or more
inline constexpr int64_t kFusedTileBytes = 32;    // one DRAM sector per row, channels_last
// Bytes of shared memory that a reduction needs in addition to the slabs, at most.
inline constexpr int64_t kScratchReserve = 8 * 1024;
// Both values are those of an H200. They are used for every GPU, so that the path depends on the shape only.
inline constexpr int64_t kLaunchBytes = 10 * 1024 * 1024;  // copied in the 2.5 us of a launch
// Half of the L2, because writes go through it too.
inline constexpr int64_t kCachedBytes = 25 * 1024 * 1024;

// Elements of a pack. fp64 has no kernels for packs.
inline int pack_elements(DType dtype) {
  return dtype == DType::f64 ? 1 : kVectorBytes / element_bytes(dtype);
}

// Whether a row of `s` elements is read in packs of `v`: it consists of whole packs, or is long enough that few are
// partial.
inline bool row_takes_packs(int64_t s, int v) { return s % v == 0 || s >= 2 * v; }

inline int64_t packs_per_row(int64_t s, int v) { return s % v == 0 ? s / v : (s + v - 2) / v + 1; }

// Threads of a block that walks `packs` packs, `unroll` at a time.
inline int fused_threads(int64_t packs, int unroll) {
  int threads = 128;
  while (threads < kFusedThreads && packs > static_cast<int64_t>(threads) * unroll * 2)
    threads *= 2;
  return threads;
}

// Threads of a block that merges `items` partial results.
inline int finalize_threads(int64_t items) {
  int threads = 128;
  while (threads < kFinalizeThreads && items > 4 * threads) threads *= 2;
  return threads;
}

// A launch of `blocks` blocks, each of which merges `items` partial results of `columns` neighbouring columns.
template <class State>
LaunchConfig finalize_config(int64_t blocks, int64_t items, int columns, void* stream) {
  const int threads = finalize_threads(items);
  SharedArena arena;
  Reduction<State>(arena, threads, columns, 1);
  return {blocks, threads, static_cast<size_t>(arena.bytes), stream};
}

// The memory traffic of a path in tensors of x's size: read or written once, and read again in a second pass.
struct Traffic {
  int64_t once, again;
};

// The time of a path, in bytes at the copy rate. Each tensor of `tensor` bytes takes `pass`. What is read again from L2
// takes half.
inline int64_t time_of(Traffic traffic, int64_t pass, int64_t tensor) {
  return (traffic.once + traffic.again) * pass - std::min(traffic.again * tensor, kCachedBytes) / 2;
}

// How evenly each path distributes a tensor over the multiprocessors.
struct Balance {
  int64_t tensor_bytes;
  int64_t fused_tiles, tile_bytes;
  int64_t split_blocks, more_launches;
};

// A fused launch gives a multiprocessor one tile at a time, and those without a tile are idle. Splits give work to all
// multiprocessors, but they read more and need more launches. The model: each multiprocessor has the same share of the
// copy rate, whether others are busy or not.
inline bool fused_is_faster(const Balance& b, Traffic fused, Traffic split) {
  const int64_t rounds = divide_up(b.fused_tiles, kMultiprocessors);
  const int64_t fused_pass = rounds * kMultiprocessors * b.tile_bytes;
  const int64_t split_pass =
      b.tensor_bytes * std::max(b.split_blocks, kMultiprocessors) / b.split_blocks;
  return time_of(fused, fused_pass, b.tensor_bytes) <=
         time_of(split, split_pass, b.tensor_bytes) + b.more_launches * kLaunchBytes;
}

inline bool is_simple(Activation act) {
  return act == Activation::identity || act == Activation::relu;
}

// The traffic of a backward with a second pass. `slabs`: 2 (fused, keeps x and dz), 1 (fused, keeps x) or 0 (splits).
template <class Params>
Traffic backward_traffic(const Params& p, int slabs) {
  const bool exact = stored_dz_is_exact(element_bytes(p.shape.dtype), p.act);
  const bool saved = p.z_source != ZSource::input;
  // Once: dout, x, saved; dx, dresidual. Again: x, and either dz or its inputs.
  const int64_t once = 3 + saved + (p.dresidual != nullptr);
  const int64_t again = 2 + (saved && !(exact && p.dresidual != nullptr));
  return {once, slabs > 1 ? 0 : slabs > 0 ? again - 1 : again};
}

// Slabs that a fused backward keeps in shared memory: 2 (x and dz), 1 (x), or 0 if the fused path is not used.
// fit(slabs): whether they fit into a block's shared memory.
template <class Params, class Fit>
int slabs_of_fused(const Params& p, const Balance& balance, Fit fit) {
  const bool exact = stored_dz_is_exact(element_bytes(p.shape.dtype), p.act);
  for (int slabs = exact ? 2 : 1; slabs > 0; --slabs) {
    if (!fit(slabs)) continue;
    return fused_is_faster(balance, backward_traffic(p, slabs), backward_traffic(p, 0)) ? slabs : 0;
  }
  return 0;
}

// Calls body<T, V, CL, Simple>(). For packs there are special kernels for identity and relu (Simple). Single elements
// and fp64 use the general ones.
template <class T, bool CL, class Body>
void with_pack(bool vectors, bool simple, Body body) {
  constexpr int V = kVectorBytes / sizeof(T);
  if constexpr (sizeof(T) <= 4) {
    if (vectors && simple) return body.template operator()<T, V, CL, true>();
    if (vectors) return body.template operator()<T, V, CL, false>();
  }
  body.template operator()<T, 1, CL, false>();
}

// Calls body<T>() for the element type.
template <class Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::f64:
      return body.template operator()<double>();
    case DType::f16:
      return body.template operator()<__half>();
    case DType::bf16:
      return body.template operator()<__nv_bfloat16>();
    default:
      return body.template operator()<float>();
  }
}

// with_pack() for an element type that is known at run time.
template <bool CL, class Body>
void dispatch_packs(DType dtype, bool vectors, Activation act, Body body) {
  with_type(dtype, [&]<class T>() { with_pack<T, CL>(vectors, is_simple(act), body); });
}

// Calls body<A>() for the type of statistics and sums.
template <class Body>
void with_acc_type(DType dtype, Body body) {
  if (dtype == DType::f64) return body.template operator()<double>();
  body.template operator()<float>();
}

// Zeros `count` values of the type of statistics and sums. `values` may be null.
inline void zero_values(void* values, int64_t count, DType dtype, void* stream) {
  if (values == nullptr || count == 0) return;
  const size_t bytes = static_cast<size_t>(count) * (dtype == DType::f64 ? 8 : 4);
  check(cudaMemsetAsync(values, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

}  // namespace advdl_ops::cuda
