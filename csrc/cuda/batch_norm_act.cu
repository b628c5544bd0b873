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

#include <algorithm>

#include "launch.h"
#include "reduce.h"
#include "vec.h"

namespace advdl_ops::cuda {
namespace {

using Forward = BatchNormActForward;
using Backward = BatchNormActBackward;

constexpr int kThreads = 256;       // of the kernels that split a channel over blocks
constexpr int kFusedThreads = 512;  // at most, of the kernels that keep a slab in shared memory
constexpr int kFinalizeColumns =
    8;  // channels per block of the finalize kernels: one sector of a row of partials
constexpr int kFinalizeThreads = 1024;  // at most
constexpr int kMaxColumns = kWarp;
constexpr int64_t kSplitElements = 16384;  // a split is worth at least this many elements of a tile
constexpr int64_t kFusedTileBytes = 32;    // one DRAM sector per row, channels_last
constexpr int64_t kScratchReserve = 8 * 1024;  // more than a fused kernel needs besides its slabs
// Of an H200, for every GPU: which path is taken follows from the shape.
constexpr int64_t kLaunchBytes = 10 * 1024 * 1024;  // it copies in the 2.5 us of one launch more
constexpr int64_t kCachedBytes = 25 * 1024 * 1024;  // half of its L2: writes pass through it too

// Packs in flight per thread and tensor. Statistics: 64 bytes, or 8 single elements.
template <class T, int V>
ADVDL_HOST_DEVICE constexpr int stats_unroll() {
  return V > 1 || sizeof(T) > 4 ? 4 : 8;
}
// Fewer where each lane keeps constants of its own (registers), and where each element carries the switch over
// all activations (code size).
template <class T, int V, bool CL, bool Simple>
ADVDL_HOST_DEVICE constexpr int apply_unroll() {
  if (Simple) return CL && V > 4 ? 2 : 4;
  return V > 1 ? 1 : 2;
}
// Two or three tensors are read at once.
template <class T, int V, bool Simple>
ADVDL_HOST_DEVICE constexpr int backward_unroll() {
  return Simple || V == 1 ? 2 : 1;
}

// How the work lies over the grid. Positions are numbered inside a tile: channels_first (row, pack of the row),
// channels_last rows of C.
struct Plan {
  int64_t rows = 0, channels = 0, row = 0;  // channels_first: N, C, S; channels_last: N * S, C, 1
  int64_t size = 0;                         // elements of x
  int64_t count = 0;                        // elements of a channel
  int64_t packs = 1;                        // positions per row (channels_first)
  int64_t positions = 0, per_split = 0;
  int64_t tiles = 0, splits = 1;
  int columns = 1;  // threads side by side over the channels of a tile
  int threads = kThreads;
  bool whole_packs = true;  // no pack crosses the end of a row
  bool backwards =
      false;            // walk the blocks in reverse: what the pass before read last is still in L2
  bool keep_dz = true;  // fused backward: dz as well as x fits in shared memory
  bool reads_dz = false;  // a second pass may read the dz that the first one stored
};

// ---- where a thread is ----

template <int V, bool CL>
struct Cursor {
  int64_t start = 0, pack = 0;          // first element of the row; pack of the row
  int64_t row_step = 0, pack_step = 0;  // per stride
  int64_t stride_elements = 0;

