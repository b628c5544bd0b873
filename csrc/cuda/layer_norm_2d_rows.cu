// Layer norm 2d on CUDA over rows: the channels of a position are contiguous (channels_last, or S = 1) and few enough
// for a team of threads with a pack each. The row stays in registers. Algorithms, bytes and launches: docs/kernels.md.
#include "layer_norm_2d_plan.h"

namespace advdl_ops::cuda {
namespace {

constexpr int kMaxTeam = 512;  // threads that share a row
// Threads of a block of several teams. Few, because registers limit the blocks of a multiprocessor.
constexpr int kRowThreads = 128;
// A forward block takes at most this many rounds, with one load of weight and bias. So a large tensor has more than
// kBlocks blocks.
constexpr int64_t kBlockRounds = 8;

template <int V>
ADVDL_HOST_DEVICE constexpr int backward_unroll() {
  return V == 1 ? 4 : 8 / V;
}

// Shared memory: two buffers of `sums` values for each warp, and in backward the sums of each channel over the block's
// teams.
template <class A>
struct RowsShared {
  SharedArena arena;
  A *buffer, *other;
  GradientSums<A>* channel_sums;  // [warps, or teams of several warps][team * V]

  ADVDL_HOST_DEVICE RowsShared(unsigned char* memory, const PositionPlan& plan, int sums,
                               int channels_per_thread)
      : arena(memory) {
    const int64_t size = plan.threads / kWarp * sums;
    buffer = arena.take<A>(2 * size);
    other = buffer + size;
    const int groups = plan.threads / (plan.team > kWarp ? plan.team : kWarp);
    channel_sums = arena.take<GradientSums<A>>(groups * plan.team * channels_per_thread);
  }
};

// A thread's place. The `size` threads of a team (a power of two up to a warp, or whole warps) share a row, with a pack
// each.
template <int V>
struct Team {
  int lane, index, count;  // index of the thread in its team; index of the team; teams of the block
  int size, warps;
  bool active;  // has a pack

