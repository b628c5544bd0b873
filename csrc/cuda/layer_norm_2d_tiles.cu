// Layer norm 2d on CUDA over tiles: a block owns `columns` neighbouring packs of positions with all their channels.
// What it read stays in shared memory if it fits, else it is read again. A row of channels that is too long for a team
// is a tile of one position. Algorithms, bytes and launches: docs/kernels.md.
#include "layer_norm_2d_plan.h"

namespace advdl_ops::cuda {
namespace {

constexpr int kTilePack = 4;       // elements, so that 14x14 in half precision uses packs too
constexpr int kTileThreads = 512;  // at most; half of it if several tiles share a multiprocessor
// A tile reads at least a sector of each channel. It is wider as long as its slab has at most kTileBytes.
constexpr int64_t kSectorBytes = 32;
constexpr int64_t kTileBytes = 64 * 1024;

template <class T, int V, bool Simple>
ADVDL_HOST_DEVICE constexpr int backward_unroll() {
  return V == 1 || (Simple && sizeof(T) == 2) ? 4 : 2;
}

// ---- shared memory ----

template <class T, int V>
struct ForwardShared {
  SharedArena arena;
  Pack<T, V>* x;
  Reduction<Moments<acc_t<T>>> reduction;

  ADVDL_HOST_DEVICE ForwardShared(unsigned char* memory, const PositionPlan& plan)
      : arena(memory),
        x(arena.take<Pack<T, V>>(plan.keeps ? int64_t{plan.channels} * plan.columns : 0)),
        reduction(arena, plan.threads, plan.columns, V) {}
};

// The type in which dz is stored between the two walks over a tile. It must be exact, because dx and the sums must use
// the same dz. With identity and relu, dz is dout or 0, so T is exact.
template <class T, bool Simple>
struct KeptGradient {
  using type = acc_t<T>;
};
template <class T>
struct KeptGradient<T, true> {
  using type = T;
};

template <class T, int V, bool Simple>
struct BackwardShared {
  using A = acc_t<T>;
  using D = typename KeptGradient<T, Simple>::type;
  SharedArena arena;
  Pack<D, V>* dz;
  Pack<T, V>* x;
  Reduction<GradientSums<A>> reduction;
  A* sums;  // [2, channels]

  ADVDL_HOST_DEVICE BackwardShared(unsigned char* memory, const PositionPlan& plan)
      : arena(memory),
        dz(arena.take<Pack<D, V>>(plan.keeps ? int64_t{plan.channels} * plan.columns : 0)),
        x(arena.take<Pack<T, V>>(plan.keeps ? int64_t{plan.channels} * plan.columns : 0)),
        reduction(arena, plan.threads, plan.columns, V),
        sums(arena.take<A>(plan.shared_sums ? 2 * int64_t{plan.channels} : 0)) {}
};

// A thread's place in a tile. It takes the channels worker, worker + workers, ... of its column.
template <int V>
struct TilePlace {
  int64_t start, position;  // element of channel 0 and position, of lane 0
  int column, worker, workers;
  bool inside;  // the column exists