  __device__ Cursor(const Plan& plan, int64_t tile, int64_t position, int64_t stride) {
    if constexpr (CL) {
      const int64_t column = static_cast<int>(threadIdx.x) % plan.columns;
      start = position * plan.channels + (tile * plan.columns + column) * V;
      stride_elements = stride * plan.channels;
    } else {
      start = (position / plan.packs * plan.channels + tile) * plan.row;
      pack = position % plan.packs;
      row_step = stride / plan.packs * plan.channels * plan.row;
      pack_step = stride % plan.packs;
      stride_elements = plan.channels * plan.row;
    }
  }
  __device__ int64_t at() const {
    if constexpr (CL) return start;
    return (start & -int64_t{V}) + pack * V;
  }
  __device__ unsigned mask(const Plan& plan) const {
    if (CL || V == 1 || plan.whole_packs) return kFullMask<V>;
    // lanes [low, high) of the pack belong to the row
    const int64_t low = start - at(), high = low + plan.row;
    unsigned mask = low > 0 ? kFullMask<V> << low : kFullMask<V>;
    if (high < V) mask = high > 0 ? mask & (kFullMask<V> >> (V - high)) : 0u;
    return mask & kFullMask<V>;
  }
  __device__ void advance(const Plan& plan) {
    if constexpr (CL) {
      start += stride_elements;
    } else {
      start += row_step;
      pack += pack_step;
      if (pack >= plan.packs) {
        pack -= plan.packs;
        start += stride_elements;
      }
    }
  }
};

// Calls body(at, mask, slot) for groups of U positions of this thread in split `split` of tile `tile`: element
// offsets, wanted lanes (0: none), and the thread's own slot of a slab in shared memory (slot + k * threads).
template <int V, bool CL, int U, class Body>
__device__ __forceinline__ void walk(const Plan& plan, int64_t tile, int64_t split, Body body) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t stride = threads / plan.columns;
  const int64_t begin = split * plan.per_split;
  const int64_t end =
      begin + plan.per_split < plan.positions ? begin + plan.per_split : plan.positions;
  if (CL && (tile * plan.columns + thread % plan.columns) * V >= plan.channels) return;
  int64_t position = begin + thread / plan.columns;
  int64_t slot = thread;
  Cursor<V, CL> cursor(plan, tile, position, stride);
#pragma unroll 1
  for (; position < end; position += U * stride, slot += static_cast<int64_t>(U) * threads) {
    int64_t at[U];
    unsigned mask[U];
#pragma unroll
    for (int k = 0; k < U; ++k) {
      at[k] = cursor.at();
      mask[k] = position + k * stride < end ? cursor.mask(plan) : 0u;
      cursor.advance(plan);
    }
    body(at, mask, slot);
  }
}

__device__ __forceinline__ void tile_and_split(const Plan& plan, int64_t& tile, int64_t& split) {
  const unsigned block = plan.backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const unsigned tiles = static_cast<unsigned>(plan.tiles);
  tile = block % tiles;
  split = block / tiles;
}

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
  if (reduces) bytes += reduce_scratch<State>(plan.threads, width) + width * int64_t{sizeof(State)};
  return (bytes + 15) / 16 * 16;
}

// This thread's share of constant `which`.
template <int Lanes, class A>
__device__ __forceinline__ void load_constant(const A* constants, int which, int columns,
                                              A (&out)[Lanes]) {
  const A* from =
      constants + which * columns * Lanes + static_cast<int>(threadIdx.x) % columns * Lanes;
#pragma unroll
  for (int j = 0; j < Lanes; ++j) out[j] = from[j];
}

// Writes the block's results, one per channel of the tile, to the workspace ([fields][splits][C]).
template <class State, class A>
__device__ __forceinline__ void store_partials(const Plan& plan, int64_t tile, int64_t split,
                                               int width, const State* results, A* workspace) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    const int64_t c = tile * width + i;
    if (c < plan.channels)
      store_partial(workspace, plan.splits, plan.channels, split, c, results[i]);
  }
}

// ---- statistics ----

// Adds one group of packs along S: the group's own mean and deviations first (two passes over registers),
// then one Chan merge.
template <class T, int V, int U, class A>
__device__ __forceinline__ void add_group(const Pack<T, V> (&x)[U], const unsigned (&mask)[U],
                                          Welford<A>& state) {
  bool full = true;
#pragma unroll
  for (int k = 0; k < U; ++k) full = full && mask[k] == kFullMask<V>;
  A sum = A(0), m2 = A(0);
  if (full) {
#pragma unroll
    for (int k = 0; k < U; ++k)
#pragma unroll
      for (int j = 0; j < V; ++j) sum += to_acc(x[k].v[j]);
    const A mean = sum * (A(1) / A(U * V));  // a power of two
#pragma unroll
    for (int k = 0; k < U; ++k)
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A d = to_acc(x[k].v[j]) - mean;
        m2 += d * d;
      }
    state.merge({A(U * V), mean, m2});
    return;
  }
  int wanted = 0;
