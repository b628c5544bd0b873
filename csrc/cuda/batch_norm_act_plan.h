// What batch norm's forward and backward share on CUDA: the shared memory of a block, and the plan of a launch.
//
// One source serves both layouts and all types. A block owns a tile of channels (channels_first: one channel;
// channels_last: up to 32 packs of neighbouring channels) and a range of its positions (the split). Thread t works on
// column t % columns of the tile. Its "lanes" are the channels of a pack: one channel if the pack is along S, V
// channels if it is along C.
#pragma once

#include <algorithm>

#include "../common/batch_norm_act.h"
#include "norm_passes.h"
#include "norm_paths.h"

namespace advdl_ops::cuda {

// Shared memory: slabs of x and dz, the states of a reduction and its results, constants per channel. On the host, with
// a null pointer, it counts the bytes. `width` is the number of channels of the tile.
template <class T, int V, bool CL, template <class> class State>
struct BatchNormShared {
  using A = acc_t<T>;
  SharedArena arena;
  Pack<T, V>*x, *dz;
  Reduction<State<A>> reduction;
  A* constants;  // [which][width]

  ADVDL_HOST_DEVICE BatchNormShared(unsigned char* memory, const Plan& plan, int which, int slabs,
                                    bool reduces)
      : arena(memory),
        x(arena.take<Pack<T, V>>(slabs > 0 ? plan.positions * plan.columns : 0)),
        dz(arena.take<Pack<T, V>>(slabs > 1 ? plan.positions * plan.columns : 0)),
        reduction(arena, plan.threads, reduces ? plan.columns : 0, CL ? V : 1),
        constants(arena.take<A>(static_cast<int64_t>(which) * width(plan))) {}

  static ADVDL_HOST_DEVICE int width(const Plan& plan) { return plan.columns * (CL ? V : 1); }
};

// ---- host ----

inline bool channels_last(const BatchNormActShape& s) { return s.layout == Layout::channels_last; }

// Channels of a tile, the most over all pack sizes. Depends on the shape only, as do the two functions below.
inline int64_t tile_channels_of(const BatchNormActShape& s, bool fused) {
  if (!channels_last(s)) return 1;
  return std::min<int64_t>(s.c, fused ? kFusedTileBytes / element_bytes(s.dtype) : 256);
}

// Blocks that share a tile.
inline int64_t splits_of(const BatchNormActShape& s) {
  const int64_t count = s.n * s.s;
  const int64_t tile_channels = tile_channels_of(s, false);
  const int64_t blocks = kMultiprocessors * (channels_last(s) ? 8 : 16);
  const int64_t wanted = divide_up(count * tile_channels, kSplitElements);
  const int64_t useful = divide_up(blocks, divide_up(s.c, tile_channels));
  return std::max<int64_t>(1, std::min({wanted, useful, count}));
}

// Bytes of a slab in shared memory, the most over all pack sizes.
inline int64_t slab_bytes(const BatchNormActShape& s) {
  const int bytes = element_bytes(s.dtype), v = pack_elements(s.dtype);
  if (channels_last(s))
    return s.n * s.s * std::min<int64_t>(kFusedTileBytes, power_of_two_above(s.c) * bytes) + 16;
  const int64_t scalar = s.n * s.s * bytes;
  return std::max(scalar, row_takes_packs(s.s, v) ? s.n * packs_per_row(s.s, v) * v * bytes : 0) +
         16;
}

// How many slabs (0, 1 or `most`) a block can hold.
inline int slabs_that_fit(const BatchNormActShape& s, int most) {
  const int64_t room = static_cast<int64_t>(shared_memory_limit()) - kScratchReserve;
  for (int slabs = most; slabs > 0; --slabs)
    if (slab_bytes(s) * slabs <= room) return slabs;
  return 0;
}

inline bool fused_is_faster(const BatchNormActShape& s, Traffic fused, Traffic split) {
  const int64_t channel = s.n * s.s * element_bytes(s.dtype);
  Balance balance;
  balance.tensor_bytes = channel * s.c;
  balance.fused_tiles = divide_up(s.c, tile_channels_of(s, true));
  balance.tile_bytes = tile_channels_of(s, true) * channel;
  balance.split_blocks = divide_up(s.c, tile_channels_of(s, false)) * splits_of(s);
  balance.more_launches = channels_last(s) ? 2 : 1;
  return fused_is_faster(balance, fused, split);
}

inline bool is_empty(const BatchNormActShape& s) { return s.n == 0 || s.s == 0; }

inline Plan make_plan(const BatchNormActShape& s, int v, bool fused, int unroll) {
  Plan plan;
  const bool last = channels_last(s);
  plan.channels = s.c;
  plan.row = last ? 1 : s.s;
  plan.count = s.n * s.s;
  plan.size = plan.count * s.c;
  if (last) {
    const int64_t packs = divide_up(s.c, v);
    const int64_t most = fused ? kFusedTileBytes / (v * element_bytes(s.dtype)) : kMaxColumns;
    plan.columns = static_cast<int>(std::min<int64_t>(power_of_two_above(packs), most));
    plan.tile_packs = plan.columns;
    plan.tiles = divide_up(packs, plan.columns);
    plan.positions = plan.count;
  } else {
    plan.packs = std::max<int64_t>(1, packs_per_row(s.s, v));
    plan.whole_packs = s.s % v == 0;
    plan.tiles = s.c;
    plan.positions = s.s == 0 ? 0 : s.n * plan.packs;
  }
  if (fused) {
    plan.threads = fused_threads(plan.positions * plan.columns, unroll);
  } else {
    plan.splits = splits_of(s);
  }
  plan.per_split = divide_up(plan.positions, plan.splits);
  return plan;
}

// Calls body<T, V, CL, Simple>().
template <class Body>
void dispatch(const BatchNormActShape& s, Activation act, bool aligned, Body body) {
  const int v = kVectorBytes / element_bytes(s.dtype);
  const bool vectors = aligned && (channels_last(s) ? s.c % v == 0 : row_takes_packs(s.s, v));
  channels_last(s) ? dispatch_packs<true>(s.dtype, vectors, act, body)
                   : dispatch_packs<false>(s.dtype, vectors, act, body);
}

// Partial results of the splits: `fields` arrays of [splits][C].
template <class A>
struct BatchNormPartials {
  A* values;
  BatchNormPartials(const BatchNormActShape& s, int fields, Arena& arena)
      : values(arena.take<A>(fields * splits_of(s) * s.c)) {}
};

inline size_t partials_bytes(const BatchNormActShape& s, int fields) {
  return bytes_taken([&](Arena& arena) {
    with_acc_type(s.dtype, [&]<class A>() { BatchNormPartials<A>(s, fields, arena); });
  });
}

// One block per tile and split.
inline LaunchConfig tile_config(const Plan& plan, int64_t shared, void* stream) {
  return {plan.tiles * plan.splits, plan.threads, static_cast<size_t>(shared), stream};
}

}  // namespace advdl_ops::cuda
