// y = act(batch_norm(x) + residual) and its gradients on CUDA. docs/kernels.md: algorithms, bytes, launches.
//
// One source serves both layouts and all types. A block owns a tile of channels (channels_first: one channel;
// channels_last: up to 32 packs of neighbouring channels) and a range of its positions (the split). Thread t
// works on column t % columns of the tile; its "lanes" are the channels it keeps apart: one where a pack lies
// along S, V where it lies along C.
//
//   forward   training: fused (slab of the tile in shared memory), or stats [+ finalize_stats] + apply
//             eval:     apply
//   backward  training: fused, or reduce + apply (channels_last: + finalize_grads between)
//             eval, or no dx: reduce (writes dx) + finalize_grads
#include "../common/batch_norm_act.h"

#include "norm.h"

namespace advdl_ops::cuda {
namespace {

using Forward = BatchNormActForward;
using Backward = BatchNormActBackward;

// ---- shared memory: slab(s) | states of the block reduction | results | constants per channel ----

template <class State, class A>
struct Shared {
  State *scratch, *result;
  A* constants;  // [which][width]

  // Without `reduces` there are only constants.
  __device__ Shared(unsigned char* base, int width, bool reduces = true) {
    scratch = reinterpret_cast<State*>(base);
    result = scratch + (reduces ? static_cast<int>(blockDim.x) / kWarp * width : 0);
    constants = reinterpret_cast<A*>(result + (reduces ? width : 0));
  }
};

// Bytes of one slab: the packs of a whole tile.
template <class T, int V>
ADVDL_HOST_DEVICE int64_t kept_bytes(const Plan& plan) {
  const int64_t bytes = plan.positions * plan.columns * static_cast<int64_t>(sizeof(Pack<T, V>));
  return (bytes + 15) / 16 * 16;
}

template <class State, class A>
int64_t shared_bytes(const Plan& plan, int lanes, int constants, bool reduces = true) {
  const int width = plan.columns * lanes;
  int64_t bytes = width * constants * static_cast<int64_t>(sizeof(A));
  if (reduces)
    bytes += (reduce_rows(plan.threads, plan.columns) + 1) * width * int64_t{sizeof(State)};
  return (bytes + 15) / 16 * 16;
}

// ---- statistics ----

// From a channel's merged state: what the forward pass returns about it.
template <class A>
__device__ __forceinline__ void write_training_statistics(const Forward& p, const Plan& plan,
                                                          int64_t c, A mean, A rstd, A var) {
  static_cast<A*>(p.mean)[c] = mean;
  static_cast<A*>(p.rstd)[c] = rstd;
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
  const int width = plan.columns * Lanes;
  Shared<Welford<A>, A> shared(memory, width);
  const Place place = block_place(plan);
  Welford<A> states[Lanes] = {};
  accumulate_statistics<T, V, CL>(static_cast<const T*>(p.x), plan, block_work<V, CL>(plan, place),
                                  static_cast<Pack<T, V>*>(nullptr), states);
  block_reduce(states, plan.columns, shared.scratch, shared.result);
  store_partials(plan, place, width, shared.result, workspace);
}

template <class A>
__global__ void __launch_bounds__(kFinalizeThreads, 1)
    batch_norm_finalize_stats(const Forward p, const Plan plan, const A* workspace) {
  ADVDL_DYNAMIC_SHARED(memory);
  Shared<Welford<A>, A> shared(memory, kFinalizeColumns);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFinalizeColumns;
  merge_partials(workspace, plan.splits, plan.channels, first, kFinalizeColumns, shared.scratch,
                 shared.result);
  const int64_t c = first + threadIdx.x;
  if (threadIdx.x < kFinalizeColumns && c < plan.channels) {
    const Welford<A> s = shared.result[threadIdx.x];
    const A var = s.m2 / static_cast<A>(plan.count);
    write_training_statistics(p, plan, c, s.mean, reciprocal_std(var, p.eps), var);
  }
}

// ---- forward apply ----

enum class Statistics { running, partials, stored, reduced };

// Fills constants 0 (mean), 1 (rstd * weight), 2 (bias) of the tile's channels from where its statistics are,
// and lets one block per channel write them out. Ends with a barrier.
template <class A>
__device__ __forceinline__ void forward_constants(const Forward& p, const Plan& plan,
                                                  Statistics from, int64_t tile, bool write,
                                                  int width, const Welford<A>* reduced,
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
      const Welford<A> s = reduced[i];
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
  const int width = plan.columns * (CL ? V : 1);
  Shared<Welford<A>, A> shared(memory, width, !CL);
  const Place place = block_place(plan);
  if constexpr (!CL) {
    if (from == Statistics::partials)
      merge_partials(workspace, plan.splits, plan.channels, place.tile, 1, shared.scratch,
                     shared.result);
  }
  forward_constants(p, plan, from, place.tile, place.split == 0, width, shared.result,
                    shared.constants);
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
  const int width = plan.columns * Lanes;
  auto* slab = reinterpret_cast<Pack<T, V>*>(memory);
  Shared<Welford<A>, A> shared(memory + kept_bytes<T, V>(plan), width);
  const Place place = block_place(plan);
  const Work work = block_work<V, CL>(plan, place);
  Welford<A> states[Lanes] = {};
  accumulate_statistics<T, V, CL>(static_cast<const T*>(p.x), plan, work, slab, states);
  block_reduce(states, plan.columns, shared.scratch, shared.result);
  forward_constants(p, plan, Statistics::reduced, place.tile, true, width, shared.result,
                    shared.constants);
  ForwardLanes<A, Lanes> lanes;
  lanes.load(shared.constants, plan.columns);
  apply_forward<T, V, CL, apply_unroll<T, V, CL, Simple>(), Simple>(p, plan, work, slab, lanes);
}

// ---- backward ----

// Constants 0 (mean), 1 (rstd * weight), 2 (bias). Ends with a barrier.
template <class A>
__device__ __forceinline__ void backward_constants(const Backward& p, const Plan& plan,
                                                   int64_t tile, int width, A* constants) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    const int64_t c = tile * width + i;
    if (c >= plan.channels) continue;
    constants[i] = static_cast<const A*>(p.mean)[c];
    constants[width + i] =
        static_cast<const A*>(p.rstd)[c] * load_param<A>(p.weight, p.shape.weight_dtype, c, A(1));
    constants[2 * width + i] = load_param<A>(p.bias, p.shape.weight_dtype, c, A(0));
  }
  __syncthreads();
}