#pragma unroll
  for (int k = 0; k < U; ++k) {
    wanted += __popc(mask[k]);
#pragma unroll
    for (int j = 0; j < V; ++j) sum += mask[k] >> j & 1u ? to_acc(x[k].v[j]) : A(0);
  }
  if (wanted == 0) return;
  const A mean = sum / A(wanted);
#pragma unroll
  for (int k = 0; k < U; ++k)
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const A d = mask[k] >> j & 1u ? to_acc(x[k].v[j]) - mean : A(0);
      m2 += d * d;
    }
  state.merge({A(wanted), mean, m2});
}

// The same with each lane a channel of its own: a pack is wanted whole or not at all.
template <class T, int V, int U, class A>
__device__ __forceinline__ void add_group(const Pack<T, V> (&x)[U], const unsigned (&mask)[U],
                                          A& count, A (&mean)[V], A (&m2)[V]) {
  int wanted = 0;
#pragma unroll
  for (int k = 0; k < U; ++k) wanted += mask[k] != 0u;
  const A added = A(wanted), total = count + added;
  const A inverse = A(1) / added, share = added / total, weight = count * share;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    A sum = A(0), deviations = A(0);
#pragma unroll
    for (int k = 0; k < U; ++k) sum += mask[k] != 0u ? to_acc(x[k].v[j]) : A(0);
    const A group_mean = sum * inverse;
#pragma unroll
    for (int k = 0; k < U; ++k) {
      const A d = mask[k] != 0u ? to_acc(x[k].v[j]) - group_mean : A(0);
      deviations += d * d;
    }
    const A delta = group_mean - mean[j];
    m2[j] += deviations + delta * weight * delta;
    mean[j] += delta * share;
  }
  count = total;
}

// One pass over the block's share of x. `kept`: where the packs stay for the second pass, or null.
template <class T, int V, bool CL, class A, int Lanes>
__device__ __forceinline__ void accumulate_statistics(const Forward& p, const Plan& plan,
                                                      int64_t tile, int64_t split, Pack<T, V>* kept,
                                                      Welford<A> (&states)[Lanes]) {
  constexpr int U = stats_unroll<T, V>();
  const T* x = static_cast<const T*>(p.x);
  const int threads = static_cast<int>(blockDim.x);
  A count = A(0), mean[Lanes] = {}, m2[Lanes] = {};
  walk<V, CL, U>(plan, tile, split,
                 [&](const int64_t (&at)[U], const unsigned (&mask)[U], int64_t slot) {
                   Pack<T, V> packs[U];
#pragma unroll
                   for (int k = 0; k < U; ++k)
                     packs[k] = load_pack<T, V, CL>(x, at[k], mask[k], plan.size);
                   if (kept != nullptr) {
#pragma unroll
                     for (int k = 0; k < U; ++k)
                       if (mask[k] != 0u) kept[slot + k * threads] = packs[k];
                   }
                   if constexpr (CL) {
                     add_group(packs, mask, count, mean, m2);
                   } else {
                     add_group(packs, mask, states[0]);
                   }
                 });
  if constexpr (CL) {
#pragma unroll
    for (int j = 0; j < Lanes; ++j) states[j] = {count, mean[j], m2[j]};
  }
}

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

template <class A>
__device__ __forceinline__ A reciprocal_std(A var, double eps) {
  return A(1) / sqrt(var + static_cast<A>(eps));
}

