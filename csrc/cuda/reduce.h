// Reductions in a fixed order, so that two runs agree bit for bit: over a warp by shuffles, over a block
// through shared memory, and over blocks through partial results in a workspace.
//
// A state is a Welford or a SumPair (csrc/common/welford.h): anything with merge() and shuffle_xor().
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/welford.h"

namespace advdl_ops::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kWholeWarp = 0xffffffffu;

template <class T>
__device__ __forceinline__ Welford<T> shuffle_xor(const Welford<T>& s, int offset) {
  return {__shfl_xor_sync(kWholeWarp, s.count, offset), __shfl_xor_sync(kWholeWarp, s.mean, offset),
          __shfl_xor_sync(kWholeWarp, s.m2, offset)};
}

template <class T>
__device__ __forceinline__ SumPair<T> shuffle_xor(const SumPair<T>& s, int offset) {
  return {__shfl_xor_sync(kWholeWarp, s.first, offset),
          __shfl_xor_sync(kWholeWarp, s.second, offset)};
}

// Shared bytes that block_reduce needs for `width` results in a block of `threads`.
template <class State>
ADVDL_HOST_DEVICE constexpr int64_t reduce_scratch(int threads, int width) {
  return static_cast<int64_t>(threads / kWarp) * width * static_cast<int64_t>(sizeof(State));
}

// Thread t holds Lanes states of column t % columns (a power of two, at most 32). Merges the states of equal
// column and lane over the block: result[(t % columns) * Lanes + lane]. Both arrays are shared memory; the
// result is visible to every thread on return. Threads of the block: a power of two, at least 32.
template <int Lanes, class State>
__device__ __forceinline__ void block_reduce(State (&states)[Lanes], int columns, State* scratch,
                                             State* result) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp;
  const int width = columns * Lanes;
#pragma unroll 1
  for (int offset = kWarp / 2; offset >= columns; offset /= 2) {
#pragma unroll
    for (int j = 0; j < Lanes; ++j) states[j].merge(shuffle_xor(states[j], offset));
  }
  if (lane < columns) {
#pragma unroll
    for (int j = 0; j < Lanes; ++j) scratch[warp * width + lane * Lanes + j] = states[j];
  }
  __syncthreads();
  // `warps` neighbouring threads share a result. Every thread walks the same rounds: shuffles need them all.
  const int group = thread / warps, member = thread % warps, groups = threads / warps;
#pragma unroll 1
  for (int first = 0; first < width; first += groups) {
    const int index = first + group;
    State state{};
    if (index < width) state = scratch[member * width + index];
#pragma unroll 1
    for (int offset = warps / 2; offset >= 1; offset /= 2) state.merge(shuffle_xor(state, offset));
    if (member == 0 && index < width) result[index] = state;
  }
  __syncthreads();
}

// Partial results of the splits of one reduction: `fields` arrays of [splits][columns].
template <class T>
__device__ __forceinline__ void store_partial(T* workspace, int64_t splits, int64_t columns,
                                              int64_t split, int64_t column, const Welford<T>& s) {
  const int64_t field = splits * columns, at = split * columns + column;
  workspace[at] = s.count;
  workspace[at + field] = s.mean;
  workspace[at + 2 * field] = s.m2;
}

template <class T>
__device__ __forceinline__ void store_partial(T* workspace, int64_t splits, int64_t columns,
                                              int64_t split, int64_t column, const SumPair<T>& s) {
  const int64_t field = splits * columns, at = split * columns + column;
  workspace[at] = s.first;
  workspace[at + field] = s.second;
}

template <class T>
__device__ __forceinline__ void load_partial(const T* workspace, int64_t splits, int64_t columns,
                                             int64_t split, int64_t column, Welford<T>& s) {
  const int64_t field = splits * columns, at = split * columns + column;
  s = {workspace[at], workspace[at + field], workspace[at + 2 * field]};
}

template <class T>
__device__ __forceinline__ void load_partial(const T* workspace, int64_t splits, int64_t columns,
                                             int64_t split, int64_t column, SumPair<T>& s) {
  const int64_t field = splits * columns, at = split * columns + column;
  s = {workspace[at], workspace[at + field]};
}

// The second stage: the block merges the partials of `columns` neighbouring columns, the first of them
// `column`, into result[0 .. columns).
template <class State, class T>
__device__ __forceinline__ void merge_partials(const T* workspace, int64_t splits,
                                               int64_t all_columns, int64_t column, int columns,
                                               State* scratch, State* result) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t mine = column + thread % columns;
  State states[1] = {};
  if (mine < all_columns) {
    constexpr int kBatch = 4;  // loads in flight
    const int64_t step = threads / columns;
#pragma unroll 1
    for (int64_t split = thread / columns; split < splits; split += kBatch * step) {
      State parts[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k)
        if (split + k * step < splits)
          load_partial(workspace, splits, all_columns, split + k * step, mine, parts[k]);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) states[0].merge(parts[k]);
    }
  }
  block_reduce(states, columns, scratch, result);
}

}  // namespace advdl_ops::cuda