// Constants 3 (shift) and 4 (slope) from the channel's sums of dz and dz * (x - mean); with `write` the parameters'
// gradients. Ends with a barrier.
template <class A>
__device__ __forceinline__ void gradient_constants(const Backward& p, const Plan& plan,
                                                   int64_t tile, bool write, int width,
                                                   const SumPair<A>* sums, A* constants) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    const int64_t c = tile * width + i;
    if (c >= plan.channels) continue;
    A dbias, dweight;
    const A rstd = static_cast<const A*>(p.rstd)[c];
    if (sums != nullptr) {
      dbias = sums[i].first;
      dweight = sums[i].second * rstd;
      if (write) {
        static_cast<A*>(p.dbias)[c] = dbias;
        static_cast<A*>(p.dweight)[c] = dweight;
      }
    } else {
      dbias = static_cast<const A*>(p.dbias)[c];
      dweight = static_cast<const A*>(p.dweight)[c];
    }
    if (constants != nullptr) {
      const A share = constants[width + i] / static_cast<A>(plan.count);
      constants[3 * width + i] = share * dbias;
      constants[4 * width + i] = share * dweight * rstd;
    }
  }
  __syncthreads();
}

template <class T, int V, bool CL, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_act_backward_reduce(const Backward p, const Plan plan, acc_t<T>* workspace) {
  using A = acc_t<T>;
  constexpr int Lanes = CL ? V : 1;
  ADVDL_DYNAMIC_SHARED(memory);
  const int width = plan.columns * Lanes;
  Shared<SumPair<A>, A> shared(memory, width);
  const Place place = block_place(plan);
  backward_constants(p, plan, place.tile, width, shared.constants);
  ForwardLanes<A, Lanes> lanes;
  lanes.load(shared.constants, plan.columns);
  SumPair<A> sums[Lanes] = {};
  accumulate_gradients<T, V, CL, Simple>(
      p, plan, block_work<V, CL>(plan, place), lanes, p.training ? nullptr : static_cast<T*>(p.dx),
      static_cast<Pack<T, V>*>(nullptr), static_cast<Pack<T, V>*>(nullptr), sums);
  block_reduce(sums, plan.columns, shared.scratch, shared.result);
  store_partials(plan, place, width, shared.result, workspace);
}