template <class T, int V, bool CL>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_stats(const Forward p, const Plan plan, acc_t<T>* workspace) {
  using A = acc_t<T>;
  constexpr int Lanes = CL ? V : 1;
  ADVDL_DYNAMIC_SHARED(memory);
  const int width = plan.columns * Lanes;
  Shared<Welford<A>, A> shared(memory, width);
  int64_t tile, split;
  tile_and_split(plan, tile, split);
  Welford<A> states[Lanes] = {};
  accumulate_statistics<T, V, CL>(p, plan, tile, split, static_cast<Pack<T, V>*>(nullptr), states);
  block_reduce(states, plan.columns, shared.scratch, shared.result);
  store_partials(plan, tile, split, width, shared.result, workspace);
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

// Simple: identity or relu, decided by a flag at run time; otherwise the switch over all activations.
template <bool Simple, class A>
__device__ __forceinline__ A apply_activation(Activation act, A z, A param) {
  if constexpr (Simple) return act == Activation::relu ? activate(Activation::relu, z, param) : z;
  return activate(act, z, param);
}

template <bool Simple, class A>
__device__ __forceinline__ A apply_activation_grad(Activation act, A z, A param) {
  if constexpr (Simple)
    return act == Activation::relu ? activate_grad(Activation::relu, z, param) : A(1);
  return activate_grad(act, z, param);
}

template <class T, int V, bool CL, bool Simple, class A>
__device__ __forceinline__ void apply_forward(const Forward& p, const Plan& plan, int64_t tile,
                                              int64_t split, const Pack<T, V>* kept,
                                              const A* constants) {
  constexpr int Lanes = CL ? V : 1, U = apply_unroll<T, V, CL, Simple>();
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const A param = static_cast<A>(p.act_param);
  const int threads = static_cast<int>(blockDim.x);
  A mean[Lanes], scale[Lanes], bias[Lanes];
  load_constant(constants, 0, plan.columns, mean);
  load_constant(constants, 1, plan.columns, scale);
  load_constant(constants, 2, plan.columns, bias);
  walk<V, CL, U>(
      plan, tile, split, [&](const int64_t (&at)[U], const unsigned (&mask)[U], int64_t slot) {
        Pack<T, V> packs[U], added[U];
        if (residual != nullptr) {
#pragma unroll
          for (int k = 0; k < U; ++k)
            added[k] = load_pack<T, V, CL>(residual, at[k], mask[k], plan.size);
        }
#pragma unroll
        for (int k = 0; k < U; ++k) {
          if (kept == nullptr) {
            packs[k] = load_pack<T, V, CL>(x, at[k], mask[k], plan.size);
          } else if (mask[k] != 0u) {
            packs[k] = kept[slot + k * threads];
          }
        }
#pragma unroll
        for (int k = 0; k < U; ++k) {
          A y[V];
#pragma unroll
          for (int j = 0; j < V; ++j) {
            constexpr auto lane = [](int index) { return CL ? index : 0; };
            A z = (to_acc(packs[k].v[j]) - mean[lane(j)]) * scale[lane(j)] + bias[lane(j)];
            if (residual != nullptr) z += to_acc(added[k].v[j]);
            y[j] = apply_activation<Simple>(p.act, z, param);
          }
          store_pack<CL>(out, at[k], mask[k], make_pack<T, V>(y));
        }
      });
}

template <class T, int V, bool CL, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_act_apply(const Forward p, const Plan plan, Statistics from,
                         const acc_t<T>* workspace) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const int width = plan.columns * (CL ? V : 1);
  Shared<Welford<A>, A> shared(memory, width, !CL);
  int64_t tile, split;
  tile_and_split(plan, tile, split);
  if constexpr (!CL) {
    if (from == Statistics::partials)
      merge_partials(workspace, plan.splits, plan.channels, tile, 1, shared.scratch, shared.result);
  }
  forward_constants(p, plan, from, tile, split == 0, width, shared.result, shared.constants);
  apply_forward<T, V, CL, Simple>(p, plan, tile, split, static_cast<const Pack<T, V>*>(nullptr),
                                  shared.constants);
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
  const int64_t tile = blockIdx.x;
  Welford<A> states[Lanes] = {};
  accumulate_statistics<T, V, CL>(p, plan, tile, 0, slab, states);
  block_reduce(states, plan.columns, shared.scratch, shared.result);
  forward_constants(p, plan, Statistics::reduced, tile, true, width, shared.result,
                    shared.constants);
  apply_forward<T, V, CL, Simple>(p, plan, tile, 0, slab, shared.constants);
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

// Constants 3 and 4 of dx = (dz - [3] - (x - mean) * [4]) * scale, from the channel's sums of dz and
// dz * (x - mean); with `write` the parameters' gradients. Ends with a barrier.
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
      const A inverse = A(1) / static_cast<A>(plan.count);
      constants[3 * width + i] = dbias * inverse;
      constants[4 * width + i] = rstd * (dweight * inverse);
    }
  }
  __syncthreads();
}

