// The passes of a norm over a thread's share of a tile: statistics, forward, the gradient sums, and dx. Each has one
// source for all types, layouts and activations. Algorithms, bytes and launches: docs/kernels.md.
//
// Params is a ...Forward or ...Backward struct of csrc/common. Only the fields that all of them have are used.
#pragma once

#include <cstdint>

#include "norm_plan.h"
#include "reduce.h"
#include "vec.h"

namespace advdl_ops::cuda {

// Packs in flight per thread and tensor. Statistics: 64 bytes, or 8 single elements (4 of fp64).
template <class T, int V>
ADVDL_HOST_DEVICE constexpr int stats_unroll() {
  return V > 1 || sizeof(T) > 4 ? 4 : 8;
}
// Fewer if each lane has its own constants, or for the switch over all activations, to save registers.
template <class T, int V, bool LanesDiffer, bool Simple>
ADVDL_HOST_DEVICE constexpr int apply_unroll() {
  return Simple && !(LanesDiffer && V > 4) ? 4 : 2;
}
// Two or three tensors are read at once.
inline constexpr int kBackwardUnroll = 2;

// With the switch over all activations, the packs in flight take turns in one copy of the code. More than V copies of
// the switch would be too much for the instruction cache and the compiler.
template <int V, bool Simple>
inline constexpr bool kTakeTurns = !Simple && V > 1;

template <int U, class Item>
__device__ __forceinline__ void next_turn(Item (&items)[U]) {
#pragma unroll
  for (int k = 0; k + 1 < U; ++k) items[k] = items[k + 1];
}
// This thread's part of constant `which` in [which][columns * Lanes].
template <int Lanes, class A>
__device__ __forceinline__ void load_constant(const A* constants, int which, int columns,
                                              A (&out)[Lanes]) {
  const A* from =
      constants + which * columns * Lanes + static_cast<int>(threadIdx.x) % columns * Lanes;
#pragma unroll
  for (int j = 0; j < Lanes; ++j) out[j] = from[j];
}

// The constants of a thread's lanes. Either all lanes have the same channel (Lanes = 1), or each has its own.
template <class A, int Lanes>
struct ForwardLanes {
  A mean[Lanes], scale[Lanes], bias[Lanes];

  __device__ __forceinline__ void load(const A* constants, int columns) {
    load_constant(constants, 0, columns, mean);
    load_constant(constants, 1, columns, scale);
    load_constant(constants, 2, columns, bias);
  }
  // Constants that depend on the position of the pack are looked up here (RunLanes).
  __device__ __forceinline__ void find(int64_t) {}
  __device__ __forceinline__ A normalized(A x, int j) const {
    const int lane = Lanes == 1 ? 0 : j;
    return (x - mean[lane]) * scale[lane] + bias[lane];
  }
};

// Constants of dx = dz * scale - shift - (x - mean) * slope.
template <class A, int Lanes>
struct BackwardLanes : ForwardLanes<A, Lanes> {
  A shift[Lanes], slope[Lanes];

  __device__ __forceinline__ void load(const A* constants, int columns) {
    ForwardLanes<A, Lanes>::load(constants, columns);
    load_constant(constants, 3, columns, shift);
    load_constant(constants, 4, columns, slope);
  }
};

// ---- reductions ----

// Shared memory of a reduction over a block: scratch, and the result of each column and lane. On the host, the arena
// has no memory and counts the bytes.
template <class State>
struct Reduction {
  State *scratch, *result;

  ADVDL_HOST_DEVICE Reduction(SharedArena& arena, int threads, int columns, int lanes,
                              bool scratch_needed = true) {
    const int64_t width = static_cast<int64_t>(columns) * lanes;
    scratch = arena.take<State>(scratch_needed ? reduce_rows(threads, columns) * width : 0);
    result = arena.take<State>(width);
  }
};

// Merges the states of each column of a tile into result[column * Lanes + lane] in shared memory, visible to all
// threads on return. The threads of a column are `columns` apart (channels_last) or neighbours: the whole block or a
// part of a warp.
template <bool CL, int Lanes, class State>
__device__ __forceinline__ void reduce_columns(State (&states)[Lanes], int columns, State* scratch,
                                               State* result) {
  if (CL || columns == 1) return block_reduce(states, columns, scratch, result);
  const int thread = static_cast<int>(threadIdx.x), team = static_cast<int>(blockDim.x) / columns;
  team_reduce(states[0], team);
  if (thread % team == 0) result[thread / team] = states[0];
  __syncthreads();
}

// Writes the block's results, one per channel of the tile, to the workspace ([fields][splits][samples * channels]).
template <class State, class A>
__device__ __forceinline__ void store_partials(const Plan& plan, const Place& place, int width,
                                               const State* results, A* workspace) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    const int64_t c = place.tile * width + i;
    if (c < plan.channels)
      store_partial(workspace, plan.splits, plan.samples * plan.channels, place.split,
                    place.sample * plan.channels + c, results[i]);
  }
}