template <class A>
__global__ void __launch_bounds__(kFinalizeThreads, 1)
    batch_norm_finalize_grads(const Backward p, const Plan plan, const A* workspace) {
  ADVDL_DYNAMIC_SHARED(memory);
  Shared<SumPair<A>, A> shared(memory, kFinalizeColumns);
  const int64_t tile = blockIdx.x;
  merge_partials(workspace, plan.splits, plan.channels, tile * kFinalizeColumns, kFinalizeColumns,
                 shared.scratch, shared.result);
  gradient_constants(p, plan, tile, true, kFinalizeColumns, shared.result,
                     static_cast<A*>(nullptr));
}

template <class T, int V, bool CL, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_act_backward_apply(const Backward p, const Plan plan, const acc_t<T>* workspace) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const int width = plan.columns * (CL ? V : 1);
  Shared<SumPair<A>, A> shared(memory, width, !CL);
  const Place place = block_place(plan);
  backward_constants(p, plan, place.tile, width, shared.constants);
  if constexpr (!CL)
    merge_partials(workspace, plan.splits, plan.channels, place.tile, 1, shared.scratch,
                   shared.result);
  gradient_constants(p, plan, place.tile, place.split == 0, width, CL ? nullptr : shared.result,
                     shared.constants);
  BackwardLanes<A, CL ? V : 1> lanes;
  lanes.load(shared.constants, plan.columns);
  apply_backward<T, V, CL, Simple>(p, plan, block_work<V, CL>(plan, place), lanes,
                                   static_cast<const Pack<T, V>*>(nullptr),
                                   static_cast<const Pack<T, V>*>(nullptr));
}

template <class T, int V, bool CL, bool Simple>
__global__ void __launch_bounds__(kFusedThreads, 1)
    batch_norm_act_backward_fused(const Backward p, const Plan plan) {
  using A = acc_t<T>;
  constexpr int Lanes = CL ? V : 1;
  ADVDL_DYNAMIC_SHARED(memory);
  const int width = plan.columns * Lanes;
  const int64_t slab = kept_bytes<T, V>(plan);
  auto* kept_x = reinterpret_cast<Pack<T, V>*>(memory);
  auto* kept_dz = plan.keep_dz ? reinterpret_cast<Pack<T, V>*>(memory + slab) : nullptr;
  Shared<SumPair<A>, A> shared(memory + (plan.keep_dz ? 2 : 1) * slab, width);
  const Place place = block_place(plan);
  const Work work = block_work<V, CL>(plan, place);
  backward_constants(p, plan, place.tile, width, shared.constants);
  SumPair<A> sums[Lanes] = {};
  {
    ForwardLanes<A, Lanes> lanes;
    lanes.load(shared.constants, plan.columns);
    accumulate_gradients<T, V, CL, Simple>(p, plan, work, lanes, static_cast<T*>(nullptr), kept_x,
                                           kept_dz, sums);
  }
  block_reduce(sums, plan.columns, shared.scratch, shared.result);
  gradient_constants(p, plan, place.tile, true, width, shared.result, shared.constants);
  BackwardLanes<A, Lanes> lanes;
  lanes.load(shared.constants, plan.columns);
  apply_backward<T, V, CL, Simple>(p, plan, work, lanes, kept_x, kept_dz);
}

// ---- host ----

bool channels_last(const BatchNormActShape& s) { return s.layout == Layout::channels_last; }

// Channels of a tile, the most over the pack sizes; from the shape alone, as the two functions below.
int64_t tile_channels_of(const BatchNormActShape& s, bool fused) {
  if (!channels_last(s)) return 1;
  return std::min<int64_t>(s.c, fused ? kFusedTileBytes / element_bytes(s.dtype) : 256);
}

// Blocks that share a tile.
int64_t splits_of(const BatchNormActShape& s) {
  const int64_t count = s.n * s.s;
  const int64_t tile_channels = tile_channels_of(s, false);
  const int64_t blocks = kMultiprocessors * (channels_last(s) ? 8 : 16);
  const int64_t wanted = divide_up(count * tile_channels, kSplitElements);
  const int64_t useful = divide_up(blocks, divide_up(s.c, tile_channels));
  return std::max<int64_t>(1, std::min({wanted, useful, count}));
}