// The packs of one group that dz is made of. dz itself is read where an earlier pass wrote it (`ready`).
template <class T, int V, int U>
struct Inputs {
  Pack<T, V> x[U], dout[U], saved[U];
};

template <bool Simple, bool CL, class T, int V, int U, class A, int Lanes>
__device__ __forceinline__ A gradient(const Backward& p, const Inputs<T, V, U>& in, int k, int j,
                                      bool ready, const A (&mean)[Lanes], const A (&scale)[Lanes],
                                      const A (&bias)[Lanes], A param) {
  const A dout = to_acc(in.dout[k].v[j]);
  if (ready) return dout;
  const int lane = CL ? j : 0;
  A z;
  if (p.z_source == ZSource::output) {
    z = to_acc(in.saved[k].v[j]);
  } else {
    z = (to_acc(in.x[k].v[j]) - mean[lane]) * scale[lane] + bias[lane];
    if (p.z_source == ZSource::residual) z += to_acc(in.saved[k].v[j]);
  }
  return dout * apply_activation_grad<Simple>(p.act, z, param);
}

// One pass: the sums of dz and dz * (x - mean); dresidual and, in eval mode, dx on the way.
template <class T, int V, bool CL, bool Simple, class A, int Lanes>
__device__ __forceinline__ void accumulate_gradients(const Backward& p, const Plan& plan,
                                                     int64_t tile, int64_t split,
                                                     const A* constants, Pack<T, V>* kept_x,
                                                     Pack<T, V>* kept_dz,
                                                     SumPair<A> (&sums)[Lanes]) {
  constexpr int U = backward_unroll<T, V, Simple>();
  const T *x = static_cast<const T*>(p.x), *dout = static_cast<const T*>(p.dout);
  const T* saved = p.z_source == ZSource::input ? nullptr : static_cast<const T*>(p.saved);
  T* dresidual = static_cast<T*>(p.dresidual);
  T* dx = p.training ? nullptr : static_cast<T*>(p.dx);
  const A param = static_cast<A>(p.act_param);
  const int threads = static_cast<int>(blockDim.x);
  A mean[Lanes], scale[Lanes], bias[Lanes];
  load_constant(constants, 0, plan.columns, mean);
  load_constant(constants, 1, plan.columns, scale);
  load_constant(constants, 2, plan.columns, bias);
  walk<V, CL, U>(
      plan, tile, split, [&](const int64_t (&at)[U], const unsigned (&mask)[U], int64_t slot) {
        Inputs<T, V, U> in;
#pragma unroll
        for (int k = 0; k < U; ++k) {
          in.dout[k] = load_pack<T, V, CL>(dout, at[k], mask[k], plan.size);
          in.x[k] = load_pack<T, V, CL>(x, at[k], mask[k], plan.size);
        }
        if (saved != nullptr) {
#pragma unroll
          for (int k = 0; k < U; ++k)
            in.saved[k] = load_pack<T, V, CL>(saved, at[k], mask[k], plan.size);
        }
#pragma unroll
        for (int k = 0; k < U; ++k) {
          A dz[V];
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const int lane = CL ? j : 0;
            dz[j] = gradient<Simple, CL>(p, in, k, j, false, mean, scale, bias, param);
            const bool wanted = CL ? mask[k] != 0u : (mask[k] >> j & 1u) != 0u;
            const A product = dz[j] * (to_acc(in.x[k].v[j]) - mean[lane]);
            sums[lane].merge({wanted ? dz[j] : A(0), wanted ? product : A(0)});
          }
          if (dresidual == nullptr && kept_dz == nullptr && kept_x == nullptr && dx == nullptr)
            continue;
          const Pack<T, V> rounded = make_pack<T, V>(dz);
          if (dresidual != nullptr) store_pack<CL>(dresidual, at[k], mask[k], rounded);
          if (mask[k] != 0u) {
            if (kept_dz != nullptr) kept_dz[slot + k * threads] = rounded;
            if (kept_x != nullptr) kept_x[slot + k * threads] = in.x[k];
          }
          if (dx != nullptr) {
#pragma unroll
            for (int j = 0; j < V; ++j) dz[j] *= scale[CL ? j : 0];
            store_pack<CL>(dx, at[k], mask[k], make_pack<T, V>(dz));
          }
        }
      });
}

