// y = act(layer_norm_2d(x) + residual) and its gradients on CUDA: every position is normalized over its channels.
// docs/kernels.md: algorithms, bytes, launches.
//
//   rows   channels side by side (channels_last, or S = 1), few enough for a team of threads with a pack each:
//          the row stays in registers
//   tiles  otherwise. A block owns `columns` neighbouring packs of positions with all their channels; what it read
//          stays in shared memory where that fits, else it is read again. A long row of channels_last is a tile of
//          one position
//
//   forward   rows or tiles
//   backward  rows or tiles [+ finalize_grads, where dweight and dbias are wanted]
#include <algorithm>

#include "../common/group_norm.h"
#include "launch.h"
#include "reduce.h"
#include "vec.h"

namespace advdl_ops::cuda {
namespace {

using Forward = GroupNormForward;
using Backward = GroupNormBackward;

constexpr int kMaxTeam = 512;  // threads that share a row
// Threads of a block of several teams: few, as registers decide how many blocks a multiprocessor takes.
constexpr int kRowThreads = 128;
constexpr int kTilePack = 4;       // elements: 14x14 in half precision takes packs too
constexpr int kTileThreads = 512;  // at most; half of it where several tiles share a multiprocessor
// More blocks than run at a time; beyond that forward gives each several rounds, for one load of weight and bias.
constexpr int64_t kBlocks = 8 * kMultiprocessors;
constexpr int64_t kBlockRounds = 8;
constexpr int64_t kBlockPositions = 16;  // backward: that are worth a row of sums in the workspace
// Of each channel a tile reads a sector at least; more as long as that many bytes of it are kept.
constexpr int64_t kSectorBytes = 32;
constexpr int64_t kTileBytes = 64 * 1024;

// Packs of each tensor that a thread works on at a time: what registers allow.
template <int V, bool Simple>
ADVDL_HOST_DEVICE constexpr int forward_unroll() {
  return V == 1 ? 4 : (Simple ? 16 : 8) / V;
}
template <int V>
ADVDL_HOST_DEVICE constexpr int rows_backward_unroll() {
  return V == 1 ? 4 : 8 / V;
}
template <class T, int V, bool Simple>
ADVDL_HOST_DEVICE constexpr int tiles_backward_unroll() {
  return V == 1 || (Simple && sizeof(T) == 2) ? 4 : 2;
}

struct Plan {
  int64_t positions = 0;       // N * S
  int64_t row = 1, packs = 1;  // tiles: S and its packs; 1 for a long row of channels
  int64_t rounds = 0;          // rows: groups of rows that a block takes at a time
  int64_t tiles = 0;
  int64_t blocks = 1;
  int channels = 0;
  int team = 1, columns = 1;
  int threads = kWarp;
  size_t shared = 0;
  size_t kept = 0;  // bytes of what a tile keeps of its inputs; 0: it reads them again
  bool shared_sums =
      false;  // a block's sums for dweight and dbias are there too, not in the workspace
};

// ---- arithmetic that forward and backward share ----

template <class From, int N, class A>
__device__ __forceinline__ void copy_params(const void* pointer, int count, const int (&index)[N],
                                            A (&out)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k)
    out[k] =
        static_cast<A>(to_acc(static_cast<const From*>(pointer)[index[k] < count ? index[k] : 0]));
}

// Several elements of a per-channel parameter, `otherwise` where it is null; anything for an index past its end.
template <int N, class A>
__device__ __forceinline__ void load_params(const void* pointer, DType dtype, int count,
                                            const int (&index)[N], A otherwise, A (&out)[N]) {
  if (pointer == nullptr) {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = otherwise;
    return;
  }
  switch (dtype) {
    case DType::f64:
      return copy_params<double>(pointer, count, index, out);
    case DType::f16:
      return copy_params<__half>(pointer, count, index, out);
    case DType::bf16:
      return copy_params<__nv_bfloat16>(pointer, count, index, out);
    default:
      return copy_params<float>(pointer, count, index, out);
  }
}

// values[i] = function(values[i]), with one or two copies of a function of much code: the array turns, as registers
// have no index.
template <int N, class A, class Function>
__device__ __forceinline__ void map_in_turn(A (&values)[N], Function function) {
  constexpr int Copies = N % 2 == 0 && sizeof(A) == 4 ? 2 : 1;
#pragma unroll 1
  for (int i = 0; i < N; i += Copies) {
    A done[Copies];
#pragma unroll
    for (int k = 0; k < Copies; ++k) done[k] = function(values[k]);
#pragma unroll
    for (int k = 0; k + Copies < N; ++k) values[k] = values[k + Copies];
#pragma unroll
    for (int k = 0; k < Copies; ++k) values[N - Copies + k] = done[k];
  }
}

// z becomes act(z). Simple: identity or relu, decided by a flag at run time; otherwise the switch over all.
template <bool Simple, int N, class A>
__device__ __forceinline__ void apply_activation(Activation act, A param, A (&z)[N]) {
  if constexpr (Simple) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      z[i] = act == Activation::relu ? activate(Activation::relu, z[i], param) : z[i];
  } else {
    map_in_turn(z, [&](A value) { return activate(act, value, param); });
  }
}

