// act(group_norm(x) + residual) on CUDA, channels_first: a set is one run of D * S elements. The lanes of a pack may
// belong to several channels, so each looks up its weight and bias. Algorithms, bytes and launches: docs/kernels.md.
//
//   fused, or stats + apply (which merges the partial moments of its set itself)
#include "group_norm_plan.h"

namespace advdl_ops::cuda {
namespace {

// A run is split so that a block needs the weight and bias of about this many channels, at most.
constexpr int64_t kTableChannels = 2000;

template <class A>
struct Affine {
  A weight, bias;
};

template <class T, int V>
struct RunsShared {
  using A = acc_t<T>;
  SharedArena arena;
  Pack<T, V>* slab;
  Reduction<Moments<A>> reduction;
  Affine<A>* table;

  ADVDL_HOST_DEVICE RunsShared(unsigned char* base, const GroupPlan& plan, bool fused)
      : arena(base),
        slab(arena.take<Pack<T, V>>(fused ? slots(plan) : 0)),
        reduction(arena, plan.threads, plan.columns, 1, plan.columns == 1),
        table(arena.take<Affine<A>>(plan.table + V)) {}  // masked lanes may read past plan.table

  static ADVDL_HOST_DEVICE int64_t slots(const GroupPlan& plan) {
    const int team = plan.threads / plan.columns;
    return plan.columns == 1 ? plan.positions : (plan.positions + team - 1) / team * plan.threads;
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_stats_runs(const GroupNormForward p, const GroupPlan plan, acc_t<T>* workspace) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  SharedArena arena(memory);
  const Reduction<Moments<A>> reduction(arena, plan.threads, plan.columns, 1);
  const Place place = block_place(plan);
  Moments<A> states[1] = {};
  accumulate_statistics<T, V, false>(static_cast<const T*>(p.x), plan,
                                     block_work<V, false>(plan, place),
                                     static_cast<Pack<T, V>*>(nullptr), states);
  block_reduce(states, plan.columns, reduction.scratch, reduction.result);
  store_partials(plan, place, plan.columns, reduction.result, workspace);
}

// The lanes of a pack anywhere in a run. Each may belong to another channel.
template <class A, int V>
struct RunLanes {
  const Affine<A>* table = nullptr;  // begins with the channel that begins at element `start`
  int64_t start = 0, s = 1;
  A mean, rstd;
  A scale[V], bias[V];

  __device__ __forceinline__ void find(int64_t at) {
    const int64_t offset = at - start;  // negative if the run begins inside the pack
    const auto channel = static_cast<int64_t>(static_cast<uint64_t>(offset > 0 ? offset : 0) /
                                              static_cast<uint64_t>(s));
    const Affine<A>* entry = table + channel;
    if (V == 1 || s % V == 0) {
      const A only_scale = rstd * entry->weight, only_bias = entry->bias;
#pragma unroll
      for (int j = 0; j < V; ++j) scale[j] = only_scale, bias[j] = only_bias;
      return;
    }
    const int64_t left = (channel + 1) * s - offset;
    const int step = s < V ? static_cast<int>(s) : V;
    int next = left < V ? static_cast<int>(left) : V;  // lane of the next channel's first element
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j == next) {
        ++entry;
        next += step;
      }
      scale[j] = rstd * entry->weight;
      bias[j] = entry->bias;
    }
  }
  __device__ __forceinline__ A normalized(A x, int j) const {
    return (x - mean) * scale[j] + bias[j];
  }
};

// The channel of its set in which the thread's share of a run begins.
template <int V>
__device__ __forceinline__ int64_t first_channel(const GroupPlan& plan, const Work& work) {
  const int64_t cut = work.row * plan.row % V;  // elements of another run in the first pack
  const int64_t offset = work.begin * V - cut;
  return offset > 0 ? offset / plan.s : 0;
}

// Fills the table of the block's channels. The caller must synchronize afterwards.
template <int V, class A>
__device__ __forceinline__ void load_table(const GroupNormForward& p, const GroupPlan& plan,
                                           const Place& place, const Work& work, Affine<A>* table) {
  const int64_t set = place.tile * plan.columns % plan.groups;
  const int64_t first = set * plan.set_channels + first_channel<V>(plan, work);
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < plan.table; i += blockDim.x) {
    const int64_t c = (first + i) % plan.c;
    table[i] = {load_param<A>(p.weight, p.shape.weight_dtype, c, A(1)),
                load_param<A>(p.bias, p.shape.weight_dtype, c, A(0))};
  }
}