// dx from the merged sums. dz is read from `kept_dz` or dresidual, or computed again.
template <class T, int V, bool CL, bool Simple, class A>
__device__ __forceinline__ void apply_backward(const Backward& p, const Plan& plan, int64_t tile,
                                               int64_t split, const A* constants,
                                               const Pack<T, V>* kept_x,
                                               const Pack<T, V>* kept_dz) {
  constexpr int Lanes = CL ? V : 1, U = backward_unroll<T, V, Simple>();
  const bool ready = plan.reads_dz && (kept_dz != nullptr || p.dresidual != nullptr);
  const T* x = static_cast<const T*>(p.x);
  const T* dout = static_cast<const T*>(ready && p.dresidual != nullptr ? p.dresidual : p.dout);
  const T* saved = ready || p.z_source == ZSource::input ? nullptr : static_cast<const T*>(p.saved);
  T* dx = static_cast<T*>(p.dx);
  const A param = static_cast<A>(p.act_param);
  const int threads = static_cast<int>(blockDim.x);
  A mean[Lanes], scale[Lanes], bias[Lanes], shift[Lanes], slope[Lanes];
  load_constant(constants, 0, plan.columns, mean);
  load_constant(constants, 1, plan.columns, scale);
  load_constant(constants, 2, plan.columns, bias);
  load_constant(constants, 3, plan.columns, shift);
  load_constant(constants, 4, plan.columns, slope);
  walk<V, CL, U>(
      plan, tile, split, [&](const int64_t (&at)[U], const unsigned (&mask)[U], int64_t slot) {
        Inputs<T, V, U> in;
#pragma unroll
        for (int k = 0; k < U; ++k) {
          if (kept_dz == nullptr) {
            in.dout[k] = load_pack<T, V, CL>(dout, at[k], mask[k], plan.size);
          } else if (mask[k] != 0u) {
            in.dout[k] = kept_dz[slot + k * threads];
          }
          if (kept_x == nullptr) {
            in.x[k] = load_pack<T, V, CL>(x, at[k], mask[k], plan.size);
          } else if (mask[k] != 0u) {
            in.x[k] = kept_x[slot + k * threads];
          }
        }
        if (saved != nullptr) {
#pragma unroll
          for (int k = 0; k < U; ++k)
            in.saved[k] = load_pack<T, V, CL>(saved, at[k], mask[k], plan.size);
        }
#pragma unroll
        for (int k = 0; k < U; ++k) {
          A result[V];
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const int lane = CL ? j : 0;
            const A dz = gradient<Simple, CL>(p, in, k, j, ready, mean, scale, bias, param);
            const A centred = to_acc(in.x[k].v[j]) - mean[lane];
            result[j] = (dz - shift[lane] - centred * slope[lane]) * scale[lane];
          }
          store_pack<CL>(dx, at[k], mask[k], make_pack<T, V>(result));
        }
      });
}

