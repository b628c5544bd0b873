// act(group_norm(x) + residual) on CUDA, channels_last. Algorithms, bytes and launches: docs/kernels.md.
//
//   fused, or stats + finalize_stats + apply
#include "group_norm_columns.h"

namespace advdl_ops::cuda {
namespace {

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_stats_columns(const GroupNormForward p, const GroupPlan plan, acc_t<T>* workspace) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  SharedArena arena(memory);
  const Reduction<Moments<A>> reduction(arena, plan.threads, plan.columns, V);
  const Place place = block_place(plan);
  Moments<A> states[V] = {};
  accumulate_statistics<T, V, true>(static_cast<const T*>(p.x), plan,
                                    block_work<V, true>(plan, place),
                                    static_cast<Pack<T, V>*>(nullptr), states);
  block_reduce(states, plan.columns, reduction.scratch, reduction.result);
  store_partials(plan, place, plan.columns * V, reduction.result, workspace);
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_apply_columns(const GroupNormForward p, const GroupPlan plan) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const ColumnsShared<T, V, Moments> shared(memory, plan, 3, 0, false);
  const Place place = block_place(plan);
  column_constants<V>(p, plan, place, false, shared.constants,
                      [&](int, int64_t set) { return load_statistics<A>(p, set); });
  ForwardLanes<A, V> lanes;
  lanes.load(shared.constants, plan.columns);
  apply_forward<T, V, true, apply_unroll<T, V, true, Simple>(), Simple>(
      p, plan, block_work<V, true>(plan, place), static_cast<const Pack<T, V>*>(nullptr), lanes);
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kFusedThreads, 1)
    group_norm_fused_columns(const GroupNormForward p, const GroupPlan plan) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const ColumnsShared<T, V, Moments> shared(memory, plan, 3, 1, true);
  const Place place = block_place(plan);
  const Work work = block_work<V, true>(plan, place);
  Moments<A> states[V] = {};
  accumulate_statistics<T, V, true>(static_cast<const T*>(p.x), plan, work, shared.x, states);
  block_reduce(states, plan.columns, shared.reduction.scratch, shared.reduction.result);
  merge_sets<V>(plan, place, shared.sets, [&](int i) { return shared.reduction.result[i]; });
  const int64_t first = first_set<V>(plan, place);
  column_constants<V>(p, plan, place, false, shared.constants, [&](int i, int64_t set) {
    const bool first_of_set = i < plan.c && i % plan.set_channels == 0;
    return finish_statistics(p, plan, set, shared.sets[set - first], first_of_set);
  });
  ForwardLanes<A, V> lanes;
  lanes.load(shared.constants, plan.columns);
  apply_forward<T, V, true, apply_unroll<T, V, true, Simple>(), Simple>(p, plan, work, shared.x,
                                                                        lanes);
}

// ---- host ----

bool is_fused(const GroupNormForward& p) {
  const GroupNormShape& s = p.shape;
  if (fused_tile_channels(s) == 0) return false;
  const bool fit = fits<true>(s.dtype, columns_take_packs(s), [&]<class T, int V>() -> int64_t {
    const GroupPlan plan = column_plan(s, V, true, stats_unroll<T, V>());
    return ColumnsShared<T, V, Moments>(nullptr, plan, 3, 1, true).arena.bytes;
  });
  const int64_t once = p.residual != nullptr ? 3 : 2;
  return fit && fused_is_faster(column_balance(s), {once, 0}, {once, 1});
}

// With one group, a set is one run in this layout too, and its statistics need no sums per channel.
bool has_run_statistics(const GroupNormShape& s) { return s.groups == 1; }

template <class A>
GroupNormPartials<A> take_partials(const GroupNormShape& s, Arena& arena) {
  return has_run_statistics(s) ? GroupNormPartials<A>(3, run_splits(s), s.sets(), arena)
                               : GroupNormPartials<A>(3, column_splits(s), s.n * fold(s).c, arena);
}

template <class T, int V>
void launch_stats(const GroupNormForward& p, acc_t<T>* partials, void* stream) {
  using A = acc_t<T>;
  if (has_run_statistics(p.shape)) {
    group_norm_run_moments(p, V > 1, partials, stream);
    GroupPlan sets = make_plan(p.shape);
    sets.channels = sets.sets;
    sets.splits = run_splits(p.shape);
    sets.set_channels = 1;
    group_norm_finalize_moments(p, sets, partials, stream);
    return;
  }
  const GroupPlan plan = column_plan(p.shape, V, false, 1);
  SharedArena arena;
  Reduction<Moments<A>>(arena, plan.threads, plan.columns, V);
  launch("group_norm_stats_columns", &group_norm_stats_columns<T, V>,
         block_per_tile(plan, plan.splits, arena.bytes, stream), p, plan, partials);
  group_norm_finalize_moments(p, plan, partials, stream);
}

template <class T, int V, bool Simple>
void column_path(const GroupNormForward& p, bool fused, void* workspace, void* stream) {
  GroupPlan plan = column_plan(p.shape, V, fused, stats_unroll<T, V>());
  const ColumnsShared<T, V, Moments> shared(nullptr, plan, 3, fused ? 1 : 0, fused);
  const LaunchConfig config = block_per_tile(plan, plan.splits, shared.arena.bytes, stream);
  if (fused) {
    launch("group_norm_fused_columns", &group_norm_fused_columns<T, V, Simple>, config, p, plan);
    return;
  }
  Arena arena(workspace);
  launch_stats<T, V>(p, take_partials<acc_t<T>>(p.shape, arena).values, stream);
  plan.backwards = true;
  launch("group_norm_apply_columns", &group_norm_apply_columns<T, V, Simple>, config, p, plan);
}

}  // namespace

size_t group_norm_columns_workspace(const GroupNormForward& p) {
  if (is_fused(p)) return 0;
  return bytes_taken([&](Arena& arena) {
    with_acc_type(p.shape.dtype, [&]<class A>() { take_partials<A>(p.shape, arena); });
  });
}

void group_norm_columns(const GroupNormForward& p, void* workspace, void* stream) {
  const bool fused = is_fused(p);
  const bool vectors = vector_aligned(p.x, p.residual, p.out) && columns_take_packs(p.shape);
  dispatch_packs<true>(p.shape.dtype, vectors, p.act, [&]<class T, int V, bool, bool Simple>() {
    column_path<T, V, Simple>(p, fused, workspace, stream);
  });
}

}  // namespace advdl_ops::cuda