template <int V, class A>
__device__ __forceinline__ RunLanes<A, V> run_lanes(const GroupPlan& plan, const Work& work,
                                                    SetStatistics<A> statistics,
                                                    const Affine<A>* table) {
  RunLanes<A, V> lanes;
  lanes.table = table + work.column * plan.set_channels % plan.table;
  lanes.start = work.row * plan.row + first_channel<V>(plan, work) * plan.s;
  lanes.s = plan.s;
  lanes.mean = statistics.mean;
  lanes.rstd = statistics.rstd;
  return lanes;
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_apply_runs(const GroupNormForward p, const GroupPlan plan,
                          const acc_t<T>* workspace) {
  ADVDL_DYNAMIC_SHARED(memory);
  const RunsShared<T, V> shared(memory, plan, false);
  const Place place = block_place(plan);
  const Work work = block_work<V, false>(plan, place);
  load_table<V>(p, plan, place, work, shared.table);
  merge_partials(workspace, plan.splits, plan.channels, place.tile, 1, shared.reduction.scratch,
                 shared.reduction.result);
  const auto statistics = finish_statistics(p, plan, place.tile, shared.reduction.result[0],
                                            place.split == 0 && threadIdx.x == 0);
  auto lanes = run_lanes<V>(plan, work, statistics, shared.table);
  apply_forward<T, V, false, apply_unroll<T, V, true, Simple>(), Simple>(
      p, plan, work, static_cast<const Pack<T, V>*>(nullptr), lanes);
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kFusedThreads, 1)
    group_norm_fused_runs(const GroupNormForward p, const GroupPlan plan) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const RunsShared<T, V> shared(memory, plan, true);
  const Place place = block_place(plan);
  const Work work = block_work<V, false>(plan, place);
  load_table<V>(p, plan, place, work, shared.table);
  Moments<A> states[1] = {};
  accumulate_statistics<T, V, false>(static_cast<const T*>(p.x), plan, work, shared.slab, states);
  reduce_columns<false>(states, plan.columns, shared.reduction.scratch, shared.reduction.result);
  const auto statistics = finish_statistics(p, plan, work.row, shared.reduction.result[work.column],
                                            work.member == 0 && work.row < plan.sets);
  auto lanes = run_lanes<V>(plan, work, statistics, shared.table);
  apply_forward<T, V, false, apply_unroll<T, V, true, Simple>(), Simple>(p, plan, work, shared.slab,
                                                                         lanes);
}

// ---- host ----

GroupPlan run_plan(const GroupNormShape& s, int v, bool fused, int unroll) {
  GroupPlan plan = make_plan(s);
  set_rows(plan, plan.sets, s.set_size(), v);
  plan.tiles = plan.sets;
  if (!fused) {
    plan.splits = run_splits(s);
    plan.per_split = divide_up(plan.positions, plan.splits);
    plan.table = std::min(plan.set_channels, plan.per_split * v / s.s + 2);
    return plan;
  }
  plan.per_split = plan.positions;
  plan.threads = fused_threads(plan.packs, unroll);
  if (plan.packs <= kTeamPacks) {
    // About four packs per thread, and at least a sector per team if the run has one.
    const int64_t least = std::min<int64_t>(2, plan.packs);
    plan.threads = kTeamThreads;
    plan.columns = kTeamThreads /
                   static_cast<int>(std::max(least, power_of_two_above(divide_up(plan.packs, 4))));
    plan.tiles = divide_up(plan.sets, plan.columns);
  }
  plan.table = std::min(plan.columns * plan.set_channels, s.c);
  return plan;
}

