// How the work of a norm is distributed over the grid: tiles of channels, splits of their positions, and the loop of a
// thread over its share. Algorithms, bytes and launches: docs/kernels.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/arena.h"
#include "launch.h"
#include "vec.h"

namespace advdl_ops::cuda {

inline constexpr int kThreads = 256;  // of the kernels that split a channel over blocks
// Of the kernels that keep a slab in shared memory, at most.
inline constexpr int kFusedThreads = 512;
inline constexpr int kMaxColumns = 32;  // of a tile: at most one per thread of a warp

// The shared memory of a block.
using SharedArena = ArenaOf<16>;

// How the work is distributed over the grid. A tile has `columns` columns, one for each group of threads: packs of
// neighbouring channels (channels_last), or rows (channels_first, where only tiny sets have several in a tile).
struct Plan {
  int64_t channels = 0, row = 0;  // channels_first: number of interleaved rows, elements of one
  int64_t size = 0;               // elements of x
  int64_t count = 0;              // elements that share statistics
  int64_t packs = 1;              // positions per row (channels_first)
  int64_t positions = 0, per_split = 0;
  int64_t samples = 1, tiles = 0, splits = 1;  // group norm, channels_last: each sample has `tiles`
  int columns = 1;
  int tile_packs = 1;  // columns in use (channels_last)
  int threads = kThreads;
  bool whole_packs = true;  // no pack crosses the end of a row
  // Process the tiles in reverse order: what the previous pass read last is still in L2.
  bool backwards = false;
  bool keep_dz = true;    // fused backward: both x and dz are kept in shared memory
  bool reads_dz = false;  // a second pass may read the dz that the first one stored
};

// ---- where a block and a thread are ----

struct Place {
  int64_t sample, tile, split;
};

__device__ __forceinline__ Place block_place(const Plan& plan) {
  const unsigned block = plan.backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const unsigned tiles = static_cast<unsigned>(plan.tiles);
  const unsigned all = tiles * static_cast<unsigned>(plan.samples), mine = block % all;
  return {mine / tiles, mine % tiles, block / all};
}

// A thread's positions: begin + member, + stride, ... below end, in row `row` (channels_first) or in column `column` of
// the tile of a sample. `slot` is the index of the first one in a slab, slot_step the distance to the next.
struct Work {
  int64_t sample = 0, tile = 0, row = 0;
  int64_t begin = 0, end = 0;
  int column = 0, member = 0, stride = 1;
  int slot = 0, slot_step = 1;
};

// This thread's share if the whole block works on one tile.
template <int V, bool CL>
__device__ __forceinline__ Work block_work(const Plan& plan, const Place& place) {
  const int thread = static_cast<int>(threadIdx.x);
  Work work;
  work.stride = static_cast<int>(blockDim.x) / plan.columns;
  work.column = CL ? thread % plan.columns : thread / work.stride;
  work.member = CL ? thread / plan.columns : thread % work.stride;
  work.sample = place.sample;
  work.tile = place.tile;
  work.row = place.tile * plan.columns + work.column;
  work.slot = CL ? work.member * plan.tile_packs + work.column : thread;
  work.slot_step = CL ? work.stride * plan.tile_packs : static_cast<int>(blockDim.x);
  work.begin = place.split * plan.per_split;
  work.end =
      work.begin + plan.per_split < plan.positions ? work.begin + plan.per_split : plan.positions;
  const bool used = CL ? work.column < plan.tile_packs &&
                             (place.tile * plan.tile_packs + work.column) * V < plan.channels
                       : work.row < plan.channels;
  if (!used) work.end = work.begin;
  return work;
}

template <int V, bool CL>
struct Cursor {
  int64_t start = 0, pack = 0;          // first element of the row; pack of the row
  int64_t row_step = 0, pack_step = 0;  // per stride
  int64_t stride_elements = 0;

  __device__ Cursor(const Plan& plan, const Work& work, int64_t position) {
    const int64_t stride = work.stride;
    if constexpr (CL) {
      start = (work.sample * plan.positions + position) * plan.channels +
              (work.tile * plan.tile_packs + work.column) * V;
      stride_elements = stride * plan.channels;
    } else {
      start = (position / plan.packs * plan.channels + work.row) * plan.row;
      pack = position % plan.packs;
      row_step = stride / plan.packs * plan.channels * plan.row;
      pack_step = stride % plan.packs;
      stride_elements = plan.channels * plan.row;
    }
  }
  __device__ int64_t at() const {
    if constexpr (CL) return start;
    return (start & -int64_t{V}) + pack * V;
  }
  __device__ unsigned mask(const Plan& plan) const {
    if (CL || V == 1 || plan.whole_packs) return kFullMask<V>;
    // Lanes [low, high) of the pack belong to the row.
    const int64_t low = start - at(), high = low + plan.row;
    unsigned mask = low > 0 ? kFullMask<V> << low : kFullMask<V>;
    if (high < V) mask = high > 0 ? mask & (kFullMask<V> >> (V - high)) : 0u;
    return mask & kFullMask<V>;
  }
  __device__ void advance(const Plan& plan) {
    if constexpr (CL) {
      start += stride_elements;
    } else {
      start += row_step;
      pack += pack_step;
      if (pack >= plan.packs) {
        pack -= plan.packs;
        start += stride_elements;
      }
    }
  }
};

// Calls body(at, mask, slot) for groups of U of the thread's positions: element offsets, wanted lanes (0: none), and
// the index of the first one in a slab (that of the k-th is slot + k * slot_step).
template <int V, bool CL, int U, class Body>
__device__ __forceinline__ void walk(const Plan& plan, const Work& work, Body body) {
  const int64_t stride = work.stride;
  int64_t position = work.begin + work.member;
  int slot = work.slot;
  if (position >= work.end) return;
  Cursor<V, CL> cursor(plan, work, position);
#pragma unroll 1
  for (; position < work.end; position += U * stride, slot += U * work.slot_step) {
    int64_t at[U];
    unsigned mask[U];
#pragma unroll
    for (int k = 0; k < U; ++k) {
      at[k] = cursor.at();
      mask[k] = position + k * stride < work.end ? cursor.mask(plan) : 0u;
      cursor.advance(plan);
    }
    body(at, mask, slot);
  }
}

}  // namespace advdl_ops::cuda