// z becomes act'(z).
template <bool Simple, int N, class A>
__device__ __forceinline__ void apply_activation_grad(Activation act, A param, A (&z)[N]) {
  if constexpr (Simple) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      z[i] = act == Activation::relu ? activate_grad(Activation::relu, z[i], param) : A(1);
  } else {
    map_in_turn(z, [&](A value) { return activate_grad(act, value, param); });
  }
}

// The pack at `at`, zeros where it is not wanted.
template <class T, int V>
__device__ __forceinline__ Pack<T, V> load_whole(const T* base, int64_t at, bool wanted) {
  return load_pack<T, V, true>(base, at, wanted, 0);
}

// Pack k of the values, rounded; and its way to memory.
template <class T, int V, int N, class A>
__device__ __forceinline__ Pack<T, V> values_pack(const A (&values)[N], int k) {
  A pack[V];
#pragma unroll
  for (int j = 0; j < V; ++j) pack[j] = values[k * V + j];
  return make_pack<T, V>(pack);
}

template <class T, int V, int N, class A>
__device__ __forceinline__ void store_values(T* base, int64_t at, const A (&values)[N], int k) {
  store_pack<true>(base, at, 1u, values_pack<T, V>(values, k));
}

// What dz is made of: the packs of U places.
template <class T, int V, int U>
struct Inputs {
  Pack<T, V> x[U], dout[U], saved[U];

  __device__ __forceinline__ void load(const Backward& p, int k, int64_t at, bool wanted) {
    x[k] = load_whole<T, V>(static_cast<const T*>(p.x), at, wanted);
    dout[k] = load_whole<T, V>(static_cast<const T*>(p.dout), at, wanted);
    if (p.z_source != ZSource::input)
      saved[k] = load_whole<T, V>(static_cast<const T*>(p.saved), at, wanted);
  }
  // The z of element j of pack k, given the norm's part of it.
  template <class A>
  __device__ __forceinline__ A z(const Backward& p, int k, int j, A norm) const {
    if (p.z_source == ZSource::output) return to_acc(saved[k].v[j]);
    return p.z_source == ZSource::residual ? norm + to_acc(saved[k].v[j]) : norm;
  }
};

// ---- rows ----

// A thread's place: `size` threads (a power of two below a warp, or whole warps) share a row, a pack each.
template <int V>
struct Team {
  int lane, index, count;  // of the thread in its team; of the team; teams of the block
  int size, warps;
  bool active;  // has a pack

  __device__ explicit Team(const Plan& plan) {
    const int thread = static_cast<int>(threadIdx.x);
    size = plan.team;
    lane = thread % size;
    index = thread / size;
    count = static_cast<int>(blockDim.x) / size;
    warps = size / kWarp;
    active = lane * V < plan.channels;
  }
};

// The rows that a team works on at a time.
template <int V, int R>
struct Rows {
  int64_t first, start;  // row; its element
  int count, stride;     // from one row to the next: rows, elements
  int inside;            // rows that are the tensor's, or 0 for a thread without a pack

  __device__ Rows(const Plan& plan, const Team<V>& team, int64_t round) {
    count = team.count;
    stride = count * plan.channels;
    first = round * R * count + team.index;
    start = first * plan.channels + team.lane * V;
    inside = 0;
#pragma unroll
    for (int r = 0; r < R; ++r) inside += team.active && row(r) < plan.positions;
  }
  __device__ int64_t row(int r) const { return first + r * count; }
  __device__ int64_t at(int r) const { return start + r * stride; }
  __device__ bool wanted(int r) const { return r < inside; }
};