  __device__ TilePlace(const PositionPlan& plan, int64_t tile) {
    const int thread = static_cast<int>(threadIdx.x);
    column = thread % plan.columns;
    worker = thread / plan.columns;
    workers = static_cast<int>(blockDim.x) / plan.columns;
    const int64_t pack = tile * plan.columns + column;
    position = pack * V;
    inside = position < plan.positions;
    start = pack / plan.packs * plan.row * plan.channels + pack % plan.packs * V;
  }
};

// Calls body(channel, at, slot, wanted) for groups of U channels: their numbers, their element offsets, their places in
// the slab, and whether they exist. Every thread of the block makes the same number of calls.
template <int U, int V, class Body>
__device__ __forceinline__ void for_tile_channels(const PositionPlan& plan,
                                                  const TilePlace<V>& place, Body body) {
#pragma unroll 1
  for (int first = 0; first < plan.channels; first += U * place.workers) {
    int64_t at[U];
    int channel[U], slot[U];
    bool wanted[U];
#pragma unroll
    for (int k = 0; k < U; ++k) {
      channel[k] = first + place.worker + k * place.workers;
      at[k] = place.start + channel[k] * plan.row;
      slot[k] = channel[k] * plan.columns + place.column;
      wanted[k] = place.inside && channel[k] < plan.channels;
    }
    body(channel, at, slot, wanted);
  }
}

// Adds a group of packs to the moments of x - pivot, with one position for each lane. Because of the pivot, the
// rounding error is relative to the deviations and not to the mean. The group's own mean and squared deviations come
// first, then one Chan merge.
template <class T, int V, int U, class A>
__device__ __forceinline__ void add_group(const Pack<T, V> (&x)[U], const bool (&wanted)[U],
                                          const Pack<T, V>& pivot, Moments<A> (&states)[V]) {
  int group = 0;
#pragma unroll
  for (int k = 0; k < U; ++k) group += wanted[k];
  if (group == 0) return;
  const A added = A(group), total = states[0].count + added;
  const A inverse = A(1) / added, share = added / total, weight = states[0].count * share;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    A centred[U], sum = A(0), deviations = A(0);
#pragma unroll
    for (int k = 0; k < U; ++k) {
      centred[k] = to_acc(x[k].v[j]) - to_acc(pivot.v[j]);
      sum += wanted[k] ? centred[k] : A(0);
    }
    const A mean = sum * inverse;
#pragma unroll
    for (int k = 0; k < U; ++k) {
      const A d = wanted[k] ? centred[k] - mean : A(0);
      deviations += d * d;
    }
    const A delta = mean - states[j].mean;
    states[j].m2 += deviations + delta * weight * delta;
    states[j].mean += delta * share;
    states[j].count = total;
  }
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kTileThreads, 1)
    layer_norm_2d_forward_tiles(const GroupNormForward p, const PositionPlan plan) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const ForwardShared<T, V> shared(memory, plan);
  Pack<T, V>* const kept = shared.x;
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  const DType weights = p.shape.weight_dtype;
  const A param = static_cast<A>(p.act_param);
  const TilePlace<V> place(plan, blockIdx.x);
  const auto pivot = load_whole<T, V>(x, place.start, place.inside);
  Moments<A> states[V] = {};
  constexpr int U = 4;
  for_tile_channels<U>(
      plan, place,
      [&](const int (&)[U], const int64_t (&at)[U], const int (&slot)[U], const bool (&wanted)[U]) {
        Pack<T, V> packs[U];
#pragma unroll
        for (int k = 0; k < U; ++k) packs[k] = load_whole<T, V>(x, at[k], wanted[k]);
        if (plan.keeps) {
#pragma unroll
          for (int k = 0; k < U; ++k)
            if (wanted[k]) kept[slot[k]] = packs[k];
        }
        add_group(packs, wanted, pivot, states);
      });
  block_reduce(states, plan.columns, shared.reduction.scratch, shared.reduction.result);
  A mean[V], rstd[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const Moments<A> state = shared.reduction.result[place.column * V + j];
    const A var = state.m2 / static_cast<A>(plan.channels);
    mean[j] = to_acc(pivot.v[j]) + state.mean;
    rstd[j] = reciprocal_std(var, p.eps);
    if (place.worker == 0 && place.inside) {
      static_cast<A*>(p.mean)[place.position + j] = mean[j];
      static_cast<A*>(p.var)[place.position + j] = var;
    }
  }
  constexpr int W = forward_unroll<V, Simple>();
  for_tile_channels<W>(plan, place,
                       [&](const int (&channel)[W], const int64_t (&at)[W], const int (&slot)[W],
                           const bool (&wanted)[W]) {
                         Pack<T, V> packs[W], added[W];
                         A weight[W], bias[W], y[W * V];
                         load_params(p.weight, weights, plan.channels, channel, A(1), weight);
                         load_params(p.bias, weights, plan.channels, channel, A(0), bias);
#pragma unroll
                         for (int k = 0; k < W; ++k) {
                           if (residual != nullptr)
                             added[k] = load_whole<T, V>(residual, at[k], wanted[k]);
                           if (!plan.keeps)
                             packs[k] = load_whole<T, V>(x, at[k], wanted[k]);
                           else if (wanted[k])
                             packs[k] = kept[slot[k]];
                         }
#pragma unroll
                         for (int k = 0; k < W; ++k)
#pragma unroll
                           for (int j = 0; j < V; ++j) {
                             A z =
                                 (to_acc(packs[k].v[j]) - mean[j]) * rstd[j] * weight[k] + bias[k];
                             if (residual != nullptr) z += to_acc(added[k].v[j]);
                             y[k * V + j] = z;
                           }
                         activate_values<Simple>(p.act, param, y);
#pragma unroll
                         for (int k = 0; k < W; ++k)
                           if (wanted[k]) store_values<T, V>(static_cast<T*>(p.out), at[k], y, k);
                       });
}

