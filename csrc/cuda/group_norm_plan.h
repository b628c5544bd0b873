// What the paths of group norm share on CUDA: the plan of a launch, the statistics of a set and the constants of its
// gradient. A set is the D = C / groups channels of one group in one sample.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/group_norm.h"
#include "norm_passes.h"
#include "norm_paths.h"

namespace advdl_ops::cuda {

inline constexpr int kTeamThreads = 128;  // threads of a block that takes several tiny sets
// A set of at most this many packs is tiny: four per thread of a warp.
inline constexpr int64_t kTeamPacks = 128;

struct GroupPlan : Plan {
  int64_t c = 0, s = 0, groups = 1, sets = 0;
  int64_t set_channels = 1;  // D: columns of partials of a set, in one repeat
  int64_t repeats = 1;       // columns: how often the channels repeat in a row (see fold)
  int64_t table = 0;         // runs: channels whose weight and bias a block has in shared memory
  int team = 1;  // rows: threads per row; `splits` parts of it, `columns` sets in a fused tile
};

// ---- sets ----

// A set consists of set_channels * repeats columns of the partials [samples * channels]. This is the i-th of them.
__device__ __forceinline__ int64_t set_column(const GroupPlan& plan, int64_t set, int64_t i) {
  if (plan.repeats == 1) return set * plan.set_channels + i;
  const int64_t row = set / plan.groups * plan.repeats + i / plan.set_channels;
  return row * plan.c + set % plan.groups * plan.set_channels + i % plan.set_channels;
}

template <class A>
struct SetStatistics {
  A mean, rstd;
};

template <class A, class Params>
__device__ __forceinline__ SetStatistics<A> load_statistics(const Params& p, int64_t set) {
  return {static_cast<const A*>(p.mean)[set],
          reciprocal_std(static_cast<const A*>(p.var)[set], p.eps)};
}

// The statistics of a set from its merged state. With `write`, writes mean and variance.
template <class A>
__device__ __forceinline__ SetStatistics<A> finish_statistics(const GroupNormForward& p,
                                                              const GroupPlan& plan, int64_t set,
                                                              const Moments<A>& state, bool write) {
  const A var = state.m2 / static_cast<A>(plan.count);
  if (write) {
    static_cast<A*>(p.mean)[set] = state.mean;
    static_cast<A*>(p.var)[set] = var;
  }
  return {state.mean, reciprocal_std(var, p.eps)};
}

// ---- gradients of a set ----

// The sums of weight * dz and weight * dz * xhat of a channel, from its sums of dz and dz * xhat.
template <class A>
__device__ __forceinline__ GradientSums<A> weighted(const GroupNormBackward& p, int64_t c,
                                                    GradientSums<A> sums) {
  const A weight = load_param<A>(p.weight, p.shape.weight_dtype, c, A(1));
  return {weight * sums.dz, weight * sums.dz_x};
}

// Constants of dx = dz * scale - shift - (x - mean) * slope.
template <class A>
struct SetGradient {
  A shift, slope;
};

template <class A>
__device__ __forceinline__ SetGradient<A> set_gradient(const GroupPlan& plan, A rstd,
                                                       const GradientSums<A>& sums) {
  const A share = rstd / static_cast<A>(plan.count);
  return {share * sums.dz, share * sums.dz_x * rstd};
}

// ---- memory ----

// Partial results of the splits: `fields` arrays of [splits][columns].
template <class A>
struct GroupNormPartials {
  A* values;
  GroupNormPartials(int fields, int64_t splits, int64_t columns, Arena& arena)
      : values(arena.take<A>(fields * splits * columns)) {}
};

// The gradient sums of each channel of each sample, and the constants of the sets. For the path of several launches.
template <class A>
struct GroupNormBackwardMemory {
  A* partials;
  SetGradient<A>* gradients;
  GroupNormBackwardMemory(int64_t splits, int64_t columns, int64_t sets, Arena& arena)
      : partials(GroupNormPartials<A>(2, splits, columns, arena).values),
        gradients(arena.take<SetGradient<A>>(sets)) {}
};

// ---- host ----

inline GroupPlan make_plan(const GroupNormShape& s) {
  GroupPlan plan;
  plan.c = s.c;
  plan.s = s.s;
  plan.groups = s.groups;
  plan.sets = s.sets();
  plan.set_channels = s.c / s.groups;
  plan.size = s.n * s.c * s.s;
  plan.count = s.set_size();
  return plan;
}

inline void set_rows(GroupPlan& plan, int64_t rows, int64_t elements, int v) {
  plan.channels = rows;
  plan.row = elements;
  plan.packs = packs_per_row(elements, v);
  plan.whole_packs = elements % v == 0;
  plan.positions = plan.packs;
}

// Whether bytes<T, V>() of shared memory fit into a block, for single elements and, with `vectors`, for packs too.
template <bool CL, class Bytes>
bool fits(DType dtype, bool vectors, Bytes bytes) {
  int64_t most = 0;
  for (const bool packs : {false, vectors})
    dispatch_packs<CL>(dtype, packs, Activation::identity,
                       [&]<class T, int V, bool, bool Simple>() {
                         most = std::max<int64_t>(most, bytes.template operator()<T, V>());
                       });
  return most <= static_cast<int64_t>(shared_memory_limit());
}

inline LaunchConfig block_per_tile(const GroupPlan& plan, int64_t splits, int64_t shared,
                                   void* stream) {
  return {plan.tiles * plan.samples * splits, plan.threads, static_cast<size_t>(shared), stream};
}

// ---- the paths ----
//
// A tensor is read as runs, rows or columns, each in a file of its own. With S = 1 both layouts count as
// channels_first.

// group_norm_runs.cu: channels_first. A set is one run of D * S elements.
size_t group_norm_runs_workspace(const GroupNormForward& p);
void group_norm_runs(const GroupNormForward& p, void* workspace, void* stream);
// The splits of a set on that path, and the launch that computes their partial moments (`vectors`: read in packs).
int64_t run_splits(const GroupNormShape& s);
void group_norm_run_moments(const GroupNormForward& p, bool vectors, void* partials, void* stream);

// group_norm_rows.cu: channels_first, backward. A row is the S elements of one channel in one sample.
size_t group_norm_backward_rows_workspace(const GroupNormBackward& p);
void group_norm_backward_rows(const GroupNormBackward& p, void* workspace, void* stream);

// group_norm_columns.cu and group_norm_backward_columns.cu: channels_last. A column is a channel of one sample.
size_t group_norm_columns_workspace(const GroupNormForward& p);
void group_norm_columns(const GroupNormForward& p, void* workspace, void* stream);
size_t group_norm_backward_columns_workspace(const GroupNormBackward& p);
void group_norm_backward_columns(const GroupNormBackward& p, void* workspace, void* stream);

// group_norm.cu: the second stages of the sums.
// Writes mean and variance of each set, from `partials` of moments.
void group_norm_finalize_moments(const GroupNormForward& p, const GroupPlan& plan,
                                 const void* partials, void* stream);
// From `partials` of gradient sums, writes the constants of each set to `gradients` and the sums to dweight and dbias,
// unless null.
void group_norm_finalize_gradients(const GroupNormBackward& p, const GroupPlan& plan,
                                   const void* partials, void* gradients, void* stream);

}  // namespace advdl_ops::cuda
