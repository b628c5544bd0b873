// What the norms share: how work lies over a grid, one pass over a tile for statistics, forward, and both halves of
// backward, and the choice between one launch and several. docs/kernels.md: algorithms, bytes, launches.
//
// Params is a ...Forward or ...Backward struct of csrc/common: these parts use the fields that all of them have.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "launch.h"
#include "reduce.h"
#include "vec.h"

namespace advdl_ops::cuda {

inline constexpr int kThreads = 256;  // of the kernels that split a channel over blocks
inline constexpr int kFusedThreads =
    512;  // at most, of the kernels that keep a slab in shared memory
inline constexpr int kMaxColumns = kWarp;
inline constexpr int64_t kSplitElements = 16384;  // a split is worth at least this many of a tile
inline constexpr int64_t kFusedTileBytes = 32;    // one DRAM sector per row, channels_last
inline constexpr int64_t kScratchReserve =
    8 * 1024;  // more than a reduction needs beside the slabs
// Of an H200, for every GPU: which path is taken follows from the shape.
inline constexpr int64_t kLaunchBytes =
    10 * 1024 * 1024;  // it copies in the 2.5 us of one launch more
inline constexpr int64_t kCachedBytes =
    25 * 1024 * 1024;  // half of its L2: writes pass through it too

// Packs in flight per thread and tensor. Statistics: 64 bytes, or 8 single elements.
template <class T, int V>
ADVDL_HOST_DEVICE constexpr int stats_unroll() {
  return V > 1 || sizeof(T) > 4 ? 4 : 8;
}
// Fewer where each lane keeps constants of its own (registers).
template <class T, int V, bool LanesDiffer, bool Simple>
ADVDL_HOST_DEVICE constexpr int apply_unroll() {
  return Simple && !(LanesDiffer && V > 4) ? 4 : 2;
}
// Two or three tensors are read at once.
inline constexpr int kBackwardUnroll = 2;

// Where each element carries the switch over all activations, the packs in flight take turns in one copy of the code:
// V elements of it are as much as instruction caches and the compiler bear well.
template <int V, bool Simple>
inline constexpr bool kTakeTurns = !Simple && V > 1;

template <int U, class Item>
__device__ __forceinline__ void next_turn(Item (&items)[U]) {
#pragma unroll
  for (int k = 0; k + 1 < U; ++k) items[k] = items[k + 1];
}

// How the work lies over the grid. A tile has `columns` columns, threads that work side by side: packs of neighbouring
// channels (channels_last), or rows in memory (channels_first; where several, those of tiny groups).
struct Plan {
  int64_t channels = 0, row = 0;  // channels_first: rows that alternate, elements of one
  int64_t size = 0;               // elements of x
  int64_t count = 0;              // elements that share statistics
  int64_t packs = 1;              // positions per row (channels_first)
  int64_t positions = 0, per_split = 0;
  int64_t samples = 1, tiles = 0, splits = 1;  // channels_last: a sample has tiles of its own
  int columns = 1;
  int tile_packs = 1;  // columns in use (channels_last)
  int threads = kThreads;
  bool whole_packs = true;  // no pack crosses the end of a row
  bool backwards =
      false;            // walk the blocks in reverse: what the pass before read last is still in L2
  bool keep_dz = true;  // fused backward: dz as well as x fits in shared memory
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
// the tile of a sample. `slot` is the place of the first one in a slab in shared memory, the next lies slot_step on.
struct Work {
  int64_t sample = 0, tile = 0, row = 0;
  int64_t begin = 0, end = 0;
  int column = 0, member = 0, stride = 1;
  int slot = 0, slot_step = 1;
};

// This thread's share where the whole block works on one tile.
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
    // lanes [low, high) of the pack belong to the row
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
// the thread's own slot of a slab in shared memory (slot + k * slot_step).
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

// ---- shared memory ----

// Hands out arrays of shared memory, each 16-byte aligned; on the host, from null, it counts their bytes.
struct SharedLayout {
  unsigned char* base;
  int64_t bytes = 0;

  template <class Item>
  ADVDL_HOST_DEVICE Item* take(int64_t count) {
    Item* items = reinterpret_cast<Item*>(base + bytes);
    bytes += (count * static_cast<int64_t>(sizeof(Item)) + 15) / 16 * 16;
    return items;
  }
};

// This thread's share of constant `which` of [which][columns * Lanes], channels_last; with one column, the only one.
template <int Lanes, class A>
__device__ __forceinline__ void load_constant(const A* constants, int which, int columns,
                                              A (&out)[Lanes]) {
  const A* from =
      constants + which * columns * Lanes + static_cast<int>(threadIdx.x) % columns * Lanes;
#pragma unroll
  for (int j = 0; j < Lanes; ++j) out[j] = from[j];
}

// What a lane needs, with one channel for the thread (Lanes = 1) or each lane a channel of its own.
template <class A, int Lanes>
struct ForwardLanes {
  A mean[Lanes], scale[Lanes], bias[Lanes];

