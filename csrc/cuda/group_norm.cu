// act(group_norm(x) + residual) and its gradients on CUDA: which path a call takes, and the second stages of the sums.
// Algorithms, bytes and launches: docs/kernels.md.
//
//   group_norm_runs.cu              channels_first, forward: fused, or stats + apply (which merges the partial results)
//   group_norm_rows.cu              channels_first, backward
//   group_norm_columns.cu           channels_last, forward: fused, or stats + finalize_stats + apply
//   group_norm_backward_columns.cu  channels_last, backward
//
// Both backward paths: fused + finalize_grads, or reduce + finalize_grads + apply.
#include "group_norm_plan.h"

namespace advdl_ops::cuda {
namespace {

// One block per set.
template <class A>
__global__ void __launch_bounds__(kFinalizeThreads, 1)
    group_norm_finalize_stats(const GroupNormForward p, const GroupPlan plan, const A* workspace) {
  ADVDL_DYNAMIC_SHARED(memory);
  SharedArena arena(memory);
  const int threads = static_cast<int>(blockDim.x);
  Reduction<Moments<A>> reduction(arena, threads, 1, 1);
  const int64_t set = blockIdx.x, members = plan.set_channels * plan.repeats;
  Moments<A> states[1];
  states[0] =
      merge_strided<Moments<A>>(threadIdx.x, threads, plan.splits * members, [&](int64_t item) {
        Moments<A> part;
        load_partial(workspace, plan.splits, plan.samples * plan.channels, item / members,
                     set_column(plan, set, item % members), part);
        return part;
      });
  block_reduce(states, 1, reduction.scratch, reduction.result);
  if (threadIdx.x == 0) finish_statistics(p, plan, set, reduction.result[0], true);
}

// The first `set_blocks` blocks compute the constants of one set each, from the partial sums of its channels. The other
// blocks compute dweight and dbias of kFinalizeColumns channels each, from the partial sums of all samples.
template <class A>
__global__ void __launch_bounds__(kFinalizeThreads, 1)
    group_norm_finalize_grads(const GroupNormBackward p, const GroupPlan plan, int64_t set_blocks,
                              const A* workspace, SetGradient<A>* gradients) {
  ADVDL_DYNAMIC_SHARED(memory);
  SharedArena arena(memory);
  const int threads = static_cast<int>(blockDim.x);
  Reduction<GradientSums<A>> reduction(arena, threads, kFinalizeColumns, 1);
  const int64_t columns = plan.samples * plan.channels;
  if (blockIdx.x < set_blocks) {
    const int64_t set = blockIdx.x, members = plan.set_channels * plan.repeats;
    GradientSums<A> states[1];
    states[0] = merge_strided<GradientSums<A>>(
        threadIdx.x, threads, plan.splits * members, [&](int64_t item) {
          const int64_t column = set_column(plan, set, item % members);
          GradientSums<A> part;
          load_partial(workspace, plan.splits, columns, item / members, column, part);
          return weighted(p, column % plan.c, part);
        });
    block_reduce(states, 1, reduction.scratch, reduction.result);
    if (threadIdx.x == 0)
      gradients[set] = set_gradient(plan, load_statistics<A>(p, set).rstd, reduction.result[0]);
    return;
  }
  const int64_t first = (blockIdx.x - set_blocks) * kFinalizeColumns;
  merge_partials(workspace, plan.splits * (columns / plan.c), plan.c, first, kFinalizeColumns,
                 reduction.scratch, reduction.result);
  const int64_t c = first + threadIdx.x;
  if (threadIdx.x < kFinalizeColumns && c < plan.c) {
    static_cast<A*>(p.dbias)[c] = reduction.result[threadIdx.x].dz;
    static_cast<A*>(p.dweight)[c] = reduction.result[threadIdx.x].dz_x;
  }
}

// With S = 1 both layouts are the same memory. channels_first reads a set as one run.
template <class Params>
Params canonical(Params p) {
  if (p.shape.s == 1) p.shape.layout = Layout::channels_first;
  return p;
}

template <class Params>
bool is_channels_last(const Params& p) {
  return p.shape.layout == Layout::channels_last;
}

}  // namespace

void group_norm_finalize_moments(const GroupNormForward& p, const GroupPlan& plan,
                                 const void* partials, void* stream) {
  const int64_t items = plan.splits * plan.set_channels * plan.repeats;
  with_acc_type(p.shape.dtype, [&]<class A>() {
    launch("group_norm_finalize_stats", &group_norm_finalize_stats<A>,
           finalize_config<Moments<A>>(plan.sets, items, 1, stream), p, plan,
           static_cast<const A*>(partials));
  });
}

void group_norm_finalize_gradients(const GroupNormBackward& p, const GroupPlan& plan,
                                   const void* partials, void* gradients, void* stream) {
  const int64_t set_blocks = gradients != nullptr ? plan.sets : 0;
  const int64_t channel_blocks = p.dweight != nullptr ? divide_up(plan.c, kFinalizeColumns) : 0;
  if (set_blocks + channel_blocks == 0) return;
  const int64_t set_items = set_blocks > 0 ? plan.splits * plan.set_channels * plan.repeats : 0;
  const int64_t channel_items =
      plan.splits * plan.samples * plan.channels / plan.c * kFinalizeColumns;
  with_acc_type(p.shape.dtype, [&]<class A>() {
    launch("group_norm_finalize_grads", &group_norm_finalize_grads<A>,
           finalize_config<GradientSums<A>>(set_blocks + channel_blocks,
                                            std::max(set_items, channel_items), kFinalizeColumns,
                                            stream),
           p, plan, set_blocks, static_cast<const A*>(partials),
           static_cast<SetGradient<A>*>(gradients));
  });
}

size_t group_norm_forward_workspace(const GroupNormForward& given) {
  const GroupNormForward p = canonical(given);
  if (p.shape.is_empty()) return 0;
  return is_channels_last(p) ? group_norm_columns_workspace(p) : group_norm_runs_workspace(p);
}

size_t group_norm_backward_workspace(const GroupNormBackward& given) {
  const GroupNormBackward p = canonical(given);
  if (p.shape.is_empty()) return 0;
  return is_channels_last(p) ? group_norm_backward_columns_workspace(p)
                             : group_norm_backward_rows_workspace(p);
}

void group_norm_forward(const GroupNormForward& given, void* workspace, void* stream) {
  const GroupNormForward p = canonical(given);
  if (p.shape.is_empty()) {
    zero_values(p.mean, p.shape.sets(), p.shape.dtype, stream);
    zero_values(p.var, p.shape.sets(), p.shape.dtype, stream);
    return;
  }
  is_channels_last(p) ? group_norm_columns(p, workspace, stream)
                      : group_norm_runs(p, workspace, stream);
}

void group_norm_backward(const GroupNormBackward& given, void* workspace, void* stream) {
  const GroupNormBackward p = canonical(given);
  if (p.shape.is_empty()) {
    zero_values(p.dweight, p.shape.c, p.shape.dtype, stream);
    zero_values(p.dbias, p.shape.c, p.shape.dtype, stream);
    return;
  }
  is_channels_last(p) ? group_norm_backward_columns(p, workspace, stream)
                      : group_norm_backward_rows(p, workspace, stream);
}

}  // namespace advdl_ops::cuda
