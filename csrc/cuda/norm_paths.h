// Host: the choice between one fused launch and several over splits, and the choice of the instantiation.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/activation.h"
#include "norm_passes.h"

namespace advdl_ops::cuda {

inline constexpr int64_t kSplitElements = 16384;  // a split is worth at least so many of a tile
inline constexpr int64_t kFusedTileBytes = 32;    // one DRAM sector per row, channels_last
// Bytes that a reduction needs beside the slabs, at most.
inline constexpr int64_t kScratchReserve = 8 * 1024;
// These are of an H200, and used for every GPU: which path is taken follows from the shape.
inline constexpr int64_t kLaunchBytes = 10 * 1024 * 1024;  // copied in the 2.5 us of a launch
// Half of the L2: writes pass through it too.
inline constexpr int64_t kCachedBytes = 25 * 1024 * 1024;

// Elements of a pack of 16 bytes; fp64 has no kernels for packs.
inline int pack_elements(DType dtype) {
  return dtype == DType::f64 ? 1 : kVectorBytes / element_bytes(dtype);
}

// Whether a row of S elements is long enough for packs of V: aligned, or with few of them cut.
inline bool row_takes_packs(int64_t s, int v) { return s % v == 0 || s >= 2 * v; }

inline int64_t packs_per_row(int64_t s, int v) { return s % v == 0 ? s / v : (s + v - 2) / v + 1; }

// Threads of a block that walks `packs` packs, `unroll` at a time.
inline int fused_threads(int64_t packs, int unroll) {
  int threads = 128;
  while (threads < kFusedThreads && packs > static_cast<int64_t>(threads) * unroll * 2)
    threads *= 2;
  return threads;
}

// Of a block that merges `items` partial results.
inline int finalize_threads(int64_t items) {
  int threads = 128;
  while (threads < kFinalizeThreads && items > 4 * threads) threads *= 2;
  return threads;
}

// A launch of `blocks` that merge `items` partial results each, of `columns` neighbouring columns.
template <class State>
LaunchConfig finalize_config(int64_t blocks, int64_t items, int columns, void* stream) {
  const int threads = finalize_threads(items);
  SharedArena arena;
  Reduction<State>(arena, threads, columns, 1);
  return {blocks, threads, static_cast<size_t>(arena.bytes), stream};
}

// Tensors of x's size that a path reads and writes in its first or only pass over them, and that it reads again.
struct Traffic {
  int64_t once, again;
};

// How long a path takes, in bytes at the copy rate: `pass` per tensor of `tensor` bytes, half for what L2 still has.
inline int64_t time_of(Traffic traffic, int64_t pass, int64_t tensor) {
  return (traffic.once + traffic.again) * pass - std::min(traffic.again * tensor, kCachedBytes) / 2;
}

// How a tensor lies over the multiprocessors on either path.
struct Balance {
  int64_t tensor_bytes;
  int64_t fused_tiles, tile_bytes;
  int64_t split_blocks, more_launches;
};

// A fused launch gives a multiprocessor one tile at a time, and those without a tile are idle. Splits give work to all, but more of
// it, and in more launches. A multiprocessor moves its share of the copy rate, whether its neighbours are busy or not.
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

// The traffic of backward with a second pass, fused with `slabs` kept (x and dz, x alone), or over splits (0).
template <class Params>
Traffic backward_traffic(const Params& p, int slabs) {
  const bool exact = stored_dz_is_exact(element_bytes(p.shape.dtype), p.act);
  const bool saved = p.z_source != ZSource::input;
  // dout, x, saved; dx, dresidual. Then x and either dz or what it is made of.
  const int64_t once = 3 + saved + (p.dresidual != nullptr);
  const int64_t again = 2 + (saved && !(exact && p.dresidual != nullptr));
  return {once, slabs > 1 ? 0 : slabs > 0 ? again - 1 : again};
}

// Slabs that a fused backward keeps in shared memory: x and dz, x alone, or 0 where it is not used. `fit(slabs)`: whether a block
// can hold them.
template <class Params, class Fit>
int slabs_of_fused(const Params& p, const Balance& balance, Fit fit) {
  const bool exact = stored_dz_is_exact(element_bytes(p.shape.dtype), p.act);
  for (int slabs = exact ? 2 : 1; slabs > 0; --slabs) {
    if (!fit(slabs)) continue;
    return fused_is_faster(balance, backward_traffic(p, slabs), backward_traffic(p, 0)) ? slabs : 0;
  }
  return 0;
}

// Calls body<T, V, CL, Simple>(). Packs of 16 bytes have kernels of their own for identity and relu (Simple). Single elements
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

// Zeros `count` values of the type of statistics and sums; none where there is no array.
inline void zero_values(void* values, int64_t count, DType dtype, void* stream) {
  if (values == nullptr || count == 0) return;
  const size_t bytes = static_cast<size_t>(count) * (dtype == DType::f64 ? 8 : 4);
  check(cudaMemsetAsync(values, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

}  // namespace advdl_ops::cuda