// Sums over the team, in every thread of it. `buffer`: shared memory that no thread may still be reading; where
// a team is of several warps, two take turns, since the barrier here ends the reads of the other.
template <int K, int V, class A>
__device__ __forceinline__ void reduce_team(const Team<V>& team, A* buffer, A (&values)[K]) {
#pragma unroll 1
  for (int offset = (team.size < kWarp ? team.size : kWarp) / 2; offset >= 1; offset /= 2) {
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] += __shfl_xor_sync(kWholeWarp, values[k], offset);
  }
  if (team.warps <= 1) return;
  A* sums = buffer + team.index * team.warps * K;
  if (team.lane % kWarp == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) sums[team.lane / kWarp * K + k] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = A(0);
#pragma unroll 1
  for (int warp = 0; warp < team.warps; ++warp) {
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] += sums[warp * K + k];
  }
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kMaxTeam, 1)
    layer_norm_2d_rows(const Forward p, const Plan plan) {
  using A = acc_t<T>;
  constexpr int R = forward_unroll<V, Simple>();
  ADVDL_DYNAMIC_SHARED(memory);
  const Team<V> team(plan);
  A* buffers = reinterpret_cast<A*>(memory);
  A* other_buffer = buffers + static_cast<int>(blockDim.x) / kWarp * R;
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  const A param = static_cast<A>(p.act_param), count = static_cast<A>(plan.channels);
  int channels[V];
#pragma unroll
  for (int j = 0; j < V; ++j) channels[j] = team.lane * V + j;
  A weight[V], bias[V];
  load_params(p.weight, p.shape.weight_dtype, plan.channels, channels, A(1), weight);
  load_params(p.bias, p.shape.weight_dtype, plan.channels, channels, A(0), bias);
#pragma unroll 1
  for (int64_t round = blockIdx.x; round < plan.rounds; round += gridDim.x) {
    const Rows<V, R> rows(plan, team, round);
    Pack<T, V> packs[R], added[R];
#pragma unroll
    for (int r = 0; r < R; ++r) packs[r] = load_whole<T, V>(x, rows.at(r), rows.wanted(r));
    if (residual != nullptr) {
#pragma unroll
      for (int r = 0; r < R; ++r) added[r] = load_whole<T, V>(residual, rows.at(r), rows.wanted(r));
    }
    A mean[R], var[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      mean[r] = A(0);
#pragma unroll
      for (int j = 0; j < V; ++j) mean[r] += to_acc(packs[r].v[j]);
    }
    reduce_team(team, buffers, mean);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      mean[r] /= count;
      var[r] = A(0);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A d = rows.wanted(r) ? to_acc(packs[r].v[j]) - mean[r] : A(0);
        var[r] += d * d;
      }
    }
    reduce_team(team, other_buffer, var);
    A y[R * V];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      var[r] /= count;
      const A rstd = reciprocal_std(var[r], p.eps);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        A z = (to_acc(packs[r].v[j]) - mean[r]) * rstd * weight[j] + bias[j];
        if (residual != nullptr) z += to_acc(added[r].v[j]);
        y[r * V + j] = z;
      }
    }
    apply_activation<Simple>(p.act, param, y);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (!rows.wanted(r)) continue;
      store_values<T, V>(static_cast<T*>(p.out), rows.at(r), y, r);
      if (team.lane == 0) {
        static_cast<A*>(p.mean)[rows.row(r)] = mean[r];
        static_cast<A*>(p.var)[rows.row(r)] = var[r];
      }
    }
  }
}

// Sums of the block's teams, [teams or warps of them][V * team], to the block's row of the workspace.
template <int V, class A>
__device__ __forceinline__ void store_team_sums(const Plan& plan, const Team<V>& team,
                                                SumPair<A> (&sums)[V], SumPair<A>* scratch,
                                                A* workspace) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
#pragma unroll 1
  for (int offset = kWarp / 2; offset >= team.size; offset /= 2) {
#pragma unroll
    for (int j = 0; j < V; ++j) sums[j].merge(shuffle_xor(sums[j], offset));
  }
  const int span = team.size > kWarp ? team.size : kWarp, width = team.size * V;
  if (thread % span < team.size) {
#pragma unroll
    for (int j = 0; j < V; ++j) scratch[thread / span * width + team.lane * V + j] = sums[j];
  }
  __syncthreads();