  __device__ __forceinline__ void load(const A* constants, int columns) {
    load_constant(constants, 0, columns, mean);
    load_constant(constants, 1, columns, scale);
    load_constant(constants, 2, columns, bias);
  }
  // Lanes that depend on the place of the pack look themselves up here.
  __device__ __forceinline__ void find(int64_t) {}
  __device__ __forceinline__ A normalized(A x, int j) const {
    const int lane = Lanes == 1 ? 0 : j;
    return (x - mean[lane]) * scale[lane] + bias[lane];
  }
};

// Of dx = dz * scale - shift - (x - mean) * slope.
template <class A, int Lanes>
struct BackwardLanes : ForwardLanes<A, Lanes> {
  A shift[Lanes], slope[Lanes];

  __device__ __forceinline__ void load(const A* constants, int columns) {
    ForwardLanes<A, Lanes>::load(constants, columns);
    load_constant(constants, 3, columns, shift);
    load_constant(constants, 4, columns, slope);
  }
};

// ---- reductions ----

// Merges the states of each column of a tile: result[column * Lanes + lane] in shared memory, visible to all on return.
// The threads of a column lie `columns` apart (channels_last) or side by side: the block, or a part of a warp.
template <bool CL, int Lanes, class State>
__device__ __forceinline__ void reduce_columns(State (&states)[Lanes], int columns, State* scratch,
                                               State* result) {
  if (CL || columns == 1) return block_reduce(states, columns, scratch, result);
  const int thread = static_cast<int>(threadIdx.x), team = static_cast<int>(blockDim.x) / columns;
  team_reduce(states[0], team);
  if (thread % team == 0) result[thread / team] = states[0];
  __syncthreads();
}

// Writes the block's results, one per channel of the tile, to the workspace ([fields][splits][samples * channels]).
template <class State, class A>
__device__ __forceinline__ void store_partials(const Plan& plan, const Place& place, int width,
                                               const State* results, A* workspace) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    const int64_t c = place.tile * width + i;
    if (c < plan.channels)
      store_partial(workspace, plan.splits, plan.samples * plan.channels, place.split,
                    place.sample * plan.channels + c, results[i]);
  }
}

// ---- statistics ----

// Adds one group of packs along S: the group's own mean and deviations first (two passes over registers),
// then one Chan merge.
template <class T, int V, int U, class A>
__device__ __forceinline__ void add_group(const Pack<T, V> (&x)[U], const unsigned (&mask)[U],
                                          Welford<A>& state) {
  bool full = true;
#pragma unroll
  for (int k = 0; k < U; ++k) full = full && mask[k] == kFullMask<V>;
  A sum = A(0), m2 = A(0);
  if (full) {
#pragma unroll
    for (int k = 0; k < U; ++k)
#pragma unroll
      for (int j = 0; j < V; ++j) sum += to_acc(x[k].v[j]);
    const A mean = sum * (A(1) / A(U * V));  // a power of two
#pragma unroll
    for (int k = 0; k < U; ++k)
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A d = to_acc(x[k].v[j]) - mean;
        m2 += d * d;
      }
    state.merge({A(U * V), mean, m2});
    return;
  }
  int wanted = 0;
#pragma unroll
  for (int k = 0; k < U; ++k) {
    wanted += __popc(mask[k]);
#pragma unroll
    for (int j = 0; j < V; ++j) sum += mask[k] >> j & 1u ? to_acc(x[k].v[j]) : A(0);
  }
  if (wanted == 0) return;
  const A mean = sum / A(wanted);
#pragma unroll
  for (int k = 0; k < U; ++k)
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const A d = mask[k] >> j & 1u ? to_acc(x[k].v[j]) - mean : A(0);
      m2 += d * d;
    }
  state.merge({A(wanted), mean, m2});
}