bool is_fused(const GroupNormForward& p) {
  const GroupNormShape& s = p.shape;
  const int v = pack_elements(s.dtype);
  const bool fit =
      fits<false>(s.dtype, row_takes_packs(s.set_size(), v), [&]<class T, int V>() -> int64_t {
        return RunsShared<T, V>(nullptr, run_plan(s, V, true, stats_unroll<T, V>()), true)
            .arena.bytes;
      });
  const GroupPlan plan = run_plan(s, v, true, 4);
  Balance balance{};
  balance.tensor_bytes = plan.size * element_bytes(s.dtype);
  balance.fused_tiles = plan.tiles;
  balance.tile_bytes = plan.columns * plan.count * element_bytes(s.dtype);
  balance.split_blocks = s.sets() * run_splits(s);
  balance.more_launches = 1;
  const int64_t once = p.residual != nullptr ? 3 : 2;
  return fit && fused_is_faster(balance, {once, 0}, {once, 1});
}

template <class T, int V>
void launch_stats(const GroupNormForward& p, acc_t<T>* partials, void* stream) {
  const GroupPlan plan = run_plan(p.shape, V, false, 1);
  SharedArena arena;
  Reduction<Moments<acc_t<T>>>(arena, plan.threads, plan.columns, 1);
  launch("group_norm_stats_runs", &group_norm_stats_runs<T, V>,
         block_per_tile(plan, plan.splits, arena.bytes, stream), p, plan, partials);
}

template <class T, int V, bool Simple>
void run_path(const GroupNormForward& p, bool fused, void* workspace, void* stream) {
  using A = acc_t<T>;
  GroupPlan plan = run_plan(p.shape, V, fused, stats_unroll<T, V>());
  const int64_t shared = RunsShared<T, V>(nullptr, plan, fused).arena.bytes;
  const LaunchConfig config = block_per_tile(plan, plan.splits, shared, stream);
  if (fused) {
    launch("group_norm_fused_runs", &group_norm_fused_runs<T, V, Simple>, config, p, plan);
    return;
  }
  Arena arena(workspace);
  const GroupNormPartials<A> partials(3, plan.splits, plan.sets, arena);
  launch_stats<T, V>(p, partials.values, stream);
  plan.backwards = true;
  launch("group_norm_apply_runs", &group_norm_apply_runs<T, V, Simple>, config, p, plan,
         partials.values);
}

}  // namespace

// Blocks that share a run.
int64_t run_splits(const GroupNormShape& s) {
  const int64_t wanted = divide_up(s.set_size(), kSplitElements);
  const int64_t useful = divide_up(kMultiprocessors * 16, s.sets());
  const int64_t least = divide_up(s.c / s.groups, kTableChannels);
  return std::max({int64_t{1}, least, std::min(wanted, useful)});
}

void group_norm_run_moments(const GroupNormForward& p, bool vectors, void* partials, void* stream) {
  dispatch_packs<false>(p.shape.dtype, vectors, Activation::identity,
                        [&]<class T, int V, bool, bool Simple>() {
                          launch_stats<T, V>(p, static_cast<acc_t<T>*>(partials), stream);
                        });
}

size_t group_norm_runs_workspace(const GroupNormForward& p) {
  if (is_fused(p)) return 0;
  return bytes_taken([&](Arena& arena) {
    with_acc_type(p.shape.dtype, [&]<class A>() {
      GroupNormPartials<A>(3, run_splits(p.shape), p.shape.sets(), arena);
    });
  });
}

void group_norm_runs(const GroupNormForward& p, void* workspace, void* stream) {
  const bool fused = is_fused(p);
  const bool vectors = vector_aligned(p.x, p.residual, p.out) &&
                       row_takes_packs(p.shape.set_size(), pack_elements(p.shape.dtype));
  dispatch_packs<false>(p.shape.dtype, vectors, p.act, [&]<class T, int V, bool, bool Simple>() {
    run_path<T, V, Simple>(p, fused, workspace, stream);
  });
}

}  // namespace advdl_ops::cuda