#pragma unroll 1
  for (int c = thread; c < plan.channels; c += threads) {
    SumPair<A> total;
#pragma unroll 4
    for (int group = 0; group < threads / span; ++group) total.merge(scratch[group * width + c]);
    store_partial(workspace, gridDim.x, plan.channels, blockIdx.x, c, total);
  }
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kMaxTeam, 1)
    layer_norm_2d_rows_backward(const Backward p, const Plan plan, acc_t<T>* workspace) {
  using A = acc_t<T>;
  constexpr int R = rows_backward_unroll<V>();
  ADVDL_DYNAMIC_SHARED(memory);
  const Team<V> team(plan);
  A* buffers = reinterpret_cast<A*>(memory);
  const int buffer_size = static_cast<int>(blockDim.x) / kWarp * 2 * R;
  int buffer = 0;
  const A param = static_cast<A>(p.act_param), count = static_cast<A>(plan.channels);
  int channels[V];
#pragma unroll
  for (int j = 0; j < V; ++j) channels[j] = team.lane * V + j;
  A weight[V];
  load_params(p.weight, p.shape.weight_dtype, plan.channels, channels, A(1), weight);
  SumPair<A> channel_sums[V] = {};
#pragma unroll 1
  for (int64_t round = blockIdx.x; round < plan.rounds; round += gridDim.x) {
    const Rows<V, R> rows(plan, team, round);
    A bias[V];  // every time anew: a thread has no room for it beside the sums
    load_params(p.act == Activation::identity ? nullptr : p.bias, p.shape.weight_dtype,
                plan.channels, channels, A(0), bias);
    Inputs<T, V, R> in;
    A mean[R], rstd[R], dz[R * V], sums[2 * R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      in.load(p, r, rows.at(r), rows.wanted(r));
      mean[r] = rows.wanted(r) ? static_cast<const A*>(p.mean)[rows.row(r)] : A(0);
      rstd[r] = rows.wanted(r) ? static_cast<const A*>(p.var)[rows.row(r)] : A(1);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      rstd[r] = reciprocal_std(rstd[r], p.eps);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A xhat = (to_acc(in.x[r].v[j]) - mean[r]) * rstd[r];
        dz[r * V + j] = in.z(p, r, j, xhat * weight[j] + bias[j]);
      }
    }
    apply_activation_grad<Simple>(p.act, param, dz);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      sums[2 * r] = sums[2 * r + 1] = A(0);
      if (!rows.wanted(r)) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A xhat = (to_acc(in.x[r].v[j]) - mean[r]) * rstd[r];
        A& value = dz[r * V + j];
        value *= to_acc(in.dout[r].v[j]);
        channel_sums[j].merge({value, value * xhat});
        sums[2 * r] += weight[j] * value;
        sums[2 * r + 1] += weight[j] * value * xhat;
      }
      if (p.dresidual != nullptr)
        store_values<T, V>(static_cast<T*>(p.dresidual), rows.at(r), dz, r);
    }
    if (p.dx == nullptr) continue;
    reduce_team(team, buffers + buffer, sums);
    buffer = buffer_size - buffer;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const A shift = sums[2 * r] / count, slope = sums[2 * r + 1] / count;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A xhat = (to_acc(in.x[r].v[j]) - mean[r]) * rstd[r];
        A& value = dz[r * V + j];
        value = rstd[r] * (weight[j] * value - (shift + xhat * slope));
      }
      if (rows.wanted(r)) store_values<T, V>(static_cast<T*>(p.dx), rows.at(r), dz, r);
    }
  }
  if (p.dweight == nullptr) return;
  auto* scratch = reinterpret_cast<SumPair<A>*>(buffers + 2 * buffer_size);
  store_team_sums(plan, team, channel_sums, scratch, workspace);
}

// ---- tiles ----

// A thread's place in a tile. It takes channels `worker`, worker + workers, ... of its column.
template <int V>
struct Place {
  int64_t start, position;  // element of channel 0 and position, of lane 0
  int column, worker, workers;
  bool inside;  // the column is one of the tensor's

