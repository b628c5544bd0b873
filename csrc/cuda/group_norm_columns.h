// What group norm's forward and backward share on CUDA, channels_last. A lane is a channel, as in batch norm. But a
// tile belongs to one sample, and the results of its channels are merged into those of their sets.
#pragma once

#include <numeric>

#include "group_norm_plan.h"

namespace advdl_ops::cuda {

inline constexpr int64_t kWideChannels = 256;  // the most channels of a fused tile
// A fused tile is widened up to this many bytes if there are many tiles.
inline constexpr int64_t kWideBytes = 16 * 1024;

template <class T, int V, template <class> class State>
struct ColumnsShared {
  using A = acc_t<T>;
  SharedArena arena;
  Pack<T, V>*x, *dz;
  Reduction<State<A>> reduction;
  State<A>* sets;  // uses the scratch of the reduction, which is free by then
  A* constants;    // [which][columns * V]

  ADVDL_HOST_DEVICE ColumnsShared(unsigned char* base, const GroupPlan& plan, int which, int slabs,
                                  bool reduces)
      : arena(base),
        x(arena.take<Pack<T, V>>(slabs > 0 ? plan.positions * plan.tile_packs : 0)),
        dz(arena.take<Pack<T, V>>(slabs > 1 ? plan.positions * plan.tile_packs : 0)),
        reduction(arena, plan.threads, reduces ? plan.columns : 0, V),
        sets(reduction.scratch),
        constants(arena.take<A>(static_cast<int64_t>(which) * plan.columns * V)) {}
};

// ---- constants of the channels of a tile ----

// Calls body(i, c, set) for each channel of the tile: its index in the tile, the channel, its set.
template <int V, class Body>
__device__ __forceinline__ void for_channels(const GroupPlan& plan, const Place& place, Body body) {
  const int width = plan.tile_packs * V;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    const int64_t column = place.tile * width + i;
    if (column >= plan.channels) continue;
    const int64_t c = column % plan.c;
    body(i, c, place.sample * plan.groups + c / plan.set_channels);
  }
}

// Sets constants 0 (mean), 1 (rstd * weight), 2 (bias) and, with `with_rstd`, 3 (rstd), from statistics(i, set). Ends
// with a barrier.
template <int V, class Params, class A, class Statistics>
__device__ __forceinline__ void column_constants(const Params& p, const GroupPlan& plan,
                                                 const Place& place, bool with_rstd, A* constants,
                                                 Statistics statistics) {
  const int width = plan.columns * V;
  for_channels<V>(plan, place, [&](int i, int64_t c, int64_t set) {
    const SetStatistics<A> of = statistics(i, set);
    constants[i] = of.mean;
    constants[width + i] = of.rstd * load_param<A>(p.weight, p.shape.weight_dtype, c, A(1));
    constants[2 * width + i] = load_param<A>(p.bias, p.shape.weight_dtype, c, A(0));
    if (with_rstd) constants[3 * width + i] = of.rstd;
  });
  __syncthreads();
}

// Merges value(i) over the channels i of each set of the tile into sets[], with one warp per set. Ends with a barrier.
template <int V, class State, class Value>
__device__ __forceinline__ void merge_sets(const GroupPlan& plan, const Place& place, State* sets,
                                           Value value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, width = plan.tile_packs * V;
  const int64_t left = plan.channels - place.tile * width;
  const int members = static_cast<int>(plan.set_channels * plan.repeats);
  const int channels = static_cast<int>(plan.set_channels), c = static_cast<int>(plan.c);
  const int count = static_cast<int>(left < width ? left : width) / members;
#pragma unroll 1
  for (int set = static_cast<int>(threadIdx.x) / kWarp; set < count;
       set += static_cast<int>(blockDim.x) / kWarp) {
    State state{};
#pragma unroll 1
    for (int i = lane; i < members; i += kWarp)
      state.merge(value(i / channels * c + set * channels + i % channels));
    team_reduce(state, kWarp);
    if (lane == 0) sets[set] = state;
  }
  __syncthreads();
}

// The first set of the tile. If channels repeat (see fold), the only tile has all sets.
template <int V>
__device__ __forceinline__ int64_t first_set(const GroupPlan& plan, const Place& place) {
  return place.sample * plan.groups + place.tile * plan.tile_packs * V / plan.set_channels;
}

// ---- host ----