// The same with each lane a channel of its own: a pack is wanted whole or not at all.
template <class T, int V, int U, class A>
__device__ __forceinline__ void add_group(const Pack<T, V> (&x)[U], const unsigned (&mask)[U],
                                          A& count, A (&mean)[V], A (&m2)[V]) {
  int wanted = 0;
#pragma unroll
  for (int k = 0; k < U; ++k) wanted += mask[k] != 0u;
  const A added = A(wanted), total = count + added;
  const A inverse = A(1) / added, share = added / total, weight = count * share;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    A sum = A(0), deviations = A(0);
#pragma unroll
    for (int k = 0; k < U; ++k) sum += mask[k] != 0u ? to_acc(x[k].v[j]) : A(0);
    const A group_mean = sum * inverse;
#pragma unroll
    for (int k = 0; k < U; ++k) {
      const A d = mask[k] != 0u ? to_acc(x[k].v[j]) - group_mean : A(0);
      deviations += d * d;
    }
    const A delta = group_mean - mean[j];
    m2[j] += deviations + delta * weight * delta;
    mean[j] += delta * share;
  }
  count = total;
}

// One pass over this thread's share of x. `kept`: where the packs stay for the second pass, or null.
template <class T, int V, bool CL, class A, int Lanes>
__device__ __forceinline__ void accumulate_statistics(const T* x, const Plan& plan,
                                                      const Work& work, Pack<T, V>* kept,
                                                      Welford<A> (&states)[Lanes]) {
  constexpr int U = stats_unroll<T, V>();
  A count = A(0), mean[Lanes] = {}, m2[Lanes] = {};
  walk<V, CL, U>(plan, work, [&](int64_t (&at)[U], unsigned (&mask)[U], int slot) {
    Pack<T, V> packs[U];
#pragma unroll
    for (int k = 0; k < U; ++k) packs[k] = load_pack<T, V, CL>(x, at[k], mask[k], plan.size);
    if (kept != nullptr) {
#pragma unroll
      for (int k = 0; k < U; ++k)
        if (mask[k] != 0u) kept[slot + k * work.slot_step] = packs[k];
    }
    if constexpr (CL) {
      add_group(packs, mask, count, mean, m2);
    } else {
      add_group(packs, mask, states[0]);
    }
  });
  if constexpr (CL) {
#pragma unroll
    for (int j = 0; j < Lanes; ++j) states[j] = {count, mean[j], m2[j]};
  }
}

// ---- forward ----

// Simple: identity or relu, decided by a flag at run time; otherwise the switch over all activations.
template <bool Simple, class A>
__device__ __forceinline__ A apply_activation(Activation act, A z, A param) {
  if constexpr (Simple) return act == Activation::relu ? activate(Activation::relu, z, param) : z;
  return activate(act, z, param);
}

template <bool Simple, class A>
__device__ __forceinline__ A apply_activation_grad(Activation act, A z, A param) {
  if constexpr (Simple)
    return act == Activation::relu ? activate_grad(Activation::relu, z, param) : A(1);
  return activate_grad(act, z, param);
}

// out = act(norm(x) + residual) over this thread's share; x from `kept` unless that is null.
template <class T, int V, bool CL, int U, bool Simple, class Params, class Lanes>
__device__ __forceinline__ void apply_forward(const Params& p, const Plan& plan, const Work& work,
                                              const Pack<T, V>* kept, Lanes& lanes) {
  using A = acc_t<T>;
  constexpr bool kTurns = kTakeTurns<V, Simple>;
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const A param = static_cast<A>(p.act_param);
  walk<V, CL, U>(plan, work, [&](int64_t (&at)[U], unsigned (&mask)[U], int slot) {
    Pack<T, V> packs[U], added[U];
    if (residual != nullptr) {
#pragma unroll
      for (int k = 0; k < U; ++k)
        added[k] = load_pack<T, V, CL>(residual, at[k], mask[k], plan.size);
    }
#pragma unroll
    for (int k = 0; k < U; ++k) {
      if (kept == nullptr) {
        packs[k] = load_pack<T, V, CL>(x, at[k], mask[k], plan.size);
      } else if (mask[k] != 0u) {
        packs[k] = kept[slot + k * work.slot_step];
      }
    }
#pragma unroll(kTurns ? 1 : U)
    for (int turn = 0; turn < U; ++turn) {
      const int k = kTurns ? 0 : turn;
      if (mask[k] != 0u) lanes.find(at[k]);
      A y[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        A z = lanes.normalized(to_acc(packs[k].v[j]), j);
        if (residual != nullptr) z += to_acc(added[k].v[j]);
        y[j] = apply_activation<Simple>(p.act, z, param);
      }
      store_pack<CL>(out, at[k], mask[k], make_pack<T, V>(y));
      if constexpr (kTurns) next_turn(at), next_turn(mask), next_turn(packs), next_turn(added);
    }
  });
}

// ---- backward ----

// The packs of one group that dz is made of. dz itself is read where an earlier pass wrote it (`ready`).
template <class T, int V, int U>
struct Inputs {
  Pack<T, V> x[U], dout[U], saved[U];