  __device__ Place(const Plan& plan, int64_t tile) {
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

// Calls body(channel, at, slot, wanted) for groups of U channels: their numbers, element offsets, places in what a
// tile keeps. Every thread of the block makes the same calls.
template <int U, int V, class Body>
__device__ __forceinline__ void for_channels(const Plan& plan, const Place<V>& place, Body body) {
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

// Adds a group of packs, each lane a position of its own: x - pivot, so that what rounding loses is a share of the
// deviations and not of the mean. The group's own mean and deviations first, then one Chan merge.
template <class T, int V, int U, class A>
__device__ __forceinline__ void add_group(const Pack<T, V> (&x)[U], const bool (&wanted)[U],
                                          const Pack<T, V>& pivot, Welford<A> (&states)[V]) {
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
    layer_norm_2d_tiles(const Forward p, const Plan plan) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  auto* kept = reinterpret_cast<Pack<T, V>*>(memory);
  auto* scratch = reinterpret_cast<Welford<A>*>(memory + plan.kept);
  auto* result = scratch + static_cast<int>(blockDim.x) / kWarp * plan.columns * V;
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  const DType weights = p.shape.weight_dtype;
  const A param = static_cast<A>(p.act_param);
  const Place<V> place(plan, blockIdx.x);
  const auto pivot = load_whole<T, V>(x, place.start, place.inside);
  Welford<A> states[V] = {};
  constexpr int U = 4;
  for_channels<U>(
      plan, place,
      [&](const int (&)[U], const int64_t (&at)[U], const int (&slot)[U], const bool (&wanted)[U]) {
        Pack<T, V> packs[U];
#pragma unroll
        for (int k = 0; k < U; ++k) packs[k] = load_whole<T, V>(x, at[k], wanted[k]);
        if (plan.kept > 0) {
#pragma unroll
          for (int k = 0; k < U; ++k)
            if (wanted[k]) kept[slot[k]] = packs[k];
        }
        add_group(packs, wanted, pivot, states);
      });
  block_reduce(states, plan.columns, scratch, result);
  A mean[V], rstd[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const Welford<A> state = result[place.column * V + j];
    const A var = state.m2 / static_cast<A>(plan.channels);
    mean[j] = to_acc(pivot.v[j]) + state.mean;
    rstd[j] = reciprocal_std(var, p.eps);
    if (place.worker == 0 && place.inside) {
      static_cast<A*>(p.mean)[place.position + j] = mean[j];
      static_cast<A*>(p.var)[place.position + j] = var;
    }
  }
  constexpr int W = forward_unroll<V, Simple>();
  for_channels<W>(plan, place,
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
                      if (plan.kept == 0)
                        packs[k] = load_whole<T, V>(x, at[k], wanted[k]);
                      else if (wanted[k])
                        packs[k] = kept[slot[k]];
                    }
#pragma unroll
                    for (int k = 0; k < W; ++k)
#pragma unroll
                      for (int j = 0; j < V; ++j) {
                        A z = (to_acc(packs[k].v[j]) - mean[j]) * rstd[j] * weight[k] + bias[k];
                        if (residual != nullptr) z += to_acc(added[k].v[j]);
                        y[k * V + j] = z;
                      }
                    apply_activation<Simple>(p.act, param, y);
#pragma unroll
                    for (int k = 0; k < W; ++k)
                      if (wanted[k]) store_values<T, V>(static_cast<T*>(p.out), at[k], y, k);
                  });
}

// The block's sums for dbias and dweight, in shared memory or its row of the workspace. Each channel has one thread
// that adds to them, over all tiles: worker channel % workers of column 0.
template <class A>
struct ChannelSums {
  A *dbias, *dweight;

  // A channel's dz and dz * xhat in a column. Every thread of a warp calls it: the columns meet.
  __device__ void add(const Plan& plan, int channel, SumPair<A> terms) const {
#pragma unroll 1
    for (int offset = plan.columns / 2; offset >= 1; offset /= 2)
      terms.merge(shuffle_xor(terms, offset));
    if (static_cast<int>(threadIdx.x) % plan.columns != 0 || channel >= plan.channels) return;
    dbias[channel] += terms.first;
    dweight[channel] += terms.second;
  }
  // Calls body(channel) for those that this thread adds to.
  template <class Body>
  __device__ void for_own(const Plan& plan, Body body) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread % plan.columns != 0) return;
#pragma unroll 1
    for (int channel = thread / plan.columns; channel < plan.channels;
         channel += static_cast<int>(blockDim.x) / plan.columns)
      body(channel);
  }
};