// If C is no multiple of the pack, `repeats` consecutive positions are read as one row of c = C * repeats channels,
// which is.
struct Folded {
  int64_t c, s, repeats;
};

inline Folded fold(const GroupNormShape& s) {
  const int64_t v = pack_elements(s.dtype), repeats = v / std::gcd(s.c, v);
  if (s.s % repeats != 0) return {s.c, s.s, 1};
  return {s.c * repeats, s.s / repeats, repeats};
}

inline int64_t vector_columns(const GroupNormShape& s) {
  const int64_t v = pack_elements(s.dtype);
  return fold(s).c % v == 0 ? v : 1;
}

// Threads along a row of `packs` packs: at least 8 (128 bytes) if the row has them, with the fewest idle threads.
inline int split_columns(int64_t packs) {
  const auto padded = [&](int columns) { return divide_up(packs, columns) * columns; };
  int best = static_cast<int>(std::min<int64_t>(power_of_two_above(packs), kMaxColumns));
  for (int columns = best / 2; columns >= 8; columns /= 2)
    if (padded(columns) < padded(best)) best = columns;
  return best;
}

// Channels of a tile. Depends on the shape only, as everything that decides how a sum is split.
inline int64_t split_tile_channels(const GroupNormShape& s) {
  const int64_t v = vector_columns(s), c = fold(s).c;
  return std::min<int64_t>(c, split_columns(divide_up(c, v)) * v);
}

// Channels of a fused tile: whole sets and whole packs. 0 if those are too many.
inline int64_t fused_tile_channels(const GroupNormShape& s) {
  const Folded f = fold(s);
  const int64_t bytes = element_bytes(s.dtype);
  int64_t tile = f.repeats > 1 ? f.c : std::lcm(s.c / s.groups, vector_columns(s));
  if (tile > kWideChannels) return 0;
  const auto worth_widening = [&] {
    return tile * bytes < kFusedTileBytes ||
           (2 * tile * f.s * bytes <= kWideBytes &&
            s.n * divide_up(f.c, 2 * tile) >= 2 * kMultiprocessors);
  };
  while (2 * tile <= std::min(f.c, kWideChannels) && worth_widening()) tile *= 2;
  return tile;
}

// Blocks that share a tile (some channels of one sample).
inline int64_t column_splits(const GroupNormShape& s) {
  const Folded f = fold(s);
  const int64_t tile_channels = split_tile_channels(s);
  const int64_t wanted = divide_up(f.s * tile_channels, kSplitElements);
  const int64_t useful = divide_up(kMultiprocessors * 4, s.n * divide_up(f.c, tile_channels));
  return std::max<int64_t>(1, std::min({wanted, useful, f.s}));
}

inline GroupPlan column_plan(const GroupNormShape& s, int v, bool fused, int unroll) {
  GroupPlan plan = make_plan(s);
  const Folded f = fold(s);
  plan.channels = f.c;
  plan.repeats = f.repeats;
  plan.samples = s.n;
  plan.positions = f.s;
  const int64_t packs = divide_up(f.c, v);
  if (fused) {
    plan.tile_packs = static_cast<int>(fused_tile_channels(s) / v);
    plan.columns = static_cast<int>(power_of_two_above(plan.tile_packs));
    plan.threads = std::max(plan.columns, fused_threads(f.s * plan.tile_packs, unroll));
  } else {
    plan.columns = plan.tile_packs = split_columns(packs);
    plan.splits = column_splits(s);
  }
  plan.tiles = divide_up(packs, plan.tile_packs);
  plan.per_split = divide_up(plan.positions, plan.splits);
  return plan;
}

// Whether packs can be read if the pointers are aligned.
inline bool columns_take_packs(const GroupNormShape& s) {
  return fold(s).c % pack_elements(s.dtype) == 0;
}

inline Balance column_balance(const GroupNormShape& s) {
  const Folded f = fold(s);
  const int64_t tile = fused_tile_channels(s), bytes = element_bytes(s.dtype);
  Balance balance{};
  balance.tensor_bytes = s.n * s.c * s.s * bytes;
  balance.fused_tiles = s.n * divide_up(f.c, tile);
  balance.tile_bytes = tile * f.s * bytes;
  balance.split_blocks = s.n * divide_up(f.c, split_tile_channels(s)) * column_splits(s);
  balance.more_launches = 2;
  return balance;
}

}  // namespace advdl_ops::cuda
