// y = act(group_norm(x) + residual) and its gradients on CUDA. docs/kernels.md: algorithms, bytes, launches.
//
// A set is what shares statistics: the D = C / groups channels of one group in one sample.
//
//   runs     channels_first, forward. A set is one run of D * S elements; a lane of a pack looks its channel up.
//            fused, or stats + apply (which merges the partials of its set itself)
//   rows     channels_first, backward. A team of threads, at most a warp, takes a row, the S elements of one channel
//            in one sample, or a part of it: sums per channel need no lookup and no barrier.
//   columns  channels_last. A lane is a channel, as in batch norm, but a tile belongs to one sample.
//            forward: fused, or stats + finalize_stats + apply
//
//   backward (rows, columns): fused + finalize_grads, or reduce + finalize_grads + apply
#include "../common/group_norm.h"

#include <numeric>

#include "norm.h"

namespace advdl_ops::cuda {
namespace {

using Forward = GroupNormForward;
using Backward = GroupNormBackward;

constexpr int kTeamThreads = 128;  // of a block that takes several tiny sets
constexpr int64_t kTeamPacks =
    128;  // a set of at most so many packs is tiny: four per thread of a warp
constexpr int64_t kTableChannels =
    2000;                                // of which a block that splits a run keeps weight and bias
constexpr int64_t kPartElements = 1024;  // a part of a row is worth at least this many
constexpr int64_t kWideChannels = 256;   // of a fused tile, channels_last, at most
constexpr int64_t kWideBytes =
    16 * 1024;  // a fused tile of fewer bytes is widened where there are many

struct GroupPlan : Plan {
  int64_t c = 0, s = 0, groups = 1, sets = 0;
  int64_t set_channels = 1;  // D: columns of partials, in one repeat, that make up a set
  int64_t repeats = 1;       // columns: how often the channels repeat in a row (see fold)
  int64_t table = 0;         // runs: channels whose weight and bias a block keeps
  int team = 1;  // rows: threads per row; `splits` parts of it, `columns` sets in a fused tile
};

// ---- sets ----

// The column, in [samples * channels] partials, of the i-th of the set_channels * repeats that make up a set.
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

// From the merged state of a set; `write` its mean and variance out.
template <class A>
__device__ __forceinline__ SetStatistics<A> finish_statistics(const Forward& p,
                                                              const GroupPlan& plan, int64_t set,
                                                              const Welford<A>& state, bool write) {
  const A var = state.m2 / static_cast<A>(plan.count);
  if (write) {
    static_cast<A*>(p.mean)[set] = state.mean;
    static_cast<A*>(p.var)[set] = var;
  }
  return {state.mean, reciprocal_std(var, p.eps)};
}

// ---- shared memory ----

template <class State>
struct Reduction {
  State *scratch, *result;

  ADVDL_HOST_DEVICE Reduction(SharedLayout& layout, int threads, int columns, int lanes,
                              bool scratch_needed = true) {
    const int64_t width = static_cast<int64_t>(columns) * lanes;
    scratch = layout.take<State>(scratch_needed ? reduce_rows(threads, columns) * width : 0);
    result = layout.take<State>(width);
  }
};

template <class A>
struct Affine {
  A weight, bias;
};

template <class T, int V>
struct RunsShared {
  using A = acc_t<T>;
  SharedLayout layout;
  Pack<T, V>* slab;
  Reduction<Welford<A>> reduction;
  Affine<A>* table;

  ADVDL_HOST_DEVICE RunsShared(unsigned char* base, const GroupPlan& plan, bool fused)
      : layout{base},
        slab(layout.take<Pack<T, V>>(fused ? slots(plan) : 0)),
        reduction(layout, plan.threads, plan.columns, 1, plan.columns == 1),
        table(layout.take<Affine<A>>(plan.table + V)) {}  // masked lanes may look past its end

  static ADVDL_HOST_DEVICE int64_t slots(const GroupPlan& plan) {
    const int team = plan.threads / plan.columns;
    return plan.columns == 1 ? plan.positions : (plan.positions + team - 1) / team * plan.threads;
  }
};

template <class T, int V, template <class> class State>
struct ColumnsShared {
  using A = acc_t<T>;
  SharedLayout layout;
  Pack<T, V>*x, *dz;
  Reduction<State<A>> reduction;
  State<A>* sets;  // in the scratch, which is free by then
  A* constants;    // [which][columns * V]

  ADVDL_HOST_DEVICE ColumnsShared(unsigned char* base, const GroupPlan& plan, int which, int slabs,
                                  bool reduces)
      : layout{base},
        x(layout.take<Pack<T, V>>(slabs > 0 ? plan.positions * plan.tile_packs : 0)),
        dz(layout.take<Pack<T, V>>(slabs > 1 ? plan.positions * plan.tile_packs : 0)),
        reduction(layout, plan.threads, reduces ? plan.columns : 0, V),
        sets(reduction.scratch),
        constants(layout.take<A>(static_cast<int64_t>(which) * plan.columns * V)) {}
};

template <class T, int V>
struct RowsShared {
  using A = acc_t<T>;
  SharedLayout layout;
  Pack<T, V>*x, *dz;
  SumPair<A>* items;
  Reduction<SumPair<A>> reduction;