  __device__ __forceinline__ void next_turn() {
    cuda::next_turn(x), cuda::next_turn(dout), cuda::next_turn(saved);
  }
};

template <bool Simple, class Params, class T, int V, int U, class A, int Lanes>
__device__ __forceinline__ A gradient(const Params& p, const Inputs<T, V, U>& in, int k, int j,
                                      bool ready, const ForwardLanes<A, Lanes>& lanes, A param) {
  const A dout = to_acc(in.dout[k].v[j]);
  if (ready) return dout;
  A z;
  if (p.z_source == ZSource::output) {
    z = to_acc(in.saved[k].v[j]);
  } else {
    z = lanes.normalized(to_acc(in.x[k].v[j]), j);
    if (p.z_source == ZSource::residual) z += to_acc(in.saved[k].v[j]);
  }
  return dout * apply_activation_grad<Simple>(p.act, z, param);
}

// One pass: the sums of dz and dz * (x - mean); dresidual and, where dx depends on no sum, dx = dz * scale on the way.
template <class T, int V, bool CL, bool Simple, class Params, class A, int Lanes>
__device__ __forceinline__ void accumulate_gradients(const Params& p, const Plan& plan,
                                                     const Work& work,
                                                     const ForwardLanes<A, Lanes>& lanes, T* dx,
                                                     Pack<T, V>* kept_x, Pack<T, V>* kept_dz,
                                                     SumPair<A> (&sums)[Lanes]) {
  constexpr int U = kBackwardUnroll;
  constexpr bool kTurns = kTakeTurns<V, Simple>;
  const T *x = static_cast<const T*>(p.x), *dout = static_cast<const T*>(p.dout);
  const T* saved = p.z_source == ZSource::input ? nullptr : static_cast<const T*>(p.saved);
  T* dresidual = static_cast<T*>(p.dresidual);
  const A param = static_cast<A>(p.act_param);
  walk<V, CL, U>(plan, work, [&](int64_t (&at)[U], unsigned (&mask)[U], int slot) {
    Inputs<T, V, U> in;
#pragma unroll
    for (int k = 0; k < U; ++k) {
      in.dout[k] = load_pack<T, V, CL>(dout, at[k], mask[k], plan.size);
      in.x[k] = load_pack<T, V, CL>(x, at[k], mask[k], plan.size);
    }
    if (saved != nullptr) {
#pragma unroll
      for (int k = 0; k < U; ++k)
        in.saved[k] = load_pack<T, V, CL>(saved, at[k], mask[k], plan.size);
    }
#pragma unroll(kTurns ? 1 : U)
    for (int turn = 0; turn < U; ++turn) {
      const int k = kTurns ? 0 : turn;
      A dz[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int lane = Lanes == 1 ? 0 : j;
        dz[j] = gradient<Simple>(p, in, k, j, false, lanes, param);
        const bool wanted = CL ? mask[k] != 0u : (mask[k] >> j & 1u) != 0u;
        const A product = dz[j] * (to_acc(in.x[k].v[j]) - lanes.mean[lane]);
        sums[lane].merge({wanted ? dz[j] : A(0), wanted ? product : A(0)});
      }
      const Pack<T, V> rounded = make_pack<T, V>(dz);
      if (dresidual != nullptr) store_pack<CL>(dresidual, at[k], mask[k], rounded);
      if (mask[k] != 0u) {
        const int place = slot + turn * work.slot_step;
        if (kept_dz != nullptr) kept_dz[place] = rounded;
        if (kept_x != nullptr) kept_x[place] = in.x[k];
      }
      if (dx != nullptr) {
#pragma unroll
        for (int j = 0; j < V; ++j) dz[j] *= lanes.scale[Lanes == 1 ? 0 : j];
        store_pack<CL>(dx, at[k], mask[k], make_pack<T, V>(dz));
      }
      if constexpr (kTurns) next_turn(at), next_turn(mask), in.next_turn();
    }
  });
}