// Shared bytes of a fused tile, the larger over the pack sizes.
int64_t slab_bytes(const BatchNormActShape& s) {
  const int bytes = element_bytes(s.dtype), v = pack_elements(s.dtype);
  if (channels_last(s))
    return s.n * s.s * std::min<int64_t>(kFusedTileBytes, power_of_two_above(s.c) * bytes) + 16;
  const int64_t scalar = s.n * s.s * bytes;
  return std::max(scalar, row_takes_packs(s.s, v) ? s.n * packs_per_row(s.s, v) * v * bytes : 0) +
         16;
}

// How many slabs (0, 1 or `most`) a block can hold.
int slabs_that_fit(const BatchNormActShape& s, int most) {
  const int64_t room = static_cast<int64_t>(shared_memory_limit()) - kScratchReserve;
  for (int slabs = most; slabs > 0; --slabs)
    if (slab_bytes(s) * slabs <= room) return slabs;
  return 0;
}

bool fused_is_faster(const BatchNormActShape& s, Traffic fused, Traffic split) {
  const int64_t channel = s.n * s.s * element_bytes(s.dtype);
  Balance balance;
  balance.tensor_bytes = channel * s.c;
  balance.fused_tiles = divide_up(s.c, tile_channels_of(s, true));
  balance.tile_bytes = tile_channels_of(s, true) * channel;
  balance.split_blocks = divide_up(s.c, tile_channels_of(s, false)) * splits_of(s);
  balance.more_launches = channels_last(s) ? 2 : 1;
  return fused_is_faster(balance, fused, split);
}

bool is_empty(const BatchNormActShape& s) { return s.n == 0 || s.s == 0; }

Plan make_plan(const BatchNormActShape& s, int v, bool fused, int unroll) {
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

template <class Body>
void dispatch(const BatchNormActShape& s, Activation act, bool aligned, Body body) {
  const int v = kVectorBytes / element_bytes(s.dtype);
  const bool vectors = aligned && (channels_last(s) ? s.c % v == 0 : row_takes_packs(s.s, v));
  dispatch_types(s.dtype, s.layout, vectors, act, body);
}

size_t workspace_bytes(const BatchNormActShape& s, int fields) {
  return static_cast<size_t>(fields * splits_of(s) * s.c * (s.dtype == DType::f64 ? 8 : 4));
}

// A block per tile and split, with room for `constants` per channel and `slabs` of its tile.
template <class T, int V, bool CL, template <class> class State>
LaunchConfig tile_config(const Plan& plan, int constants, int slabs, bool reduces, void* stream) {
  using A = acc_t<T>;
  const int64_t bytes = slabs * kept_bytes<T, V>(plan) +
                        shared_bytes<State<A>, A>(plan, CL ? V : 1, constants, reduces);
  return {plan.tiles * plan.splits, plan.threads, static_cast<size_t>(bytes), stream};
}

template <class State, class A>
LaunchConfig finalize_config(const Plan& plan, void* stream) {
  Plan block;
  block.columns = kFinalizeColumns;
  block.threads = finalize_threads(plan.splits * kFinalizeColumns);
  return {divide_up(plan.channels, kFinalizeColumns), block.threads,
          static_cast<size_t>(shared_bytes<State, A>(block, 1, 0)), stream};
}

bool forward_is_fused(const Forward& p) {
  if (!p.training || slabs_that_fit(p.shape, 1) == 0) return false;
  const int64_t once = p.residual != nullptr ? 3 : 2;
  return fused_is_faster(p.shape, {once, 0}, {once, 1});
}

// In training mode with dx wanted there is a second pass that depends on the sums of the first.
bool has_second_pass(const Backward& p) { return p.training && p.dx != nullptr; }

// Slabs that the fused backward keeps in shared memory: x and dz, x alone, or 0 where it is not used.
int fused_slabs(const Backward& p) {
  if (!has_second_pass(p)) return 0;
  const int slabs = slabs_that_fit(p.shape, stored_dz_is_exact(p.shape.dtype, p.act) ? 2 : 1);
  const bool fused =
      slabs > 0 && fused_is_faster(p.shape, backward_traffic(p, slabs), backward_traffic(p, 0));
  return fused ? slabs : 0;
}

}  // namespace