  ADVDL_HOST_DEVICE RowsShared(unsigned char* base, const GroupPlan& plan, int slabs)
      : layout{base},
        x(layout.take<Pack<T, V>>(slots(plan))),
        dz(layout.take<Pack<T, V>>(slabs > 1 ? slots(plan) : 0)),
        items(layout.take<SumPair<A>>(tile_items(plan))),
        reduction(layout, plan.threads, plan.columns, 1, plan.columns == 1) {}

  static ADVDL_HOST_DEVICE int64_t tile_items(const GroupPlan& plan) {
    return plan.columns * plan.set_channels * plan.splits;
  }
  // Packs of a thread in one part of a row.
  static ADVDL_HOST_DEVICE int64_t rounds(const GroupPlan& plan) {
    return (plan.per_split + plan.team - 1) / plan.team;
  }
  static ADVDL_HOST_DEVICE int64_t waves(const GroupPlan& plan) {
    const int64_t teams = plan.threads / plan.team;
    return (tile_items(plan) + teams - 1) / teams;
  }
  static ADVDL_HOST_DEVICE int64_t slots(const GroupPlan& plan) {
    return waves(plan) * rounds(plan) * plan.threads;
  }
};

// ---- statistics ----

template <class T, int V, bool CL>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_stats(const Forward p, const GroupPlan plan, acc_t<T>* workspace) {
  using A = acc_t<T>;
  constexpr int Lanes = CL ? V : 1;
  ADVDL_DYNAMIC_SHARED(memory);
  SharedLayout layout{memory};
  Reduction<Welford<A>> reduction(layout, plan.threads, plan.columns, Lanes);
  const Place place = block_place(plan);
  Welford<A> states[Lanes] = {};
  accumulate_statistics<T, V, CL>(static_cast<const T*>(p.x), plan, block_work<V, CL>(plan, place),
                                  static_cast<Pack<T, V>*>(nullptr), states);
  block_reduce(states, plan.columns, reduction.scratch, reduction.result);
  store_partials(plan, place, plan.columns * Lanes, reduction.result, workspace);
}

// A block per set.
template <class A>
__global__ void __launch_bounds__(kFinalizeThreads, 1)
    group_norm_finalize_stats(const Forward p, const GroupPlan plan, const A* workspace) {
  ADVDL_DYNAMIC_SHARED(memory);
  SharedLayout layout{memory};
  const int threads = static_cast<int>(blockDim.x);
  Reduction<Welford<A>> reduction(layout, threads, 1, 1);
  const int64_t set = blockIdx.x, members = plan.set_channels * plan.repeats;
  Welford<A> states[1];
  states[0] =
      merge_strided<Welford<A>>(threadIdx.x, threads, plan.splits * members, [&](int64_t item) {
        Welford<A> part;
        load_partial(workspace, plan.splits, plan.samples * plan.channels, item / members,
                     set_column(plan, set, item % members), part);
        return part;
      });
  block_reduce(states, 1, reduction.scratch, reduction.result);
  if (threadIdx.x == 0) finish_statistics(p, plan, set, reduction.result[0], true);
}

// ---- forward over runs ----

// The lanes of a pack somewhere in a run: each may be of another channel.
template <class A, int V>
struct RunLanes {
  const Affine<A>* table = nullptr;  // from the channel that begins at element `start`
  int64_t start = 0, s = 1;
  A mean, rstd;
  A scale[V], bias[V];

