// y = act(batch_norm(x) + residual) on CUDA. Algorithms, bytes and launches: docs/kernels.md.
//
//   training  fused (a slab of the tile in shared memory), or stats [+ finalize_stats] + apply
//   no out    stats + finalize_stats
//   eval      apply
#include "batch_norm_act_plan.h"

namespace advdl_ops::cuda {
namespace {

using Forward = BatchNormActForward;

// ---- statistics ----

// Writes mean, rstd (without an output: the sum of squares) and the new running statistics of a channel.
template <class A>
__device__ __forceinline__ void write_training_statistics(const Forward& p, const Plan& plan,
                                                          int64_t c, A mean, A rstd, A var) {
  static_cast<A*>(p.mean)[c] = mean;
  static_cast<A*>(p.rstd)[c] = p.out == nullptr ? var * static_cast<A>(plan.count) : rstd;
  if (p.running_mean == nullptr) return;
  const DType dtype = p.shape.running_dtype;
  const A momentum = static_cast<A>(p.momentum), keep = static_cast<A>(1.0 - p.momentum);
  const A unbiased = var * (static_cast<A>(plan.count) / static_cast<A>(plan.count - 1));
  const A old_mean = load_param<A>(p.running_mean, dtype, c, A(0));
  const A old_var = load_param<A>(p.running_var, dtype, c, A(0));
  store_param(p.running_mean_out, dtype, c, keep * old_mean + momentum * mean);
  store_param(p.running_var_out, dtype, c, keep * old_var + momentum * unbiased);
}

template <class T, int V, bool CL>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_stats(const Forward p, const Plan plan, acc_t<T>* workspace) {
  using A = acc_t<T>;
  constexpr int Lanes = CL ? V : 1;
  ADVDL_DYNAMIC_SHARED(memory);
  const BatchNormShared<T, V, CL, Moments> shared(memory, plan, 0, 0, true);
  const Place place = block_place(plan);
  Moments<A> states[Lanes] = {};
  accumulate_statistics<T, V, CL>(static_cast<const T*>(p.x), plan, block_work<V, CL>(plan, place),
                                  static_cast<Pack<T, V>*>(nullptr), states);
  block_reduce(states, plan.columns, shared.reduction.scratch, shared.reduction.result);
  store_partials(plan, place, shared.width(plan), shared.reduction.result, workspace);
}

template <class A>
__global__ void __launch_bounds__(kFinalizeThreads, 1)
    batch_norm_finalize_stats(const Forward p, const Plan plan, const A* workspace) {
  ADVDL_DYNAMIC_SHARED(memory);
  SharedArena arena(memory);
  const Reduction<Moments<A>> reduction(arena, static_cast<int>(blockDim.x), kFinalizeColumns, 1);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFinalizeColumns;
  merge_partials(workspace, plan.splits, plan.channels, first, kFinalizeColumns, reduction.scratch,
                 reduction.result);
  const int64_t c = first + threadIdx.x;
  if (threadIdx.x < kFinalizeColumns && c < plan.channels) {
    const Moments<A> s = reduction.result[threadIdx.x];
    const A var = s.m2 / static_cast<A>(plan.count);
    write_training_statistics(p, plan, c, s.mean, reciprocal_std(var, p.eps), var);
  }
}

// ---- forward apply ----

enum class Statistics { running, partials, stored, reduced };

// Sets constants 0 (mean), 1 (rstd * weight) and 2 (bias) of the tile's channels. `from` says where the statistics are.
// With `write` (one block per tile), also writes them to the outputs unless they are stored there. Ends with a barrier.
template <class A>
__device__ __forceinline__ void forward_constants(const Forward& p, const Plan& plan,
                                                  Statistics from, int64_t tile, bool write,
                                                  int width, const Moments<A>* reduced,
                                                  A* constants) {
  const DType weights = p.shape.weight_dtype, running = p.shape.running_dtype;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    const int64_t c = tile * width + i;
    if (c >= plan.channels) continue;
    A mean, rstd;
    if (from == Statistics::stored) {
      mean = static_cast<const A*>(p.mean)[c];
      rstd = static_cast<const A*>(p.rstd)[c];
    } else if (from == Statistics::running) {
      mean = load_param<A>(p.running_mean, running, c, A(0));
      rstd = reciprocal_std(load_param<A>(p.running_var, running, c, A(1)), p.eps);
      if (write) {
        static_cast<A*>(p.mean)[c] = mean;
        static_cast<A*>(p.rstd)[c] = rstd;
      }
    } else {
      const Moments<A> s = reduced[i];
      const A var = s.m2 / static_cast<A>(plan.count);
      mean = s.mean;
      rstd = reciprocal_std(var, p.eps);
      if (write) write_training_statistics(p, plan, c, mean, rstd, var);
    }
    constants[i] = mean;
    constants[width + i] = rstd * load_param<A>(p.weight, weights, c, A(1));
    constants[2 * width + i] = load_param<A>(p.bias, weights, c, A(0));
  }
  __syncthreads();
}

template <class T, int V, bool CL, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_act_apply(const Forward p, const Plan plan, Statistics from,
                         const acc_t<T>* workspace) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const BatchNormShared<T, V, CL, Moments> shared(memory, plan, 3, 0, !CL);
  const Place place = block_place(plan);
  if constexpr (!CL) {
    if (from == Statistics::partials)
      merge_partials(workspace, plan.splits, plan.channels, place.tile, 1, shared.reduction.scratch,
                     shared.reduction.result);
  }
  forward_constants(p, plan, from, place.tile, place.split == 0, shared.width(plan),
                    shared.reduction.result, shared.constants);
  ForwardLanes<A, CL ? V : 1> lanes;
  lanes.load(shared.constants, plan.columns);
  apply_forward<T, V, CL, apply_unroll<T, V, CL, Simple>(), Simple>(
      p, plan, block_work<V, CL>(plan, place), static_cast<const Pack<T, V>*>(nullptr), lanes);
}