// What dz is kept in between the two walks over a tile: exactly, as dx must be made of the dz that is in the sums.
// Identity and relu leave dout or 0.
template <class T, bool Simple>
struct KeptGradient {
  using type = acc_t<T>;
};
template <class T>
struct KeptGradient<T, true> {
  using type = T;
};

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kTileThreads, 1)
    layer_norm_2d_tiles_backward(const Backward p, const Plan plan, acc_t<T>* workspace) {
  using A = acc_t<T>;
  using D = typename KeptGradient<T, Simple>::type;
  constexpr int U = tiles_backward_unroll<T, V, Simple>();
  ADVDL_DYNAMIC_SHARED(memory);
  auto* kept_dz = reinterpret_cast<Pack<D, V>*>(memory);
  auto* kept_x = reinterpret_cast<Pack<T, V>*>(kept_dz + plan.channels * plan.columns);
  auto* scratch = reinterpret_cast<SumPair<A>*>(memory + plan.kept);
  auto* result = scratch + static_cast<int>(blockDim.x) / kWarp * plan.columns * V;
  A* shared_sums = reinterpret_cast<A*>(result + plan.columns * V);
  A* global_sums = workspace + int64_t{blockIdx.x} * plan.channels;
  const ChannelSums<A> channel_sums =
      plan.shared_sums
          ? ChannelSums<A>{shared_sums, shared_sums + plan.channels}
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
    const Place<V> place(plan, tile);
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
    SumPair<A> sums[V] = {};  // then their means over the channels
    // Two walks: the sums; and dx, from what the first one kept or read and computed again.
#pragma unroll 1
    for (int walk = 0; walk < 2; ++walk) {
      const bool second = walk == 1;
      if (second) {
        if (p.dx == nullptr) break;
        block_reduce(sums, plan.columns, scratch, result);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const SumPair<A> sum = result[place.column * V + j];
          sums[j] = {sum.first / count, sum.second / count};
        }
      }
      for_channels<U>(
          plan, place,
          [&](const int (&channel)[U], const int64_t (&at)[U], const int (&slot)[U],
              const bool (&wanted)[U]) {
            Inputs<T, V, U> in;
            A weight[U], dz[U * V];
            load_params(p.weight, weights, plan.channels, channel, A(1), weight);
            if (second && plan.kept > 0) {
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
              apply_activation_grad<Simple>(p.act, param, dz);
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
                  const A projection = sums[j].first + centred(in.x[k], j) * sums[j].second;
                  value = rstd[j] * (weight[k] * value - projection);
                }
                store_values<T, V>(static_cast<T*>(p.dx), at[k], dz, k);
                continue;
              }
              SumPair<A> terms;
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
              if (plan.kept > 0) {
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
                    SumPair<A>{channel_sums.dbias[channel], channel_sums.dweight[channel]});
    });
  }
}

// ---- dweight and dbias ----

template <class A>
__global__ void __launch_bounds__(kFinalizeThreads, 1)
    layer_norm_2d_finalize_grads(const Backward p, int64_t splits, const A* workspace) {
  ADVDL_DYNAMIC_SHARED(memory);
  auto* result = reinterpret_cast<SumPair<A>*>(memory);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFinalizeColumns;
  merge_partials(workspace, splits, p.shape.c, first, kFinalizeColumns, result + kFinalizeColumns,
                 result);
  const int64_t c = first + threadIdx.x;
  if (threadIdx.x < kFinalizeColumns && c < p.shape.c) {
    static_cast<A*>(p.dbias)[c] = result[threadIdx.x].first;
    static_cast<A*>(p.dweight)[c] = result[threadIdx.x].second;
  }
}

// ---- host ----

bool channels_side_by_side(const GroupNormShape& s) {
  return s.layout == Layout::channels_last || s.s == 1;
}

// Blocks of the backward pass at most, each with a row of sums in the workspace.
int64_t backward_blocks(const GroupNormShape& s) {
  const int64_t positions = s.n * s.s;
  return std::clamp(positions / kBlockPositions, std::min(positions, kMultiprocessors), kBlocks);
}

Plan base_plan(const GroupNormShape& s) {
  Plan plan;
  plan.positions = s.n * s.s;
  plan.channels = static_cast<int>(s.c);
  return plan;
}