// The block's sums for dbias and dweight, in shared memory or in its row of the workspace. For each channel the same
// thread adds to them in all tiles: worker channel % workers of column 0.
template <class A>
struct ChannelSums {
  A *dbias, *dweight;

  // Adds a channel's dz and dz * xhat of all columns. All threads of a warp must call it.
  __device__ void add(const PositionPlan& plan, int channel, GradientSums<A> terms) const {
#pragma unroll 1
    for (int offset = plan.columns / 2; offset >= 1; offset /= 2)
      terms.merge(shuffle_xor(terms, offset));
    if (static_cast<int>(threadIdx.x) % plan.columns != 0 || channel >= plan.channels) return;
    dbias[channel] += terms.dz;
    dweight[channel] += terms.dz_x;
  }
  // Calls body(channel) for the channels to which this thread adds.
  template <class Body>
  __device__ void for_own(const PositionPlan& plan, Body body) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread % plan.columns != 0) return;
#pragma unroll 1
    for (int channel = thread / plan.columns; channel < plan.channels;
         channel += static_cast<int>(blockDim.x) / plan.columns)
      body(channel);
  }
};

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kTileThreads, 1)
    layer_norm_2d_backward_tiles(const GroupNormBackward p, const PositionPlan plan,
                                 acc_t<T>* workspace) {
  using A = acc_t<T>;
  using D = typename KeptGradient<T, Simple>::type;
  constexpr int U = backward_unroll<T, V, Simple>();
  ADVDL_DYNAMIC_SHARED(memory);
  const BackwardShared<T, V, Simple> shared(memory, plan);
  Pack<D, V>* const kept_dz = shared.dz;
  Pack<T, V>* const kept_x = shared.x;
  A* global_sums = workspace + int64_t{blockIdx.x} * plan.channels;
  const ChannelSums<A> channel_sums =
      plan.shared_sums
          ? ChannelSums<A>{shared.sums, shared.sums + plan.channels}
          : ChannelSums<A>{global_sums, global_sums + int64_t{gridDim.x} * plan.channels};
  const DType weights = p.shape.weight_dtype;
  const A param = static_cast<A>(p.act_param), count = static_cast<A>(plan.channels);
  if (p.dweight != nullptr) {
    channel_sums.for_own(plan, [&](int channel) {
      channel_sums.dbias[channel] = A(0);
      channel_sums.dweight[channel] = A(0);
    });
  }
#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const TilePlace<V> place(plan, tile);
    A mean[V], rstd[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      mean[j] = place.inside ? static_cast<const A*>(p.mean)[place.position + j] : A(0);
      rstd[j] = place.inside ? static_cast<const A*>(p.var)[place.position + j] : A(1);
      rstd[j] = reciprocal_std(rstd[j], p.eps);
    }
    const auto centred = [&](const Pack<T, V>& x, int j) {
      return (to_acc(x.v[j]) - mean[j]) * rstd[j];
    };
    GradientSums<A> sums[V] = {};  // in the second walk, their means over the channels
    // Two walks: the first for the sums, the second for dx. The second uses what the first one kept, or reads and
    // computes it again.
#pragma unroll 1
    for (int walk = 0; walk < 2; ++walk) {
      const bool second = walk == 1;
      if (second) {
        if (p.dx == nullptr) break;
        block_reduce(sums, plan.columns, shared.reduction.scratch, shared.reduction.result);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const GradientSums<A> sum = shared.reduction.result[place.column * V + j];
          sums[j] = {sum.dz / count, sum.dz_x / count};
        }
      }
      for_tile_channels<U>(
          plan, place,
          [&](const int (&channel)[U], const int64_t (&at)[U], const int (&slot)[U],
              const bool (&wanted)[U]) {
            PositionInputs<T, V, U> in;
            A weight[U], dz[U * V];
            load_params(p.weight, weights, plan.channels, channel, A(1), weight);
            if (second && plan.keeps) {
#pragma unroll
              for (int k = 0; k < U; ++k) {
                if (!wanted[k]) continue;
                in.x[k] = kept_x[slot[k]];
                const Pack<D, V> pack = kept_dz[slot[k]];
#pragma unroll
                for (int j = 0; j < V; ++j) dz[k * V + j] = to_acc(pack.v[j]);
              }
            } else {
              A bias[U];
              load_params(p.bias, weights, plan.channels, channel, A(0), bias);
#pragma unroll
              for (int k = 0; k < U; ++k) in.load(p, k, at[k], wanted[k]);
#pragma unroll
              for (int k = 0; k < U; ++k)
#pragma unroll
                for (int j = 0; j < V; ++j)
                  dz[k * V + j] = in.z(p, k, j, centred(in.x[k], j) * weight[k] + bias[k]);
              activate_grad_values<Simple>(p.act, param, dz);
#pragma unroll
              for (int k = 0; k < U; ++k)
#pragma unroll
                for (int j = 0; j < V; ++j) dz[k * V + j] *= to_acc(in.dout[k].v[j]);
            }
#pragma unroll
            for (int k = 0; k < U; ++k) {
              if (second) {
                if (!wanted[k]) continue;
#pragma unroll
                for (int j = 0; j < V; ++j) {
                  A& value = dz[k * V + j];
                  const A projection = sums[j].dz + centred(in.x[k], j) * sums[j].dz_x;
                  value = rstd[j] * (weight[k] * value - projection);
                }
                store_values<T, V>(static_cast<T*>(p.dx), at[k], dz, k);
                continue;
              }
              GradientSums<A> terms;
#pragma unroll
              for (int j = 0; j < V; ++j) {
                const A value = dz[k * V + j], product = value * centred(in.x[k], j);
                if (!wanted[k]) continue;
                terms.merge({value, product});
                sums[j].merge({weight[k] * value, weight[k] * product});
              }
              if (p.dweight != nullptr) channel_sums.add(plan, channel[k], terms);
              if (!wanted[k]) continue;
              if (p.dresidual != nullptr)
                store_values<T, V>(static_cast<T*>(p.dresidual), at[k], dz, k);
              if (plan.keeps) {
                kept_x[slot[k]] = in.x[k];
                kept_dz[slot[k]] = values_pack<D, V>(dz, k);
              }
            }
          });
    }
  }
  if (p.dweight != nullptr && plan.shared_sums) {
    channel_sums.for_own(plan, [&](int channel) {
      store_partial(workspace, gridDim.x, plan.channels, blockIdx.x, channel,
                    GradientSums<A>{channel_sums.dbias[channel], channel_sums.dweight[channel]});
    });
  }
}

