// Reductions in a fixed order, so that two calls agree bit for bit: over a warp with shuffles, over a block
// through shared memory, and over blocks through partial results in a workspace.
//
// A state has merge() and shuffle_xor(), such as Moments and GradientSums (csrc/common/moments.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/moments.h"

namespace advdl_ops::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kWholeWarp = 0xffffffffu;

// Channels per block in the second stage of a sum: one sector of a row of partial results.
inline constexpr int kFinalizeColumns = 8;
inline constexpr int kFinalizeThreads = 1024;  // at most

template <class A>
__device__ __forceinline__ A reciprocal_std(A var, double eps) {
  return A(1) / sqrt(var + static_cast<A>(eps));
}

template <class T>
__device__ __forceinline__ Moments<T> shuffle_xor(const Moments<T>& s, int offset) {
  return {__shfl_xor_sync(kWholeWarp, s.count, offset), __shfl_xor_sync(kWholeWarp, s.mean, offset),
          __shfl_xor_sync(kWholeWarp, s.m2, offset)};
}

template <class T>
__device__ __forceinline__ GradientSums<T> shuffle_xor(const GradientSums<T>& s, int offset) {
  return {__shfl_xor_sync(kWholeWarp, s.dz, offset), __shfl_xor_sync(kWholeWarp, s.dz_x, offset)};
}

// The number of rows of the scratch: one for each warp, or for each group of `columns` threads if that is more than a
// warp.
ADVDL_HOST_DEVICE constexpr int reduce_rows(int threads, int columns) {
  return threads / (columns < kWarp ? kWarp : columns);
}

// Merges the states of `team` neighbouring threads (a power of two, at most 32). All of them get the result.
template <class State>
__device__ __forceinline__ void team_reduce(State& state, int team) {
#pragma unroll 1
  for (int offset = team / 2; offset >= 1; offset /= 2) state.merge(shuffle_xor(state, offset));
}

// Thread t has Lanes states of column t % columns (a power of two, at most the number of threads). Merges the states of
// equal column and lane over the block into result[(t % columns) * Lanes + lane], visible to every thread on return.
// Both arrays are shared memory; scratch has reduce_rows() times the size of result. The block has a power of two of
// threads, at least 32.
template <int Lanes, class State>
__device__ __forceinline__ void block_reduce(State (&states)[Lanes], int columns, State* scratch,
                                             State* result) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int rows = reduce_rows(threads, columns), row_threads = threads / rows;
  const int lane = thread % row_threads, row = thread / row_threads;
  const int width = columns * Lanes;
#pragma unroll 1
  for (int offset = kWarp / 2; offset >= columns; offset /= 2) {
#pragma unroll
    for (int j = 0; j < Lanes; ++j) states[j].merge(shuffle_xor(states[j], offset));
  }
  if (lane < columns) {
#pragma unroll
    for (int j = 0; j < Lanes; ++j) scratch[row * width + lane * Lanes + j] = states[j];
  }
  __syncthreads();
  // `rows` neighbouring threads share a result. All threads take part in all rounds, because shuffles need them.
  const int group = thread / rows, member = thread % rows, groups = threads / rows;
#pragma unroll 1
  for (int first = 0; first < width; first += groups) {
    const int index = first + group;
    State state{};
    if (index < width) state = scratch[member * width + index];
    team_reduce(state, rows);
    if (member == 0 && index < width) result[index] = state;
  }
  __syncthreads();
}

// Partial results of the splits of one reduction: `fields` arrays of [splits][columns].
template <class T>
__device__ __forceinline__ void store_partial(T* workspace, int64_t splits, int64_t columns,
                                              int64_t split, int64_t column, const Moments<T>& s) {
  const int64_t field = splits * columns, at = split * columns + column;
  workspace[at] = s.count;
  workspace[at + field] = s.mean;
  workspace[at + 2 * field] = s.m2;
}

template <class T>
__device__ __forceinline__ void store_partial(T* workspace, int64_t splits, int64_t columns,
                                              int64_t split, int64_t column,
                                              const GradientSums<T>& s) {
  const int64_t field = splits * columns, at = split * columns + column;
  workspace[at] = s.dz;
  workspace[at + field] = s.dz_x;
}

template <class T>
__device__ __forceinline__ void load_partial(const T* workspace, int64_t splits, int64_t columns,
                                             int64_t split, int64_t column, Moments<T>& s) {
  const int64_t field = splits * columns, at = split * columns + column;
  s = {workspace[at], workspace[at + field], workspace[at + 2 * field]};
}

template <class T>
__device__ __forceinline__ void load_partial(const T* workspace, int64_t splits, int64_t columns,
                                             int64_t split, int64_t column, GradientSums<T>& s) {
  const int64_t field = splits * columns, at = split * columns + column;
  s = {workspace[at], workspace[at + field]};
}

// Merges load(first), load(first + step), ... below `count`.
template <class State, class Load>
__device__ __forceinline__ State merge_strided(int64_t first, int64_t step, int64_t count,
                                               Load load) {
  constexpr int kBatch = 4;  // loads in flight
  State state{};
#pragma unroll 1
  for (int64_t i = first; i < count; i += kBatch * step) {
    State parts[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (i + k * step < count) parts[k] = load(i + k * step);
#pragma unroll
    for (int k = 0; k < kBatch; ++k) state.merge(parts[k]);
  }
  return state;
}

// The second stage: the block merges the partial results of `columns` neighbouring columns, from `column` on, into
// result[0 .. columns).
template <class State, class T>
__device__ __forceinline__ void merge_partials(const T* workspace, int64_t splits,
                                               int64_t all_columns, int64_t column, int columns,
                                               State* scratch, State* result) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t mine = column + thread % columns;
  State states[1] = {};
  if (mine < all_columns)
    states[0] =
        merge_strided<State>(thread / columns, threads / columns, splits, [&](int64_t split) {
          State part;
          load_partial(workspace, splits, all_columns, split, mine, part);
          return part;
        });
  block_reduce(states, columns, scratch, result);
}

}  // namespace advdl_ops::cuda