size_t batch_norm_act_forward_workspace(const BatchNormActForward& p) {
  const bool none = p.shape.c == 0 || is_empty(p.shape) || !p.training || forward_is_fused(p);
  return none ? 0 : workspace_bytes(p.shape, 3);
}

size_t batch_norm_act_backward_workspace(const BatchNormActBackward& p) {
  const bool none = p.shape.c == 0 || is_empty(p.shape) || fused_slabs(p) > 0;
  return none ? 0 : workspace_bytes(p.shape, 2);
}

void batch_norm_act_forward(const BatchNormActForward& p, void* workspace, void* stream) {
  if (p.shape.c == 0 || (p.training && is_empty(p.shape))) return;
  const bool fused = forward_is_fused(p);
  dispatch(p.shape, p.act, vector_aligned(p.x, p.residual, p.out),
           [&]<class T, int V, bool CL, bool Simple>() {
             using A = acc_t<T>;
             Plan plan = make_plan(p.shape, V, fused, stats_unroll<T, V>());
             if (fused) {
               launch("batch_norm_act_fused", &batch_norm_act_fused<T, V, CL, Simple>,
                      tile_config<T, V, CL, Welford>(plan, 3, 1, true, stream), p, plan);
               return;
             }
             A* partials = static_cast<A*>(workspace);
             Statistics from = Statistics::running;
             if (p.training) {
               launch("batch_norm_stats", &batch_norm_stats<T, V, CL>,
                      tile_config<T, V, CL, Welford>(plan, 0, 0, true, stream), p, plan, partials);
               from = CL ? Statistics::stored : Statistics::partials;
               if (CL)
                 launch("batch_norm_finalize_stats", &batch_norm_finalize_stats<A>,
                        finalize_config<Welford<A>, A>(plan, stream), p, plan, partials);
               plan.backwards = true;
             }
             launch("batch_norm_act_apply", &batch_norm_act_apply<T, V, CL, Simple>,
                    tile_config<T, V, CL, Welford>(plan, 3, 0, !CL, stream), p, plan, from,
                    partials);
           });
}

void batch_norm_act_backward(const BatchNormActBackward& p, void* workspace, void* stream) {
  if (p.shape.c == 0) return;
  if (is_empty(p.shape)) {
    const size_t bytes = static_cast<size_t>(p.shape.c) * (p.shape.dtype == DType::f64 ? 8 : 4);
    check(cudaMemsetAsync(p.dweight, 0, bytes, static_cast<cudaStream_t>(stream)),
          "cudaMemsetAsync");
    check(cudaMemsetAsync(p.dbias, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
    return;
  }
  const int slabs = fused_slabs(p);
  dispatch(
      p.shape, p.act, vector_aligned(p.x, p.dout, p.saved, p.dx, p.dresidual),
      [&]<class T, int V, bool CL, bool Simple>() {
        using A = acc_t<T>;
        Plan plan = make_plan(p.shape, V, slabs > 0, kBackwardUnroll);
        plan.reads_dz = stored_dz_is_exact(p.shape.dtype, p.act);
        if (slabs > 0) {
          plan.keep_dz = slabs > 1;
          launch("batch_norm_act_backward_fused", &batch_norm_act_backward_fused<T, V, CL, Simple>,
                 tile_config<T, V, CL, SumPair>(plan, 5, slabs, true, stream), p, plan);
          return;
        }
        A* partials = static_cast<A*>(workspace);
        launch("batch_norm_act_backward_reduce", &batch_norm_act_backward_reduce<T, V, CL, Simple>,
               tile_config<T, V, CL, SumPair>(plan, 3, 0, true, stream), p, plan, partials);
        if (CL || !has_second_pass(p))
          launch("batch_norm_finalize_grads", &batch_norm_finalize_grads<A>,
                 finalize_config<SumPair<A>, A>(plan, stream), p, plan, partials);
        if (!has_second_pass(p)) return;
        plan.backwards = true;
        launch("batch_norm_act_backward_apply", &batch_norm_act_backward_apply<T, V, CL, Simple>,
               tile_config<T, V, CL, SumPair>(plan, 5, 0, !CL, stream), p, plan, partials);
      });
}

}  // namespace advdl_ops::cuda