template <class T, int V, bool CL, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_act_backward_reduce(const Backward p, const Plan plan, acc_t<T>* workspace) {
  using A = acc_t<T>;
  constexpr int Lanes = CL ? V : 1;
  ADVDL_DYNAMIC_SHARED(memory);
  const int width = plan.columns * Lanes;
  Shared<SumPair<A>, A> shared(memory, width);
  int64_t tile, split;
  tile_and_split(plan, tile, split);
  backward_constants(p, plan, tile, width, shared.constants);
  SumPair<A> sums[Lanes] = {};
  accumulate_gradients<T, V, CL, Simple>(p, plan, tile, split, shared.constants,
                                         static_cast<Pack<T, V>*>(nullptr),
                                         static_cast<Pack<T, V>*>(nullptr), sums);
  block_reduce(sums, plan.columns, shared.scratch, shared.result);
  store_partials(plan, tile, split, width, shared.result, workspace);
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
  int64_t tile, split;
  tile_and_split(plan, tile, split);
  backward_constants(p, plan, tile, width, shared.constants);
  if constexpr (!CL)
    merge_partials(workspace, plan.splits, plan.channels, tile, 1, shared.scratch, shared.result);
  gradient_constants(p, plan, tile, split == 0, width, CL ? nullptr : shared.result,
                     shared.constants);
  apply_backward<T, V, CL, Simple>(p, plan, tile, split, shared.constants,
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
  const int64_t tile = blockIdx.x;
  backward_constants(p, plan, tile, width, shared.constants);
  SumPair<A> sums[Lanes] = {};
  accumulate_gradients<T, V, CL, Simple>(p, plan, tile, 0, shared.constants, kept_x, kept_dz, sums);
  block_reduce(sums, plan.columns, shared.scratch, shared.result);
  gradient_constants(p, plan, tile, true, width, shared.result, shared.constants);
  apply_backward<T, V, CL, Simple>(p, plan, tile, 0, shared.constants, kept_x, kept_dz);
}

// ---- host ----

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t power_of_two_above(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

bool channels_last(const BatchNormActShape& s) { return s.layout == Layout::channels_last; }

int element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Whether a row of [N, C, S] is long enough for packs of V: aligned, or with few of them cut.
bool row_takes_packs(int64_t s, int v) { return s % v == 0 || s >= 2 * v; }

int64_t packs_per_row(int64_t s, int v) { return s % v == 0 ? s / v : (s + v - 2) / v + 1; }

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
  const int bytes = element_bytes(s.dtype), v = s.dtype == DType::f64 ? 1 : kVectorBytes / bytes;
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

// Tensors of x's size that a path reads and writes in its first pass over them or its only one, and that it reads again.
struct Traffic {
  int64_t once, again;
};

// How long a path takes, in bytes at the copy rate: `pass` for each tensor of `tensor` bytes, half for what L2 still has.
int64_t time_of(Traffic traffic, int64_t pass, int64_t tensor) {
  return (traffic.once + traffic.again) * pass - std::min(traffic.again * tensor, kCachedBytes) / 2;
}

// Fused, a multiprocessor works on one tile at a time and those without a tile are idle; over splits there is work for
// all, but more of it and in more launches. A multiprocessor moves its share of the copy rate, busy neighbours or not.
bool fused_is_faster(const BatchNormActShape& s, Traffic fused, Traffic split) {
  const int64_t channel = s.n * s.s * element_bytes(s.dtype), tensor = channel * s.c;
  const int64_t tile_channels = tile_channels_of(s, true);
  const int64_t rounds = divide_up(divide_up(s.c, tile_channels), kMultiprocessors);
  const int64_t fused_pass = rounds * kMultiprocessors * tile_channels * channel;
  const int64_t blocks = divide_up(s.c, tile_channels_of(s, false)) * splits_of(s);
  const int64_t split_pass = tensor * std::max(blocks, kMultiprocessors) / blocks;
  const int64_t more_launches = channels_last(s) ? 2 : 1;
  return time_of(fused, fused_pass, tensor) <=
         time_of(split, split_pass, tensor) + more_launches * kLaunchBytes;
}

bool is_empty(const BatchNormActShape& s) { return s.n == 0 || s.s == 0; }

Plan make_plan(const BatchNormActShape& s, int v, bool fused, int unroll) {
  Plan plan;
  const bool last = channels_last(s);
  plan.rows = last ? s.n * s.s : s.n;
  plan.channels = s.c;
  plan.row = last ? 1 : s.s;
  plan.count = s.n * s.s;
  plan.size = plan.count * s.c;
  if (last) {
    const int64_t packs = divide_up(s.c, v);
    const int64_t most = fused ? kFusedTileBytes / (v * element_bytes(s.dtype)) : kMaxColumns;
    plan.columns = static_cast<int>(std::min<int64_t>(power_of_two_above(packs), most));
    plan.tiles = divide_up(packs, plan.columns);
    plan.positions = plan.rows;
  } else {
    plan.packs = std::max<int64_t>(1, packs_per_row(s.s, v));
    plan.whole_packs = s.s % v == 0;
    plan.tiles = s.c;
    plan.positions = s.s == 0 ? 0 : plan.rows * plan.packs;
  }
  if (fused) {
    plan.threads = 128;
    while (plan.threads < kFusedThreads &&
           plan.positions * plan.columns > static_cast<int64_t>(plan.threads) * unroll * 2)
      plan.threads *= 2;
  } else {
    plan.splits = splits_of(s);
  }
  plan.per_split = divide_up(plan.positions, plan.splits);
  return plan;
}

// Calls body<T, V, CL, Simple>(). Packs of 16 bytes have kernels of their own for identity and relu; single
// elements and fp64 use the general ones.
template <class T, bool CL, class Body>
void with_pack(bool vectors, bool simple, Body body) {
  constexpr int V = kVectorBytes / sizeof(T);
  if constexpr (sizeof(T) <= 4) {
    if (vectors && simple) return body.template operator()<T, V, CL, true>();
    if (vectors) return body.template operator()<T, V, CL, false>();
  }
  body.template operator()<T, 1, CL, false>();
}

template <class Body>
void dispatch(const BatchNormActShape& s, Activation act, bool aligned, Body body) {
  const bool last = channels_last(s);
  const int v = kVectorBytes / element_bytes(s.dtype);
  const bool vectors = aligned && (last ? s.c % v == 0 : row_takes_packs(s.s, v));
  const bool simple = act == Activation::identity || act == Activation::relu;
  auto typed = [&]<class T>() {
    last ? with_pack<T, true>(vectors, simple, body) : with_pack<T, false>(vectors, simple, body);
  };
  switch (s.dtype) {
    case DType::f64:
      return typed.template operator()<double>();
    case DType::f16:
      return typed.template operator()<__half>();
    case DType::bf16:
      return typed.template operator()<__nv_bfloat16>();
    default:
      return typed.template operator()<float>();
  }
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
  block.threads = 128;
  while (block.threads < kFinalizeThreads && plan.splits * kFinalizeColumns > 4 * block.threads)
    block.threads *= 2;
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

// Whether dz as stored is dz itself. Rounded to half precision it is not, but for relu and identity, where it is dout
// or 0; dx must be made of the same dz as the sums.
bool stored_dz_is_exact(const Backward& p) {
  return element_bytes(p.shape.dtype) >= 4 || p.act == Activation::identity ||
         p.act == Activation::relu;
}

// Slabs that the fused backward keeps in shared memory: x and dz, x alone, or 0 where it is not used.
int fused_slabs(const Backward& p) {
  if (!has_second_pass(p)) return 0;
  const bool exact = stored_dz_is_exact(p), saved = p.z_source != ZSource::input;
  const int slabs = slabs_that_fit(p.shape, exact ? 2 : 1);
  // dout, x, saved; dx, dresidual. Then x and either dz or what it is made of.
  const int64_t once = 3 + saved + (p.dresidual != nullptr);
  const int64_t again = 2 + (saved && !(exact && p.dresidual != nullptr));
  const int64_t fused_again = slabs > 1 ? 0 : again - 1;
  return slabs > 0 && fused_is_faster(p.shape, {once, fused_again}, {once, again}) ? slabs : 0;
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
        Plan plan = make_plan(p.shape, V, slabs > 0, backward_unroll<T, V, Simple>());
        plan.reads_dz = stored_dz_is_exact(p);
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