// ---- statistics ----

// Adds one group of packs along S. The group's own mean and squared deviations come first (two passes over registers),
// then one Chan merge.
template <class T, int V, int U, class A>
__device__ __forceinline__ void add_group(const Pack<T, V> (&x)[U], const unsigned (&mask)[U],
                                          Moments<A>& state) {
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

// The same if each lane is another channel. A pack is then wanted as a whole or not at all.
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

// The moments of this thread's share of x, in one pass. `kept`: where the packs are stored for the second pass, or
// null.
template <class T, int V, bool CL, class A, int Lanes>
__device__ __forceinline__ void accumulate_statistics(const T* x, const Plan& plan,
                                                      const Work& work, Pack<T, V>* kept,
                                                      Moments<A> (&states)[Lanes]) {
  constexpr int U = stats_unroll<T, V>();
  A count = A(0), mean[Lanes] = {}, m2[Lanes] = {};
  walk<V, CL, U>(plan, work, [&](int64_t (&at)[U], unsigned (&mask)[U], int slot) {
    Pack<T, V> packs[U];
#pragma unroll
    for (int k = 0; k < U; ++k) packs[k] = load_pack<T, V, CL>(x, at[k], mask[k], plan.size);
    if (kept != nullptr) {
#pragma unroll
      for (int k = 0; k < U; ++k)
        if (mask[k] != 0u) kept[slot + k * work.slot_step] = packs[k];
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

// ---- forward ----

// Simple: identity or relu, chosen at run time. Otherwise the switch over all activations.
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

// out = act(norm(x) + residual) for this thread's share. x is read from `kept` unless that is null.
template <class T, int V, bool CL, int U, bool Simple, class Params, class Lanes>
__device__ __forceinline__ void apply_forward(const Params& p, const Plan& plan, const Work& work,
                                              const Pack<T, V>* kept, Lanes& lanes) {
  using A = acc_t<T>;
  constexpr bool kTurns = kTakeTurns<V, Simple>;
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const A param = static_cast<A>(p.act_param);
  walk<V, CL, U>(plan, work, [&](int64_t (&at)[U], unsigned (&mask)[U], int slot) {
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
        packs[k] = kept[slot + k * work.slot_step];
      }
    }
#pragma unroll(kTurns ? 1 : U)
    for (int turn = 0; turn < U; ++turn) {
      const int k = kTurns ? 0 : turn;
      if (mask[k] != 0u) lanes.find(at[k]);
      A y[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        A z = lanes.normalized(to_acc(packs[k].v[j]), j);
        if (residual != nullptr) z += to_acc(added[k].v[j]);
        y[j] = apply_activation<Simple>(p.act, z, param);
      }
      store_pack<CL>(out, at[k], mask[k], make_pack<T, V>(y));
      if constexpr (kTurns) next_turn(at), next_turn(mask), next_turn(packs), next_turn(added);
    }
  });
}

// ---- backward ----

// The inputs of dz for one group of packs. If an earlier pass stored dz (`ready`), `dout` holds dz itself.
template <class T, int V, int U>
struct Inputs {
  Pack<T, V> x[U], dout[U], saved[U];

  __device__ __forceinline__ void next_turn() {
    cuda::next_turn(x), cuda::next_turn(dout), cuda::next_turn(saved);
  }
};

template <bool Simple, class Params, class T, int V, int U, class A, int Lanes>
__device__ __forceinline__ A gradient(const Params& p, const Inputs<T, V, U>& in, int k, int j,
                                      bool ready, const ForwardLanes<A, Lanes>& lanes, A param) {
  const A dout = to_acc(in.dout[k].v[j]);
  if (ready) return dout;
  A z;
  if (p.z_source == ZSource::output) {
    z = to_acc(in.saved[k].v[j]);
  } else {
    z = lanes.normalized(to_acc(in.x[k].v[j]), j);
    if (p.z_source == ZSource::residual) z += to_acc(in.saved[k].v[j]);
  }
  return dout * apply_activation_grad<Simple>(p.act, z, param);
}

// One pass over this thread's share: the sums of dz and dz * (x - mean). It also writes dresidual and, if dx does not
// depend on the sums, dx = dz * scale.
template <class T, int V, bool CL, bool Simple, class Params, class A, int Lanes>
__device__ __forceinline__ void accumulate_gradients(const Params& p, const Plan& plan,
                                                     const Work& work,
                                                     const ForwardLanes<A, Lanes>& lanes, T* dx,
                                                     Pack<T, V>* kept_x, Pack<T, V>* kept_dz,
                                                     GradientSums<A> (&sums)[Lanes]) {
  constexpr int U = kBackwardUnroll;
  constexpr bool kTurns = kTakeTurns<V, Simple>;
  const T *x = static_cast<const T*>(p.x), *dout = static_cast<const T*>(p.dout);
  const T* saved = p.z_source == ZSource::input ? nullptr : static_cast<const T*>(p.saved);
  T* dresidual = static_cast<T*>(p.dresidual);
  const A param = static_cast<A>(p.act_param);
  walk<V, CL, U>(plan, work, [&](int64_t (&at)[U], unsigned (&mask)[U], int slot) {
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
#pragma unroll(kTurns ? 1 : U)
    for (int turn = 0; turn < U; ++turn) {
      const int k = kTurns ? 0 : turn;
      A dz[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int lane = Lanes == 1 ? 0 : j;
        dz[j] = gradient<Simple>(p, in, k, j, false, lanes, param);
        const bool wanted = CL ? mask[k] != 0u : (mask[k] >> j & 1u) != 0u;
        const A product = dz[j] * (to_acc(in.x[k].v[j]) - lanes.mean[lane]);
        sums[lane].merge({wanted ? dz[j] : A(0), wanted ? product : A(0)});
      }
      const Pack<T, V> rounded = make_pack<T, V>(dz);
      if (dresidual != nullptr) store_pack<CL>(dresidual, at[k], mask[k], rounded);
      if (mask[k] != 0u) {
        const int place = slot + turn * work.slot_step;
        if (kept_dz != nullptr) kept_dz[place] = rounded;
        if (kept_x != nullptr) kept_x[place] = in.x[k];
      }
      if (dx != nullptr) {
#pragma unroll
        for (int j = 0; j < V; ++j) dz[j] *= lanes.scale[Lanes == 1 ? 0 : j];
        store_pack<CL>(dx, at[k], mask[k], make_pack<T, V>(dz));
      }
      if constexpr (kTurns) next_turn(at), next_turn(mask), in.next_turn();
    }
  });
}

// dx from the merged sums. dz is read from kept_dz or dresidual, or computed again.
template <class T, int V, bool CL, bool Simple, class Params, class A, int Lanes>
__device__ __forceinline__ void apply_backward(const Params& p, const Plan& plan, const Work& work,
                                               const BackwardLanes<A, Lanes>& lanes,
                                               const Pack<T, V>* kept_x,
                                               const Pack<T, V>* kept_dz) {
  constexpr int U = kBackwardUnroll;
  constexpr bool kTurns = kTakeTurns<V, Simple>;
  const bool ready = plan.reads_dz && (kept_dz != nullptr || p.dresidual != nullptr);
  const T* x = static_cast<const T*>(p.x);
  const T* dout = static_cast<const T*>(ready && p.dresidual != nullptr ? p.dresidual : p.dout);
  const T* saved = ready || p.z_source == ZSource::input ? nullptr : static_cast<const T*>(p.saved);
  T* dx = static_cast<T*>(p.dx);
  const A param = static_cast<A>(p.act_param);
  walk<V, CL, U>(plan, work, [&](int64_t (&at)[U], unsigned (&mask)[U], int slot) {
    Inputs<T, V, U> in;
#pragma unroll
    for (int k = 0; k < U; ++k) {
      if (kept_dz == nullptr) {
        in.dout[k] = load_pack<T, V, CL>(dout, at[k], mask[k], plan.size);
      } else if (mask[k] != 0u) {
        in.dout[k] = kept_dz[slot + k * work.slot_step];
      }
      if (kept_x == nullptr) {
        in.x[k] = load_pack<T, V, CL>(x, at[k], mask[k], plan.size);
      } else if (mask[k] != 0u) {
        in.x[k] = kept_x[slot + k * work.slot_step];
      }
    }
    if (saved != nullptr) {
#pragma unroll
      for (int k = 0; k < U; ++k)
        in.saved[k] = load_pack<T, V, CL>(saved, at[k], mask[k], plan.size);
    }
#pragma unroll(kTurns ? 1 : U)
    for (int turn = 0; turn < U; ++turn) {
      const int k = kTurns ? 0 : turn;
      A result[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int lane = Lanes == 1 ? 0 : j;
        const A dz = gradient<Simple>(p, in, k, j, ready, lanes, param);
        const A centred = to_acc(in.x[k].v[j]) - lanes.mean[lane];
        result[j] = dz * lanes.scale[lane] - lanes.shift[lane] - centred * lanes.slope[lane];
      }
      store_pack<CL>(dx, at[k], mask[k], make_pack<T, V>(result));
      if constexpr (kTurns) next_turn(at), next_turn(mask), in.next_turn();
    }
  });
}

}  // namespace advdl_ops::cuda