// `in_flight`: rows of a team at a time.
Plan rows_plan(const GroupNormShape& s, int v, int in_flight) {
  Plan plan = base_plan(s);
  const int64_t packs = s.c / v;
  plan.team = static_cast<int>(packs <= kWarp ? power_of_two_above(packs)
                                              : divide_up(packs, kWarp) * kWarp);
  plan.threads = std::max(plan.team, kRowThreads / plan.team * plan.team);
  plan.rounds = divide_up(plan.positions, int64_t{plan.threads / plan.team} * in_flight);
  plan.blocks = std::max(std::min(plan.rounds, kBlocks), divide_up(plan.rounds, kBlockRounds));
  return plan;
}

// Packs of positions side by side in a tile: as many as kTileBytes hold, unless multiprocessors would be idle.
int tile_columns(const Plan& plan, int v, int element_bytes, int64_t kept_bytes) {
  const int64_t packs = plan.positions / v;
  const int64_t least = std::max<int64_t>(1, kSectorBytes / (v * element_bytes));
  int64_t columns = 32;
  while (columns > least && (columns * plan.channels * kept_bytes > kTileBytes ||
                             divide_up(packs, columns) < 2 * kMultiprocessors))
    columns /= 2;
  return static_cast<int>(columns);
}

// `kept_bytes`: of a channel of one column, or 0; `state_bytes`: of a position's state.
Plan tiles_plan(const GroupNormShape& s, int v, int64_t kept_bytes, int state_bytes) {
  Plan plan = base_plan(s);
  if (!channels_side_by_side(s)) {
    plan.row = s.s;
    plan.packs = s.s / v;
    plan.columns = tile_columns(plan, v, element_bytes(s.dtype), kept_bytes);
  }
  plan.tiles = divide_up(plan.positions / v, plan.columns);
  plan.blocks = plan.tiles;
  const int64_t kept = divide_up(s.c * plan.columns * kept_bytes, 16) * 16;
  const int64_t most = kept > kTileBytes ? kTileThreads : kTileThreads / 2;
  plan.threads =
      static_cast<int>(std::clamp<int64_t>(power_of_two_above(s.c) * plan.columns, kWarp, most));
  plan.shared = static_cast<size_t>((plan.threads / kWarp + 1) * plan.columns * v * state_bytes);
  if (kept + plan.shared <= shared_memory_limit()) plan.kept = static_cast<size_t>(kept);
  plan.shared += plan.kept;
  return plan;
}

LaunchConfig config_of(const Plan& plan, void* stream) {
  return {plan.blocks, plan.threads, plan.shared, stream};
}