  __device__ explicit Team(const PositionPlan& plan) {
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
  int64_t first, start;  // the first row; its first element
  int count, stride;     // from one row to the next: in rows, in elements
  int inside;            // rows that exist, or 0 for a thread without a pack

  __device__ Rows(const PositionPlan& plan, const Team<V>& team, int64_t round) {
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

// Sums over the team, for every thread of it. `buffer` is shared memory that no thread may still be reading. If a team
// has several warps, callers alternate between two buffers: the barrier here ends the reads of the other one.
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
    layer_norm_2d_forward_rows(const GroupNormForward p, const PositionPlan plan) {
  using A = acc_t<T>;
  constexpr int R = forward_unroll<V, Simple>();
  ADVDL_DYNAMIC_SHARED(memory);
  const Team<V> team(plan);
  const RowsShared<A> shared(memory, plan, R, 0);
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
    reduce_team(team, shared.buffer, mean);
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
    reduce_team(team, shared.other, var);
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
    activate_values<Simple>(p.act, param, y);
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

// Adds up the sums of the block's teams in scratch [teams or warps][V * team], and writes them to the block's row of
// the workspace.
template <int V, class A>
__device__ __forceinline__ void store_team_sums(const PositionPlan& plan, const Team<V>& team,
                                                GradientSums<A> (&sums)[V],
                                                GradientSums<A>* scratch, A* workspace) {
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
    GradientSums<A> total;
#pragma unroll 4
    for (int group = 0; group < threads / span; ++group) total.merge(scratch[group * width + c]);
    store_partial(workspace, gridDim.x, plan.channels, blockIdx.x, c, total);
  }
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kMaxTeam, 1)
    layer_norm_2d_backward_rows(const GroupNormBackward p, const PositionPlan plan,
                                acc_t<T>* workspace) {
  using A = acc_t<T>;
  constexpr int R = backward_unroll<V>();
  ADVDL_DYNAMIC_SHARED(memory);
  const Team<V> team(plan);
  const RowsShared<A> shared(memory, plan, 2 * R, V);
  A *buffer = shared.buffer, *other = shared.other;  // used alternately
  const A param = static_cast<A>(p.act_param), count = static_cast<A>(plan.channels);
  int channels[V];
#pragma unroll
  for (int j = 0; j < V; ++j) channels[j] = team.lane * V + j;
  A weight[V];
  load_params(p.weight, p.shape.weight_dtype, plan.channels, channels, A(1), weight);
  GradientSums<A> channel_sums[V] = {};
#pragma unroll 1
  for (int64_t round = blockIdx.x; round < plan.rounds; round += gridDim.x) {
    const Rows<V, R> rows(plan, team, round);
    A bias[V];  // loaded in every round, to save registers for the sums
    load_params(p.act == Activation::identity ? nullptr : p.bias, p.shape.weight_dtype,
                plan.channels, channels, A(0), bias);
    PositionInputs<T, V, R> in;
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
    activate_grad_values<Simple>(p.act, param, dz);
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
    reduce_team(team, buffer, sums);
    A* const used = buffer;
    buffer = other;
    other = used;
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
  store_team_sums(plan, team, channel_sums, shared.channel_sums, workspace);
}

// ---- host ----

// `in_flight`: rows that a team works on at a time.
PositionPlan rows_plan(const GroupNormShape& s, int v, int in_flight) {
  PositionPlan plan = base_plan(s);
  const int64_t packs = s.c / v;
  plan.team = static_cast<int>(packs <= kWarp ? power_of_two_above(packs)
                                              : divide_up(packs, kWarp) * kWarp);
  plan.threads = std::max(plan.team, kRowThreads / plan.team * plan.team);
  plan.rounds = divide_up(plan.positions, int64_t{plan.threads / plan.team} * in_flight);
  plan.blocks = std::max(std::min(plan.rounds, kBlocks), divide_up(plan.rounds, kBlockRounds));
  return plan;
}

bool takes_packs(const GroupNormShape& s, bool aligned) {
  const int v = pack_elements(s.dtype);
  return aligned && s.c % v == 0 && s.c / v <= kMaxTeam;
}

LaunchConfig rows_config(const PositionPlan& plan, int64_t shared, void* stream) {
  return {plan.blocks, plan.threads, static_cast<size_t>(shared), stream};
}

}  // namespace

bool layer_norm_2d_takes_rows(const GroupNormShape& s, bool aligned) {
  return channels_side_by_side(s) && (takes_packs(s, aligned) || s.c <= kMaxTeam);
}

void layer_norm_2d_rows(const GroupNormForward& p, bool aligned, void* stream) {
  const bool vectors = takes_packs(p.shape, aligned);
  dispatch_packs<true>(p.shape.dtype, vectors, p.act, [&]<class T, int V, bool, bool Simple>() {
    constexpr int R = forward_unroll<V, Simple>();
    const PositionPlan plan = rows_plan(p.shape, V, R);
    const RowsShared<acc_t<T>> shared(nullptr, plan, R, 0);
    launch("layer_norm_2d_forward_rows", &layer_norm_2d_forward_rows<T, V, Simple>,
           rows_config(plan, shared.arena.bytes, stream), p, plan);
  });
}

int64_t layer_norm_2d_rows_backward(const GroupNormBackward& p, bool aligned, void* partials,
                                    void* stream) {
  const bool vectors = takes_packs(p.shape, aligned);
  int64_t blocks = 0;
  dispatch_packs<true>(p.shape.dtype, vectors, p.act, [&]<class T, int V, bool, bool Simple>() {
    constexpr int R = backward_unroll<V>();
    PositionPlan plan = rows_plan(p.shape, V, R);
    plan.blocks = std::min(backward_blocks(p.shape), plan.rounds);
    const RowsShared<acc_t<T>> shared(nullptr, plan, 2 * R, V);
    launch("layer_norm_2d_backward_rows", &layer_norm_2d_backward_rows<T, V, Simple>,
           rows_config(plan, shared.arena.bytes, stream), p, plan,
           static_cast<acc_t<T>*>(partials));
    blocks = plan.blocks;
  });
  return blocks;
}

}  // namespace advdl_ops::cuda