// ---- host ----

// Neighbouring packs of positions in a tile: as many as fit into kTileBytes, or fewer if multiprocessors would be idle.
int tile_columns(const PositionPlan& plan, int v, int64_t element, int64_t kept) {
  const int64_t packs = plan.positions / v;
  const int64_t least = std::max<int64_t>(1, kSectorBytes / (v * element));
  int64_t columns = 32;
  while (columns > least && (columns * plan.channels * kept > kTileBytes ||
                             divide_up(packs, columns) < 2 * kMultiprocessors))
    columns /= 2;
  return static_cast<int>(columns);
}

// `kept`: bytes that a block keeps in shared memory for each channel of a column, if they fit; 0: nothing to keep.
PositionPlan tiles_plan(const GroupNormShape& s, int v, int64_t kept) {
  PositionPlan plan = base_plan(s);
  if (!channels_side_by_side(s)) {
    plan.row = s.s;
    plan.packs = s.s / v;
    plan.columns = tile_columns(plan, v, element_bytes(s.dtype), kept);
  }
  plan.tiles = divide_up(plan.positions / v, plan.columns);
  plan.blocks = plan.tiles;
  const int64_t most = s.c * plan.columns * kept > kTileBytes ? kTileThreads : kTileThreads / 2;
  plan.threads =
      static_cast<int>(std::clamp<int64_t>(power_of_two_above(s.c) * plan.columns, kWarp, most));
  return plan;
}