template <class T, int V, bool CL, bool Simple>
__global__ void __launch_bounds__(kFusedThreads, 1)
    batch_norm_act_fused(const Forward p, const Plan plan) {
  using A = acc_t<T>;
  constexpr int Lanes = CL ? V : 1;
  ADVDL_DYNAMIC_SHARED(memory);
  const BatchNormShared<T, V, CL, Moments> shared(memory, plan, 3, 1, true);
  const Place place = block_place(plan);
  const Work work = block_work<V, CL>(plan, place);
  Moments<A> states[Lanes] = {};
  accumulate_statistics<T, V, CL>(static_cast<const T*>(p.x), plan, work, shared.x, states);
  block_reduce(states, plan.columns, shared.reduction.scratch, shared.reduction.result);
  forward_constants(p, plan, Statistics::reduced, place.tile, true, shared.width(plan),
                    shared.reduction.result, shared.constants);
  ForwardLanes<A, Lanes> lanes;
  lanes.load(shared.constants, plan.columns);
  apply_forward<T, V, CL, apply_unroll<T, V, CL, Simple>(), Simple>(p, plan, work, shared.x, lanes);
}

bool forward_is_fused(const Forward& p) {
  if (!p.training || p.out == nullptr || slabs_that_fit(p.shape, 1) == 0) return false;
  const int64_t once = p.residual != nullptr ? 3 : 2;
  return fused_is_faster(p.shape, {once, 0}, {once, 1});
}

}  // namespace

size_t batch_norm_act_forward_workspace(const BatchNormActForward& p) {
  const bool none = p.shape.c == 0 || is_empty(p.shape) || !p.training || forward_is_fused(p);
  return none ? 0 : partials_bytes(p.shape, 3);
}

void batch_norm_act_forward(const BatchNormActForward& p, void* workspace, void* stream) {
  if (p.shape.c == 0 || (p.training && is_empty(p.shape))) return;
  const bool fused = forward_is_fused(p);
  dispatch(p.shape, p.act, vector_aligned(p.x, p.residual, p.out),
           [&]<class T, int V, bool CL, bool Simple>() {
             using A = acc_t<T>;
             Plan plan = make_plan(p.shape, V, fused, stats_unroll<T, V>());
             const auto config = [&](int which, int slabs, bool reduces) {
               const BatchNormShared<T, V, CL, Moments> shared(nullptr, plan, which, slabs,
                                                               reduces);
               return tile_config(plan, shared.arena.bytes, stream);
             };
             if (fused) {
               launch("batch_norm_act_fused", &batch_norm_act_fused<T, V, CL, Simple>,
                      config(3, 1, true), p, plan);
               return;
             }
             Arena arena(workspace);
             A* partials = p.training ? BatchNormPartials<A>(p.shape, 3, arena).values : nullptr;
             Statistics from = p.running_mean != nullptr ? Statistics::running : Statistics::stored;
             if (p.training) {
               launch("batch_norm_stats", &batch_norm_stats<T, V, CL>, config(0, 0, true), p, plan,
                      partials);
               from = CL ? Statistics::stored : Statistics::partials;
               if (CL || p.out == nullptr)
                 launch("batch_norm_finalize_stats", &batch_norm_finalize_stats<A>,
                        finalize_config<Moments<A>>(divide_up(plan.channels, kFinalizeColumns),
                                                    plan.splits * kFinalizeColumns,
                                                    kFinalizeColumns, stream),
                        p, plan, partials);
               if (p.out == nullptr) return;
               plan.backwards = true;
             }
             launch("batch_norm_act_apply", &batch_norm_act_apply<T, V, CL, Simple>,
                    config(3, 0, !CL), p, plan, from, partials);
           });
}

}  // namespace advdl_ops::cuda