// dx from the merged sums. dz is read from `kept_dz` or dresidual, or computed again.
template <class T, int V, bool CL, bool Simple, class Params, class A, int Lanes>
__device__ __forceinline__ void apply_backward(const Params& p, const Plan& plan, const Work& work,
                                               const BackwardLanes<A, Lanes>& lanes,
                                               const Pack<T, V>* kept_x,
                                               const Pack<T, V>* kept_dz) {
  constexpr int U = kBackwardUnroll;
  constexpr bool kTurns = kTakeTurns<V, Simple>;
  const bool ready = plan.reads_dz && (kept_dz != nullptr || p.dresidual != nullptr);
  const T* x = static_cast<const T*>(p.x);
  const T* dout = static_cast<const T*>(ready && p.dresidual != nullptr ? p.dresidual : p.dout);
  const T* saved = ready || p.z_source == ZSource::input ? nullptr : static_cast<const T*>(p.saved);
  T* dx = static_cast<T*>(p.dx);
  const A param = static_cast<A>(p.act_param);
  walk<V, CL, U>(plan, work, [&](int64_t (&at)[U], unsigned (&mask)[U], int slot) {
    Inputs<T, V, U> in;
#pragma unroll
    for (int k = 0; k < U; ++k) {
      if (kept_dz == nullptr) {
        in.dout[k] = load_pack<T, V, CL>(dout, at[k], mask[k], plan.size);
      } else if (mask[k] != 0u) {
        in.dout[k] = kept_dz[slot + k * work.slot_step];
      }
      if (kept_x == nullptr) {
        in.x[k] = load_pack<T, V, CL>(x, at[k], mask[k], plan.size);
      } else if (mask[k] != 0u) {
        in.x[k] = kept_x[slot + k * work.slot_step];
      }
    }
    if (saved != nullptr) {
#pragma unroll
      for (int k = 0; k < U; ++k)
        in.saved[k] = load_pack<T, V, CL>(saved, at[k], mask[k], plan.size);
    }
#pragma unroll(kTurns ? 1 : U)
    for (int turn = 0; turn < U; ++turn) {
      const int k = kTurns ? 0 : turn;
      A result[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int lane = Lanes == 1 ? 0 : j;
        const A dz = gradient<Simple>(p, in, k, j, ready, lanes, param);
        const A centred = to_acc(in.x[k].v[j]) - lanes.mean[lane];
        result[j] = dz * lanes.scale[lane] - lanes.shift[lane] - centred * lanes.slope[lane];
      }
      store_pack<CL>(dx, at[k], mask[k], make_pack<T, V>(result));
      if constexpr (kTurns) next_turn(at), next_turn(mask), in.next_turn();
    }
  });
}

// ---- host ----

// Elements of a pack of the kernels for vectors; fp64 has none.
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

// Fused, a multiprocessor works on one tile at a time and those without a tile are idle; over splits there is work for
// all, but more of it and in more launches. A multiprocessor moves its share of the copy rate, busy neighbours or not.
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

// Whether dz as stored is dz itself. Rounded to half precision it is not, but for relu and identity, where it is dout
// or 0; dx must be made of the same dz as the sums.
inline bool stored_dz_is_exact(DType dtype, Activation act) {
  return element_bytes(dtype) >= 4 || is_simple(act);
}

// The traffic of backward with a second pass, fused with `slabs` kept (x and dz, x alone), or over splits (0).
template <class Params>
Traffic backward_traffic(const Params& p, int slabs) {
  const bool exact = stored_dz_is_exact(p.shape.dtype, p.act);
  const bool saved = p.z_source != ZSource::input;
  // dout, x, saved; dx, dresidual. Then x and either dz or what it is made of.
  const int64_t once = 3 + saved + (p.dresidual != nullptr);
  const int64_t again = 2 + (saved && !(exact && p.dresidual != nullptr));
  return {once, slabs > 1 ? 0 : slabs > 0 ? again - 1 : again};
}

// Calls body<T, V, CL, Simple>(). Packs of 16 bytes have kernels of their own for identity and relu; single
// elements and fp64 use the general ones.
template <class T, bool CL, class Body>
void with_pack(bool vectors, bool simple, Body body) {
  constexpr int V = kVectorBytes / sizeof(T);
  if constexpr (sizeof(T) <= 4) {
    if (vectors && simple) return body.template operator()<T, V, CL, true>();
    if (vectors) return body.template operator()<T, V, CL, false>();
  }
  body.template operator()<T, 1, CL, false>();
}

template <class Body>
void dispatch_types(DType dtype, Layout layout, bool vectors, Activation act, Body body) {
  const bool last = layout == Layout::channels_last, simple = is_simple(act);
  auto typed = [&]<class T>() {
    last ? with_pack<T, true>(vectors, simple, body) : with_pack<T, false>(vectors, simple, body);
  };
  switch (dtype) {
    case DType::f64:
      return typed.template operator()<double>();
    case DType::f16:
      return typed.template operator()<__half>();
    case DType::bf16:
      return typed.template operator()<__nv_bfloat16>();
    default:
      return typed.template operator()<float>();
  }
}

}  // namespace advdl_ops::cuda