  __device__ __forceinline__ void find(int64_t at) {
    const int64_t offset = at - start;  // below 0 where the run begins inside the pack
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

// Fills the table of the block's channels; the caller provides the barrier.
template <int V, class A>
__device__ __forceinline__ void load_table(const Forward& p, const GroupPlan& plan,
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
    group_norm_apply_runs(const Forward p, const GroupPlan plan, const acc_t<T>* workspace) {
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
    group_norm_fused_runs(const Forward p, const GroupPlan plan) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const RunsShared<T, V> shared(memory, plan, true);
  const Place place = block_place(plan);
  const Work work = block_work<V, false>(plan, place);
  load_table<V>(p, plan, place, work, shared.table);
  Welford<A> states[1] = {};
  accumulate_statistics<T, V, false>(static_cast<const T*>(p.x), plan, work, shared.slab, states);
  reduce_columns<false>(states, plan.columns, shared.reduction.scratch, shared.reduction.result);
  const auto statistics = finish_statistics(p, plan, work.row, shared.reduction.result[work.column],
                                            work.member == 0 && work.row < plan.sets);
  auto lanes = run_lanes<V>(plan, work, statistics, shared.table);
  apply_forward<T, V, false, apply_unroll<T, V, true, Simple>(), Simple>(p, plan, work, shared.slab,
                                                                         lanes);
}

// ---- columns: constants of the channels of a tile ----

// Calls body(i, c, set) for each channel of the tile: its index in it, the channel, its set.
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

// Constants 0 (mean), 1 (rstd * weight), 2 (bias) and, where it is wanted, 3 (rstd), from statistics(i, set). Ends with
// a barrier.
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

// Merges value(i) of the channels i of each set of the tile into sets[]: a warp per set. Ends with a barrier.
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

// The first set of the tile. (Where channels repeat, the one tile has them all.)
template <int V>
__device__ __forceinline__ int64_t first_set(const GroupPlan& plan, const Place& place) {
  return place.sample * plan.groups + place.tile * plan.tile_packs * V / plan.set_channels;
}

// ---- forward over columns ----

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_apply_columns(const Forward p, const GroupPlan plan) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const ColumnsShared<T, V, Welford> shared(memory, plan, 3, 0, false);
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
    group_norm_fused_columns(const Forward p, const GroupPlan plan) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const ColumnsShared<T, V, Welford> shared(memory, plan, 3, 1, true);
  const Place place = block_place(plan);
  const Work work = block_work<V, true>(plan, place);
  Welford<A> states[V] = {};
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

// ---- backward: from sums per channel to constants per set ----

// Sums of weight * dz and weight * dz * xhat, from those of a channel.
template <class A>
__device__ __forceinline__ SumPair<A> weighted(const Backward& p, int64_t c, SumPair<A> sums) {
  const A weight = load_param<A>(p.weight, p.shape.weight_dtype, c, A(1));
  return {weight * sums.first, weight * sums.second};
}

// Of dx = dz * scale - shift - (x - mean) * slope.
template <class A>
struct SetGradient {
  A shift, slope;
};

template <class A>
__device__ __forceinline__ SetGradient<A> set_gradient(const GroupPlan& plan, A rstd,
                                                       const SumPair<A>& sums) {
  const A share = rstd / static_cast<A>(plan.count);
  return {share * sums.first, share * sums.second * rstd};
}

// `set_blocks` blocks turn the partial sums of a set's channels into its constants; the others, kFinalizeColumns
// channels each, those of all samples into dweight and dbias.
template <class A>
__global__ void __launch_bounds__(kFinalizeThreads, 1)
    group_norm_finalize_grads(const Backward p, const GroupPlan plan, int64_t set_blocks,
                              const A* workspace, SetGradient<A>* gradients) {
  ADVDL_DYNAMIC_SHARED(memory);
  SharedLayout layout{memory};
  const int threads = static_cast<int>(blockDim.x);
  Reduction<SumPair<A>> reduction(layout, threads, kFinalizeColumns, 1);
  const int64_t columns = plan.samples * plan.channels;
  if (blockIdx.x < set_blocks) {
    const int64_t set = blockIdx.x, members = plan.set_channels * plan.repeats;
    SumPair<A> states[1];
    states[0] =
        merge_strided<SumPair<A>>(threadIdx.x, threads, plan.splits * members, [&](int64_t item) {
          const int64_t column = set_column(plan, set, item % members);
          SumPair<A> part;
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
    static_cast<A*>(p.dbias)[c] = reduction.result[threadIdx.x].first;
    static_cast<A*>(p.dweight)[c] = reduction.result[threadIdx.x].second;
  }
}

// ---- backward over rows ----

// A team's share: part item % splits of row item / splits. Nothing past the last item.
__device__ __forceinline__ Work row_work(const GroupPlan& plan, int64_t item) {
  Work work;
  work.row = item / plan.splits;
  work.stride = plan.team;
  work.member = static_cast<int>(threadIdx.x) % plan.team;
  work.slot = static_cast<int>(threadIdx.x);
  work.slot_step = static_cast<int>(blockDim.x);
  if (work.row >= plan.channels) return work;
  work.begin = item % plan.splits * plan.per_split;
  work.end =
      work.begin + plan.per_split < plan.positions ? work.begin + plan.per_split : plan.positions;
  return work;
}

template <class A>
struct RowLanes : BackwardLanes<A, 1> {
  A rstd = A(0);

  __device__ __forceinline__ void load(const Backward& p, const GroupPlan& plan, int64_t row) {
    if (row >= plan.channels) return;
    const auto statistics = load_statistics<A>(p, row / plan.set_channels);
    const int64_t c = row % plan.c;
    rstd = statistics.rstd;
    this->mean[0] = statistics.mean;
    this->scale[0] = rstd * load_param<A>(p.weight, p.shape.weight_dtype, c, A(1));
    this->bias[0] = load_param<A>(p.bias, p.shape.weight_dtype, c, A(0));
  }
  __device__ __forceinline__ void load(const SetGradient<A>& gradient) {
    this->shift[0] = gradient.shift;
    this->slope[0] = gradient.slope;
  }
};

// Sums of dz and dz * xhat of a part of a row, in every thread of the team.
template <class T, int V, bool Simple>
__device__ __forceinline__ SumPair<acc_t<T>> accumulate_row(const Backward& p,
                                                            const GroupPlan& plan, const Work& work,
                                                            Pack<T, V>* kept_x,
                                                            Pack<T, V>* kept_dz) {
  using A = acc_t<T>;
  RowLanes<A> lanes;
  lanes.load(p, plan, work.row);
  SumPair<A> sums[1] = {};
  accumulate_gradients<T, V, false, Simple>(p, plan, work,
                                            static_cast<const ForwardLanes<A, 1>&>(lanes),
                                            static_cast<T*>(nullptr), kept_x, kept_dz, sums);
  sums[0].second *= lanes.rstd;
  team_reduce(sums[0], plan.team);
  return sums[0];
}

__device__ __forceinline__ int64_t team_item(const GroupPlan& plan) {
  const int64_t teams = static_cast<int>(blockDim.x) / plan.team;
  return block_place(plan).tile * teams + static_cast<int>(threadIdx.x) / plan.team;
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_backward_reduce_rows(const Backward p, const GroupPlan plan, acc_t<T>* workspace) {
  const int64_t item = team_item(plan);
  const Work work = row_work(plan, item);
  const auto sums = accumulate_row<T, V, Simple>(p, plan, work, static_cast<Pack<T, V>*>(nullptr),
                                                 static_cast<Pack<T, V>*>(nullptr));
  if (work.member == 0 && work.row < plan.channels)
    store_partial(workspace, plan.splits, plan.channels, item % plan.splits, work.row, sums);
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_backward_apply_rows(const Backward p, const GroupPlan plan,
                                   const SetGradient<acc_t<T>>* gradients) {
  using A = acc_t<T>;
  const Work work = row_work(plan, team_item(plan));
  if (work.row >= plan.channels) return;
  RowLanes<A> lanes;
  lanes.load(p, plan, work.row);
  lanes.load(gradients[work.row / plan.set_channels]);
  apply_backward<T, V, false, Simple>(p, plan, work, static_cast<const BackwardLanes<A, 1>&>(lanes),
                                      static_cast<const Pack<T, V>*>(nullptr),
                                      static_cast<const Pack<T, V>*>(nullptr));
}

// Leaves the sums of each channel of each sample in the workspace, for finalize_grads, unless that is null.
template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kFusedThreads, 1)
    group_norm_backward_fused_rows(const Backward p, const GroupPlan plan, acc_t<T>* workspace) {
  using A = acc_t<T>;
  using Shared = RowsShared<T, V>;
  ADVDL_DYNAMIC_SHARED(memory);
  const Shared shared(memory, plan, plan.keep_dz ? 2 : 1);
  Pack<T, V>* const kept_dz = plan.keep_dz ? shared.dz : nullptr;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t tile = block_place(plan).tile;
  const int64_t items = Shared::tile_items(plan), teams = threads / plan.team;
  const int wave_slots = static_cast<int>(Shared::rounds(plan)) * threads;
  // Every thread walks the same waves: a team's reduction needs all of its warp.
  const int64_t padded = Shared::waves(plan) * teams;
  int slots = 0;
#pragma unroll 1
  for (int64_t item = thread / plan.team; item < padded; item += teams, slots += wave_slots) {
    // an item of no row of the tile must not be one of the next tile's
    Work work = row_work(plan, item < items ? tile * items + item : plan.channels * plan.splits);
    work.slot += slots;
    const auto sums = accumulate_row<T, V, Simple>(p, plan, work, shared.x, kept_dz);
    if (work.member == 0 && item < items) shared.items[item] = sums;
  }
  __syncthreads();

  const int64_t rows = plan.columns * plan.set_channels;
#pragma unroll 1
  for (int64_t i = thread; workspace != nullptr && i < rows; i += threads) {
    if (tile * rows + i >= plan.channels) break;
    SumPair<A> sums{};
#pragma unroll 1
    for (int64_t part = 0; part < plan.splits; ++part)
      sums.merge(shared.items[i * plan.splits + part]);
    store_partial(workspace, 1, plan.channels, 0, tile * rows + i, sums);
  }

  const int set_threads = threads / plan.columns;
  const int64_t set_items = plan.set_channels * plan.splits, column = thread / set_threads;
  const int64_t first = (tile * plan.columns + column) % plan.groups * plan.set_channels;
  SumPair<A> states[1] = {};
#pragma unroll 1
  for (int64_t i = thread % set_threads; i < set_items; i += set_threads)
    states[0].merge(weighted(p, first + i / plan.splits, shared.items[column * set_items + i]));
  reduce_columns<false>(states, plan.columns, shared.reduction.scratch, shared.reduction.result);

  slots = 0;
#pragma unroll 1
  for (int64_t item = thread / plan.team; item < items; item += teams, slots += wave_slots) {
    Work work = row_work(plan, tile * items + item);
    if (work.row >= plan.channels) return;
    work.slot += slots;
    RowLanes<A> lanes;
    lanes.load(p, plan, work.row);
    lanes.load(set_gradient(plan, lanes.rstd, shared.reduction.result[item / set_items]));
    apply_backward<T, V, false, Simple>(
        p, plan, work, static_cast<const BackwardLanes<A, 1>&>(lanes),
        static_cast<const Pack<T, V>*>(shared.x), static_cast<const Pack<T, V>*>(kept_dz));
  }
}

// ---- backward over columns ----

// results[i]: sums of dz and dz * (x - mean) of the tile's channels, of which the second becomes that of dz * xhat.
// Stored as partials unless workspace is null.
template <int V, class A>
__device__ __forceinline__ void store_gradients(const GroupPlan& plan, const Place& place,
                                                const A* rstd, SumPair<A>* results, A* workspace) {
  const int width = plan.tile_packs * V;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x))
    results[i].second *= rstd[i];
  __syncthreads();
  if (workspace != nullptr) store_partials(plan, place, width, results, workspace);
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_backward_reduce_columns(const Backward p, const GroupPlan plan,
                                       acc_t<T>* workspace) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const ColumnsShared<T, V, SumPair> shared(memory, plan, 4, 0, true);
  const Place place = block_place(plan);
  column_constants<V>(p, plan, place, true, shared.constants,
                      [&](int, int64_t set) { return load_statistics<A>(p, set); });
  ForwardLanes<A, V> lanes;
  lanes.load(shared.constants, plan.columns);
  SumPair<A> sums[V] = {};
  accumulate_gradients<T, V, true, Simple>(
      p, plan, block_work<V, true>(plan, place), lanes, static_cast<T*>(nullptr),
      static_cast<Pack<T, V>*>(nullptr), static_cast<Pack<T, V>*>(nullptr), sums);
  block_reduce(sums, plan.columns, shared.reduction.scratch, shared.reduction.result);
  store_gradients<V>(plan, place, shared.constants + 3 * plan.columns * V, shared.reduction.result,
                     workspace);
}

// Constants 3 (shift) and 4 (slope). `gradient(set)`. Ends with a barrier.
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
    group_norm_backward_apply_columns(const Backward p, const GroupPlan plan,
                                      const SetGradient<acc_t<T>>* gradients) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const ColumnsShared<T, V, SumPair> shared(memory, plan, 5, 0, false);
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
    group_norm_backward_fused_columns(const Backward p, const GroupPlan plan, acc_t<T>* workspace) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const ColumnsShared<T, V, SumPair> shared(memory, plan, 5, plan.keep_dz ? 2 : 1, true);
  Pack<T, V>* const kept_dz = plan.keep_dz ? shared.dz : nullptr;
  const Place place = block_place(plan);
  const Work work = block_work<V, true>(plan, place);
  column_constants<V>(p, plan, place, true, shared.constants,
                      [&](int, int64_t set) { return load_statistics<A>(p, set); });
  SumPair<A> sums[V] = {};
  {
    ForwardLanes<A, V> lanes;
    lanes.load(shared.constants, plan.columns);
    accumulate_gradients<T, V, true, Simple>(p, plan, work, lanes, static_cast<T*>(nullptr),
                                             shared.x, kept_dz, sums);
  }
  SumPair<A>* const results = shared.reduction.result;
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

// ---- host: plans ----

// S = 1 is the same memory in either layout; channels_first reads it in one run.
GroupNormShape canonical(GroupNormShape s) {
  if (s.s == 1) s.layout = Layout::channels_first;
  return s;
}

// channels_last with C no multiple of the pack: `repeats` rows of C, as one row, are.
struct Folded {
  int64_t c, s, repeats;
};

Folded fold(const GroupNormShape& s) {
  const int64_t v = pack_elements(s.dtype), repeats = v / std::gcd(s.c, v);
  if (s.s % repeats != 0) return {s.c, s.s, 1};
  return {s.c * repeats, s.s / repeats, repeats};
}

int64_t vector_columns(const GroupNormShape& s) {
  const int64_t v = pack_elements(s.dtype);
  return fold(s).c % v == 0 ? v : 1;
}

// Threads side by side over `packs` packs: whole 128 bytes at least, with the fewest idle.
int split_columns(int64_t packs) {
  const auto padded = [&](int columns) { return divide_up(packs, columns) * columns; };
  int best = static_cast<int>(std::min<int64_t>(power_of_two_above(packs), kMaxColumns));
  for (int columns = best / 2; columns >= 8; columns /= 2)
    if (padded(columns) < padded(best)) best = columns;
  return best;
}

// Channels of a tile: from the shape alone, as all that says how a sum is split.
int64_t split_tile_channels(const GroupNormShape& s) {
  const int64_t v = vector_columns(s), c = fold(s).c;
  return std::min<int64_t>(c, split_columns(divide_up(c, v)) * v);
}

// Channels of a fused tile: whole sets and whole packs; 0 where those are too many.
int64_t fused_tile_channels(const GroupNormShape& s) {
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

// Blocks that share a run.
int64_t run_splits(const GroupNormShape& s) {
  const int64_t wanted = divide_up(s.set_size(), kSplitElements);
  const int64_t useful = divide_up(kMultiprocessors * 16, s.sets());
  const int64_t least = divide_up(s.c / s.groups, kTableChannels);
  return std::max({int64_t{1}, least, std::min(wanted, useful)});
}

// Blocks that share a tile of channels of one sample.
int64_t column_splits(const GroupNormShape& s) {
  const Folded f = fold(s);
  const int64_t tile_channels = split_tile_channels(s);
  const int64_t wanted = divide_up(f.s * tile_channels, kSplitElements);
  const int64_t useful = divide_up(kMultiprocessors * 4, s.n * divide_up(f.c, tile_channels));
  return std::max<int64_t>(1, std::min({wanted, useful, f.s}));
}

// Parts of a row that teams share: many more than run at a time, for a short tail.
int64_t row_parts(const GroupNormShape& s) {
  const int64_t useful = divide_up(kMultiprocessors * 96, s.n * s.c);
  return std::max<int64_t>(1, std::min(divide_up(s.s, kPartElements), useful));
}

GroupPlan make_plan(const GroupNormShape& s) {
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

void set_rows(GroupPlan& plan, int64_t rows, int64_t elements, int v) {
  plan.channels = rows;
  plan.row = elements;
  plan.packs = packs_per_row(elements, v);
  plan.whole_packs = elements % v == 0;
  plan.positions = plan.packs;
}

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
    // about four packs per thread, and whole sectors
    const int64_t least = std::min<int64_t>(2, plan.packs);
    plan.threads = kTeamThreads;
    plan.columns = kTeamThreads /
                   static_cast<int>(std::max(least, power_of_two_above(divide_up(plan.packs, 4))));
    plan.tiles = divide_up(plan.sets, plan.columns);
  }
  plan.table = std::min(plan.columns * plan.set_channels, s.c);
  return plan;
}

GroupPlan row_plan(const GroupNormShape& s, int v, bool fused) {
  GroupPlan plan = make_plan(s);
  set_rows(plan, s.n * s.c, s.s, v);
  // about four packs per thread, and whole 128 bytes where the row has them
  const int64_t least = std::min<int64_t>(8, power_of_two_above(plan.packs));
  plan.team = static_cast<int>(
      std::min<int64_t>(kWarp, std::max(least, power_of_two_above(divide_up(plan.packs, 4)))));
  if (!fused) {
    plan.splits = row_parts(s);
    plan.tiles = divide_up(plan.channels * plan.splits, plan.threads / plan.team);
  } else {
    const int64_t set_packs = plan.set_channels * plan.packs;
    plan.threads = fused_threads(set_packs, kBackwardUnroll);
    if (set_packs <= kTeamPacks) {
      plan.threads = kTeamThreads;
      plan.columns = kTeamThreads;
      while (plan.columns * set_packs > 4 * kTeamPacks) plan.columns /= 2;
    }
    plan.tiles = divide_up(plan.sets, plan.columns);
    plan.splits = divide_up(plan.packs, 2 * plan.team);
  }
  plan.per_split = divide_up(plan.positions, plan.splits);
  return plan;
}

GroupPlan column_plan(const GroupNormShape& s, int v, bool fused, int unroll) {
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

// ---- host: which path ----

// Calls body<T, V, CL, Simple>(). `row`: elements that lie together, channels_first.
template <class Body>
void dispatch(const GroupNormShape& s, int64_t row, Activation act, bool aligned, Body body) {
  const int v = kVectorBytes / element_bytes(s.dtype);
  const bool last = s.layout == Layout::channels_last;
  const bool vectors = aligned && (last ? fold(s).c % v == 0 : row_takes_packs(row, v));
  dispatch_types(s.dtype, s.layout, vectors, act, body);
}

// Whether a block can hold what bytes<T, V, CL>() says, for packs and for single elements.
template <class Bytes>
bool fits(const GroupNormShape& s, int64_t row, Bytes bytes) {
  int64_t most = 0;
  for (const bool aligned : {true, false})
    dispatch(s, row, Activation::identity, aligned, [&]<class T, int V, bool CL, bool Simple>() {
      most = std::max<int64_t>(most, bytes.template operator()<T, V, CL>());
    });
  return most <= static_cast<int64_t>(shared_memory_limit());
}

// The balance of the paths of forward, or of backward.
Balance make_balance(const GroupNormShape& s, bool backward) {
  const int bytes = element_bytes(s.dtype), v = pack_elements(s.dtype);
  Balance balance{};
  balance.tensor_bytes = s.n * s.c * s.s * bytes;
  if (s.layout == Layout::channels_last) {
    const Folded f = fold(s);
    const int64_t tile = fused_tile_channels(s);
    balance.fused_tiles = s.n * divide_up(f.c, tile);
    balance.tile_bytes = tile * f.s * bytes;
    balance.split_blocks = s.n * divide_up(f.c, split_tile_channels(s)) * column_splits(s);
    balance.more_launches = 2;
    return balance;
  }
  const GroupPlan plan = backward ? row_plan(s, v, true) : run_plan(s, v, true, 4);
  balance.fused_tiles = plan.tiles;
  balance.tile_bytes = plan.columns * plan.count * bytes;
  balance.split_blocks = backward ? row_plan(s, v, false).tiles : s.sets() * run_splits(s);
  balance.more_launches = 1;
  return balance;
}

bool forward_is_fused(const Forward& p) {
  const GroupNormShape& s = p.shape;
  if (s.layout == Layout::channels_last && fused_tile_channels(s) == 0) return false;
  const bool fit = fits(s, s.set_size(), [&]<class T, int V, bool CL>() -> int64_t {
    constexpr int U = stats_unroll<T, V>();
    if constexpr (CL)
      return ColumnsShared<T, V, Welford>(nullptr, column_plan(s, V, true, U), 3, 1, true)
          .layout.bytes;
    else
      return RunsShared<T, V>(nullptr, run_plan(s, V, true, U), true).layout.bytes;
  });
  const int64_t once = p.residual != nullptr ? 3 : 2;
  return fit && fused_is_faster(make_balance(s, false), {once, 0}, {once, 1});
}

// Slabs that the fused backward keeps in shared memory: x and dz, x alone, or 0 where it is not used.
int fused_slabs(const Backward& p) {
  const GroupNormShape& s = p.shape;
  if (p.dx == nullptr) return 0;
  if (s.layout == Layout::channels_last && fused_tile_channels(s) == 0) return 0;
  Balance balance = make_balance(s, true);
  balance.more_launches = p.dweight != nullptr ? 1 : 2;
  for (int slabs = stored_dz_is_exact(s.dtype, p.act) ? 2 : 1; slabs > 0; --slabs) {
    const bool fit = fits(s, s.s, [&]<class T, int V, bool CL>() -> int64_t {
      if constexpr (CL)
        return ColumnsShared<T, V, SumPair>(nullptr, column_plan(s, V, true, kBackwardUnroll), 5,
                                            slabs, true)
            .layout.bytes;
      else
        return RowsShared<T, V>(nullptr, row_plan(s, V, true), slabs).layout.bytes;
    });
    if (!fit) continue;
    return fused_is_faster(balance, backward_traffic(p, slabs), backward_traffic(p, 0)) ? slabs : 0;
  }
  return 0;
}

// ---- host: launches ----

LaunchConfig block_per_tile(const GroupPlan& plan, int64_t splits, int64_t shared, void* stream) {
  return {plan.tiles * plan.samples * splits, plan.threads, static_cast<size_t>(shared), stream};
}

template <class State>
LaunchConfig finalize_config(int64_t blocks, int64_t items, int columns, void* stream) {
  const int threads = finalize_threads(items);
  SharedLayout layout{nullptr};
  Reduction<State>(layout, threads, columns, 1);
  return {blocks, threads, static_cast<size_t>(layout.bytes), stream};
}

template <class T, int V, bool CL>
LaunchConfig stats_config(const GroupPlan& plan, void* stream) {
  SharedLayout layout{nullptr};
  Reduction<Welford<acc_t<T>>>(layout, plan.threads, plan.columns, CL ? V : 1);
  return block_per_tile(plan, plan.splits, layout.bytes, stream);
}

template <class T, int V, bool Simple>
void forward_runs(const Forward& p, bool fused, acc_t<T>* workspace, void* stream) {
  GroupPlan plan = run_plan(p.shape, V, fused, stats_unroll<T, V>());
  const int64_t shared = RunsShared<T, V>(nullptr, plan, fused).layout.bytes;
  const LaunchConfig config = block_per_tile(plan, plan.splits, shared, stream);
  if (fused) {
    launch("group_norm_fused_runs", &group_norm_fused_runs<T, V, Simple>, config, p, plan);
    return;
  }
  launch("group_norm_stats", &group_norm_stats<T, V, false>,
         stats_config<T, V, false>(plan, stream), p, plan, workspace);
  plan.backwards = true;
  launch("group_norm_apply_runs", &group_norm_apply_runs<T, V, Simple>, config, p, plan, workspace);
}

// One group is one run in this layout too: its statistics need no sums per channel.
template <class T, int V, bool CL>
void stats_of_columns(const Forward& p, acc_t<T>* workspace, void* stream) {
  using A = acc_t<T>;
  GroupPlan plan = CL ? column_plan(p.shape, V, false, 1) : run_plan(p.shape, V, false, 1);
  if (!CL) plan.set_channels = 1;
  launch("group_norm_stats", &group_norm_stats<T, V, CL>, stats_config<T, V, CL>(plan, stream), p,
         plan, workspace);
  const int64_t items = plan.splits * plan.set_channels * plan.repeats;
  launch("group_norm_finalize_stats", &group_norm_finalize_stats<A>,
         finalize_config<Welford<A>>(plan.sets, items, 1, stream), p, plan, workspace);
}

template <class T, int V, bool Simple>
void forward_columns(const Forward& p, bool fused, acc_t<T>* workspace, void* stream) {
  GroupPlan plan = column_plan(p.shape, V, fused, stats_unroll<T, V>());
  const ColumnsShared<T, V, Welford> shared(nullptr, plan, 3, fused ? 1 : 0, fused);
  const LaunchConfig config = block_per_tile(plan, plan.splits, shared.layout.bytes, stream);
  if (fused) {
    launch("group_norm_fused_columns", &group_norm_fused_columns<T, V, Simple>, config, p, plan);
    return;
  }
  if (p.shape.groups == 1) {
    stats_of_columns<T, V, false>(p, workspace, stream);
  } else {
    stats_of_columns<T, V, true>(p, workspace, stream);
  }
  plan.backwards = true;
  launch("group_norm_apply_columns", &group_norm_apply_columns<T, V, Simple>, config, p, plan);
}

// From the partial sums per channel to constants per set, if these are wanted, and to dweight and dbias, if those are.
template <class A>
void finalize_grads(const Backward& p, const GroupPlan& plan, bool sets, const A* workspace,
                    SetGradient<A>* gradients, void* stream) {
  const int64_t set_blocks = sets ? plan.sets : 0;
  const int64_t channel_blocks = p.dweight != nullptr ? divide_up(plan.c, kFinalizeColumns) : 0;
  if (set_blocks + channel_blocks == 0) return;
  const int64_t set_items = plan.splits * plan.set_channels * plan.repeats;
  const int64_t channel_items =
      plan.splits * plan.samples * plan.channels / plan.c * kFinalizeColumns;
  launch("group_norm_finalize_grads", &group_norm_finalize_grads<A>,
         finalize_config<SumPair<A>>(set_blocks + channel_blocks,
                                     std::max(sets ? set_items : 0, channel_items),
                                     kFinalizeColumns, stream),
         p, plan, set_blocks, workspace, gradients);
}

template <class T, int V, bool CL, bool Simple>
void backward(const Backward& p, int slabs, acc_t<T>* workspace, void* stream) {
  using A = acc_t<T>;
  const bool fused = slabs > 0;
  GroupPlan plan =
      CL ? column_plan(p.shape, V, fused, kBackwardUnroll) : row_plan(p.shape, V, fused);
  plan.reads_dz = stored_dz_is_exact(p.shape.dtype, p.act);
  plan.keep_dz = slabs > 1;
  if (fused) {
    A* partials = p.dweight != nullptr ? workspace : nullptr;
    if constexpr (CL) {
      const ColumnsShared<T, V, SumPair> shared(nullptr, plan, 5, slabs, true);
      launch("group_norm_backward_fused_columns", &group_norm_backward_fused_columns<T, V, Simple>,
             block_per_tile(plan, 1, shared.layout.bytes, stream), p, plan, partials);
    } else {
      const RowsShared<T, V> shared(nullptr, plan, slabs);
      launch("group_norm_backward_fused_rows", &group_norm_backward_fused_rows<T, V, Simple>,
             block_per_tile(plan, 1, shared.layout.bytes, stream), p, plan, partials);
    }
    plan.splits = 1;
    finalize_grads<A>(p, plan, false, workspace, nullptr, stream);
    return;
  }
  auto* gradients =
      reinterpret_cast<SetGradient<A>*>(workspace + 2 * plan.splits * plan.samples * plan.channels);
  if constexpr (CL) {
    const ColumnsShared<T, V, SumPair> shared(nullptr, plan, 4, 0, true);
    launch("group_norm_backward_reduce_columns", &group_norm_backward_reduce_columns<T, V, Simple>,
           block_per_tile(plan, plan.splits, shared.layout.bytes, stream), p, plan, workspace);
  } else {
    launch("group_norm_backward_reduce_rows", &group_norm_backward_reduce_rows<T, V, Simple>,
           block_per_tile(plan, 1, 0, stream), p, plan, workspace);
  }
  finalize_grads<A>(p, plan, p.dx != nullptr, workspace, gradients, stream);
  if (p.dx == nullptr) return;
  plan.backwards = true;
  if constexpr (CL) {
    const ColumnsShared<T, V, SumPair> shared(nullptr, plan, 5, 0, false);
    launch("group_norm_backward_apply_columns", &group_norm_backward_apply_columns<T, V, Simple>,
           block_per_tile(plan, plan.splits, shared.layout.bytes, stream), p, plan, gradients);
  } else {
    launch("group_norm_backward_apply_rows", &group_norm_backward_apply_rows<T, V, Simple>,
           block_per_tile(plan, 1, 0, stream), p, plan, gradients);
  }
}

size_t acc_bytes(const GroupNormShape& s, int64_t count) {
  return static_cast<size_t>(count * (s.dtype == DType::f64 ? 8 : 4));
}

void clear(void* pointer, size_t bytes, void* stream) {
  if (pointer != nullptr && bytes > 0)
    check(cudaMemsetAsync(pointer, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

}  // namespace

size_t group_norm_forward_workspace(const GroupNormForward& given) {
  Forward p = given;
  p.shape = canonical(p.shape);
  const GroupNormShape& s = p.shape;
  if (s.is_empty() || forward_is_fused(p)) return 0;
  const bool runs = s.layout == Layout::channels_first || s.groups == 1;
  const int64_t partials = runs ? run_splits(s) * s.sets() : column_splits(s) * s.n * fold(s).c;
  return acc_bytes(s, 3 * partials);
}

size_t group_norm_backward_workspace(const GroupNormBackward& given) {
  Backward p = given;
  p.shape = canonical(p.shape);
  const GroupNormShape& s = p.shape;
  if (s.is_empty()) return 0;
  const bool fused = fused_slabs(p) > 0, last = s.layout == Layout::channels_last;
  const int64_t columns = s.n * (last ? fold(s).c : s.c);
  if (fused) return p.dweight != nullptr ? acc_bytes(s, 2 * columns) : 0;
  return acc_bytes(s, 2 * columns * (last ? column_splits(s) : row_parts(s)) + 2 * s.sets());
}

void group_norm_forward(const GroupNormForward& given, void* workspace, void* stream) {
  Forward p = given;
  p.shape = canonical(p.shape);
  const GroupNormShape& s = p.shape;
  if (s.is_empty()) {
    clear(p.mean, acc_bytes(s, s.sets()), stream);
    clear(p.var, acc_bytes(s, s.sets()), stream);
    return;
  }
  const bool fused = forward_is_fused(p);
  dispatch(s, s.set_size(), p.act, vector_aligned(p.x, p.residual, p.out),
           [&]<class T, int V, bool CL, bool Simple>() {
             auto* partials = static_cast<acc_t<T>*>(workspace);
             if constexpr (CL)
               forward_columns<T, V, Simple>(p, fused, partials, stream);
             else
               forward_runs<T, V, Simple>(p, fused, partials, stream);
           });
}

void group_norm_backward(const GroupNormBackward& given, void* workspace, void* stream) {
  Backward p = given;
  p.shape = canonical(p.shape);
  const GroupNormShape& s = p.shape;
  if (s.is_empty()) {
    clear(p.dweight, acc_bytes(s, s.c), stream);
    clear(p.dbias, acc_bytes(s, s.c), stream);
    return;
  }
  const int slabs = fused_slabs(p);
  dispatch(s, s.s, p.act, vector_aligned(p.x, p.dout, p.saved, p.dx, p.dresidual),
           [&]<class T, int V, bool CL, bool Simple>() {
             backward<T, V, CL, Simple>(p, slabs, static_cast<acc_t<T>*>(workspace), stream);
           });
}

}  // namespace advdl_ops::cuda