// Sets a flag of the plan if wanted and if the shared memory then still suffices. Returns the bytes of shared memory.
template <class Shared>
int64_t set_where_it_fits(PositionPlan& plan, bool PositionPlan::* flag, bool wanted) {
  plan.*flag = wanted;
  const int64_t bytes = Shared(nullptr, plan).arena.bytes;
  if (!wanted || bytes <= static_cast<int64_t>(shared_memory_limit())) return bytes;
  plan.*flag = false;
  return Shared(nullptr, plan).arena.bytes;
}

LaunchConfig tiles_config(const PositionPlan& plan, int64_t shared, void* stream) {
  return {plan.blocks, plan.threads, static_cast<size_t>(shared), stream};
}

// Calls body<T, V, Simple>().
template <class Body>
void dispatch_tiles(const GroupNormShape& s, Activation act, bool aligned, Body body) {
  const bool vectors = aligned && !channels_side_by_side(s) && s.s % kTilePack == 0;
  dispatch_packs<false>(s.dtype, vectors, act, [&]<class T, int V, bool, bool Simple>() {
    body.template operator()<T, V == 1 ? 1 : kTilePack, Simple>();
  });
}

}  // namespace

void layer_norm_2d_tiles(const GroupNormForward& p, bool aligned, void* stream) {
  dispatch_tiles(p.shape, p.act, aligned, [&]<class T, int V, bool Simple>() {
    PositionPlan plan = tiles_plan(p.shape, V, sizeof(Pack<T, V>));
    const int64_t shared = set_where_it_fits<ForwardShared<T, V>>(plan, &PositionPlan::keeps, true);
    launch("layer_norm_2d_forward_tiles", &layer_norm_2d_forward_tiles<T, V, Simple>,
           tiles_config(plan, shared, stream), p, plan);
  });
}

int64_t layer_norm_2d_tiles_backward(const GroupNormBackward& p, bool aligned, void* partials,
                                     void* stream) {
  int64_t blocks = 0;
  dispatch_tiles(p.shape, p.act, aligned, [&]<class T, int V, bool Simple>() {
    using Shared = BackwardShared<T, V, Simple>;
    const bool twice = p.dx != nullptr;  // two walks over a tile
    constexpr int64_t kept = sizeof(Pack<T, V>) + sizeof(Pack<typename Shared::D, V>);
    PositionPlan plan = tiles_plan(p.shape, V, twice ? kept : 0);
    plan.blocks = std::min(backward_blocks(p.shape), plan.tiles);
    set_where_it_fits<Shared>(plan, &PositionPlan::keeps, twice);
    const int64_t shared =
        set_where_it_fits<Shared>(plan, &PositionPlan::shared_sums, p.dweight != nullptr);
    launch("layer_norm_2d_backward_tiles", &layer_norm_2d_backward_tiles<T, V, Simple>,
           tiles_config(plan, shared, stream), p, plan, static_cast<acc_t<T>*>(partials));
    blocks = plan.blocks;
  });
  return blocks;
}

}  // namespace advdl_ops::cuda
