// The gradients of act(group_norm(x) + residual) on CUDA, channels_last. Algorithms, bytes and launches:
// docs/kernels.md.
//
//   fused + finalize_grads, or reduce + finalize_grads + apply
#include "group_norm_columns.h"

namespace advdl_ops::cuda {
namespace {

// results[i] has the sums of dz and dz * (x - mean) of a channel of the tile. Turns the second one into the sum of dz *
// xhat, and stores both as partials unless workspace is null.
template <int V, class A>
__device__ __forceinline__ void store_gradients(const GroupPlan& plan, const Place& place,
                                                const A* rstd, GradientSums<A>* results,
                                                A* workspace) {
  const int width = plan.tile_packs * V;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x))
    results[i].dz_x *= rstd[i];
  __syncthreads();
  if (workspace != nullptr) store_partials(plan, place, width, results, workspace);
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_backward_reduce_columns(const GroupNormBackward p, const GroupPlan plan,
                                       acc_t<T>* workspace) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const ColumnsShared<T, V, GradientSums> shared(memory, plan, 4, 0, true);
  const Place place = block_place(plan);
  column_constants<V>(p, plan, place, true, shared.constants,
                      [&](int, int64_t set) { return load_statistics<A>(p, set); });
  ForwardLanes<A, V> lanes;
  lanes.load(shared.constants, plan.columns);
  GradientSums<A> sums[V] = {};
  accumulate_gradients<T, V, true, Simple>(
      p, plan, block_work<V, true>(plan, place), lanes, static_cast<T*>(nullptr),
      static_cast<Pack<T, V>*>(nullptr), static_cast<Pack<T, V>*>(nullptr), sums);
  block_reduce(sums, plan.columns, shared.reduction.scratch, shared.reduction.result);
  store_gradients<V>(plan, place, shared.constants + 3 * plan.columns * V, shared.reduction.result,
                     workspace);
}

// Sets constants 3 (shift) and 4 (slope) from gradient(i, set). Ends with a barrier.
template <int V, class A, class Gradient>
__device__ __forceinline__ void gradient_constants(const GroupPlan& plan, const Place& place,
                                                   A* constants, Gradient gradient) {
  const int width = plan.columns * V;
  for_channels<V>(plan, place, [&](int i, int64_t, int64_t set) {
    const SetGradient<A> of = gradient(i, set);
    constants[3 * width + i] = of.shift;
    constants[4 * width + i] = of.slope;
  });
  __syncthreads();
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_backward_apply_columns(const GroupNormBackward p, const GroupPlan plan,
                                      const SetGradient<acc_t<T>>* gradients) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const ColumnsShared<T, V, GradientSums> shared(memory, plan, 5, 0, false);
  const Place place = block_place(plan);
  column_constants<V>(p, plan, place, false, shared.constants,
                      [&](int, int64_t set) { return load_statistics<A>(p, set); });
  gradient_constants<V>(plan, place, shared.constants,
                        [&](int, int64_t set) { return gradients[set]; });
  BackwardLanes<A, V> lanes;
  lanes.load(shared.constants, plan.columns);
  apply_backward<T, V, true, Simple>(p, plan, block_work<V, true>(plan, place), lanes,
                                     static_cast<const Pack<T, V>*>(nullptr),
                                     static_cast<const Pack<T, V>*>(nullptr));
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kFusedThreads, 1)
    group_norm_backward_fused_columns(const GroupNormBackward p, const GroupPlan plan,
                                      acc_t<T>* workspace) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const ColumnsShared<T, V, GradientSums> shared(memory, plan, 5, plan.keep_dz ? 2 : 1, true);
  Pack<T, V>* const kept_dz = plan.keep_dz ? shared.dz : nullptr;
  const Place place = block_place(plan);
  const Work work = block_work<V, true>(plan, place);
  column_constants<V>(p, plan, place, true, shared.constants,
                      [&](int, int64_t set) { return load_statistics<A>(p, set); });
  GradientSums<A> sums[V] = {};
  {
    ForwardLanes<A, V> lanes;
    lanes.load(shared.constants, plan.columns);
    accumulate_gradients<T, V, true, Simple>(p, plan, work, lanes, static_cast<T*>(nullptr),
                                             shared.x, kept_dz, sums);
  }
  GradientSums<A>* const results = shared.reduction.result;
  const A* const rstd = shared.constants + 3 * plan.columns * V;
  block_reduce(sums, plan.columns, shared.reduction.scratch, results);
  store_gradients<V>(plan, place, rstd, results, workspace);
  const int64_t first_column = place.tile * plan.tile_packs * V;
  merge_sets<V>(plan, place, shared.sets,
                [&](int i) { return weighted(p, (first_column + i) % plan.c, results[i]); });
  const int64_t first = first_set<V>(plan, place);
  gradient_constants<V>(plan, place, shared.constants, [&](int i, int64_t set) {
    return set_gradient(plan, rstd[i], shared.sets[set - first]);
  });
  BackwardLanes<A, V> lanes;
  lanes.load(shared.constants, plan.columns);
  apply_backward<T, V, true, Simple>(p, plan, work, lanes, static_cast<const Pack<T, V>*>(shared.x),
                                     static_cast<const Pack<T, V>*>(kept_dz));
}