// Calls body<T, V, Rows, Simple>(). Packs have kernels of their own for identity and relu; single elements and fp64
// use the general ones.
template <class Body>
void dispatch(const GroupNormShape& s, Activation act, bool aligned, Body body) {
  const bool simple = act == Activation::identity || act == Activation::relu;
  const auto packed = [&]<class T, int V, bool Rows>() {
    simple ? body.template operator()<T, V, Rows, true>()
           : body.template operator()<T, V, Rows, false>();
  };
  const auto typed = [&]<class T>() {
    const bool rows = channels_side_by_side(s);
    if constexpr (sizeof(T) <= 4) {
      constexpr int V = kVectorBytes / sizeof(T);
      if (rows && aligned && s.c % V == 0 && s.c / V <= kMaxTeam)
        return packed.template operator()<T, V, true>();
      if (!rows && aligned && s.s % kTilePack == 0)
        return packed.template operator()<T, kTilePack, false>();
    }
    if (rows && s.c <= kMaxTeam) return body.template operator()<T, 1, true, false>();
    body.template operator()<T, 1, false, false>();
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

template <class T, int V, bool Rows, bool Simple>
void launch_forward(const Forward& p, void* stream) {
  using A = acc_t<T>;
  if constexpr (Rows) {
    constexpr int R = forward_unroll<V, Simple>();
    Plan plan = rows_plan(p.shape, V, R);
    plan.shared = static_cast<size_t>(2 * plan.threads / kWarp * R) * sizeof(A);
    launch("layer_norm_2d_rows", &layer_norm_2d_rows<T, V, Simple>, config_of(plan, stream), p,
           plan);
  } else {
    const Plan plan = tiles_plan(p.shape, V, sizeof(Pack<T, V>), sizeof(Welford<A>));
    launch("layer_norm_2d_tiles", &layer_norm_2d_tiles<T, V, Simple>, config_of(plan, stream), p,
           plan);
  }
}

// Returns the number of blocks: the rows of sums in the workspace.
template <class T, int V, bool Rows, bool Simple>
int64_t launch_backward(const Backward& p, acc_t<T>* workspace, void* stream) {
  using A = acc_t<T>;
  if constexpr (Rows) {
    constexpr int R = rows_backward_unroll<V>();
    Plan plan = rows_plan(p.shape, V, R);
    plan.blocks = std::min(backward_blocks(p.shape), plan.rounds);
    const int groups = plan.threads / std::max(plan.team, kWarp);
    plan.shared = static_cast<size_t>(2 * plan.threads / kWarp * 2 * R) * sizeof(A) +
                  static_cast<size_t>(groups * plan.team * V) * sizeof(SumPair<A>);
    launch("layer_norm_2d_rows_backward", &layer_norm_2d_rows_backward<T, V, Simple>,
           config_of(plan, stream), p, plan, workspace);
    return plan.blocks;
  } else {
    constexpr int64_t kept = V * (sizeof(T) + sizeof(typename KeptGradient<T, Simple>::type));
    Plan plan = tiles_plan(p.shape, V, p.dx != nullptr ? kept : 0, sizeof(SumPair<A>));
    plan.blocks = std::min(backward_blocks(p.shape), plan.tiles);
    const size_t sums = 2 * static_cast<size_t>(p.shape.c) * sizeof(A);
    plan.shared_sums = p.dweight != nullptr && plan.shared + sums <= shared_memory_limit();
    if (plan.shared_sums) plan.shared += sums;
    launch("layer_norm_2d_tiles_backward", &layer_norm_2d_tiles_backward<T, V, Simple>,
           config_of(plan, stream), p, plan, workspace);
    return plan.blocks;
  }
}

template <class A>
void launch_finalize(const Backward& p, int64_t splits, const A* workspace, void* stream) {
  int threads = 128;
  while (threads < kFinalizeThreads && splits * kFinalizeColumns > 4 * threads) threads *= 2;
  const int states = (threads / kWarp + 1) * kFinalizeColumns;
  launch("layer_norm_2d_finalize_grads", &layer_norm_2d_finalize_grads<A>,
         {divide_up(p.shape.c, kFinalizeColumns), threads,
          static_cast<size_t>(states) * sizeof(SumPair<A>), stream},
         p, splits, workspace);
}

}  // namespace

size_t layer_norm_2d_forward_workspace(const GroupNormForward&) { return 0; }

size_t layer_norm_2d_backward_workspace(const GroupNormBackward& p) {
  if (p.shape.is_empty() || p.dweight == nullptr) return 0;
  const int64_t acc_bytes = p.shape.dtype == DType::f64 ? 8 : 4;
  return static_cast<size_t>(2 * backward_blocks(p.shape) * p.shape.c * acc_bytes);
}

void layer_norm_2d_forward(const GroupNormForward& p, void*, void* stream) {
  if (p.shape.is_empty()) return;
  dispatch(p.shape, p.act, vector_aligned(p.x, p.residual, p.out),
           [&]<class T, int V, bool Rows, bool Simple>() {
             launch_forward<T, V, Rows, Simple>(p, stream);
           });
}

void layer_norm_2d_backward(const GroupNormBackward& p, void* workspace, void* stream) {
  if (p.shape.is_empty()) {
    if (p.dweight == nullptr || p.shape.c == 0) return;
    const size_t bytes = static_cast<size_t>(p.shape.c) * (p.shape.dtype == DType::f64 ? 8 : 4);
    check(cudaMemsetAsync(p.dweight, 0, bytes, static_cast<cudaStream_t>(stream)),
          "cudaMemsetAsync");
    check(cudaMemsetAsync(p.dbias, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
    return;
  }
  dispatch(p.shape, p.act, vector_aligned(p.x, p.dout, p.saved, p.dx, p.dresidual),
           [&]<class T, int V, bool Rows, bool Simple>() {
             auto* sums = static_cast<acc_t<T>*>(workspace);
             const int64_t splits = launch_backward<T, V, Rows, Simple>(p, sums, stream);
             if (p.dweight != nullptr) launch_finalize<acc_t<T>>(p, splits, sums, stream);
           });
}

}  // namespace advdl_ops::cuda