// ---- host ----

// Slabs that the fused kernel keeps in shared memory: 2 (x and dz), 1 (x), or 0 if the fused path is not used.
int fused_slabs(const GroupNormBackward& p) {
  const GroupNormShape& s = p.shape;
  if (p.dx == nullptr || fused_tile_channels(s) == 0) return 0;
  Balance balance = column_balance(s);
  balance.more_launches = p.dweight != nullptr ? 1 : 2;
  return slabs_of_fused(p, balance, [&](int slabs) {
    return fits<true>(s.dtype, columns_take_packs(s), [&]<class T, int V>() -> int64_t {
      const GroupPlan plan = column_plan(s, V, true, kBackwardUnroll);
      return ColumnsShared<T, V, GradientSums>(nullptr, plan, 5, slabs, true).arena.bytes;
    });
  });
}

template <class T, int V, bool Simple>
void column_path(const GroupNormBackward& p, int slabs, void* workspace, void* stream) {
  using A = acc_t<T>;
  Arena arena(workspace);
  GroupPlan plan = column_plan(p.shape, V, slabs > 0, kBackwardUnroll);
  plan.reads_dz = stored_dz_is_exact(element_bytes(p.shape.dtype), p.act);
  plan.keep_dz = slabs > 1;
  const int64_t columns = plan.samples * plan.channels;
  if (slabs > 0) {
    const GroupNormPartials<A> partials(2, p.dweight != nullptr, columns, arena);
    const ColumnsShared<T, V, GradientSums> shared(nullptr, plan, 5, slabs, true);
    launch("group_norm_backward_fused_columns", &group_norm_backward_fused_columns<T, V, Simple>,
           block_per_tile(plan, 1, shared.arena.bytes, stream), p, plan,
           p.dweight != nullptr ? partials.values : nullptr);
    plan.splits = 1;
    group_norm_finalize_gradients(p, plan, partials.values, nullptr, stream);
    return;
  }
  const GroupNormBackwardMemory<A> memory(plan.splits, columns, plan.sets, arena);
  const ColumnsShared<T, V, GradientSums> reduce(nullptr, plan, 4, 0, true);
  launch("group_norm_backward_reduce_columns", &group_norm_backward_reduce_columns<T, V, Simple>,
         block_per_tile(plan, plan.splits, reduce.arena.bytes, stream), p, plan, memory.partials);
  group_norm_finalize_gradients(p, plan, memory.partials,
                                p.dx != nullptr ? memory.gradients : nullptr, stream);
  if (p.dx == nullptr) return;
  plan.backwards = true;
  const ColumnsShared<T, V, GradientSums> apply(nullptr, plan, 5, 0, false);
  launch("group_norm_backward_apply_columns", &group_norm_backward_apply_columns<T, V, Simple>,
         block_per_tile(plan, plan.splits, apply.arena.bytes, stream), p, plan, memory.gradients);
}

}  // namespace

size_t group_norm_backward_columns_workspace(const GroupNormBackward& p) {
  const GroupNormShape& s = p.shape;
  const bool fused = fused_slabs(p) > 0;
  const int64_t columns = s.n * fold(s).c;
  return bytes_taken([&](Arena& arena) {
    with_acc_type(s.dtype, [&]<class A>() {
      if (fused)
        GroupNormPartials<A>(2, p.dweight != nullptr, columns, arena);
      else
        GroupNormBackwardMemory<A>(column_splits(s), columns, s.sets(), arena);
    });
  });
}

void group_norm_backward_columns(const GroupNormBackward& p, void* workspace, void* stream) {
  const int slabs = fused_slabs(p);
  const bool vectors =
      vector_aligned(p.x, p.dout, p.saved, p.dx, p.dresidual) && columns_take_packs(p.shape);
  dispatch_packs<true>(p.shape.dtype, vectors, p.act, [&]<class T, int V, bool, bool Simple>() {
    column_path<T, V, Simple>(p, slabs, workspace, stream);
  });
}

}  // namespace advdl_ops::cuda
