// What the two paths of layer norm 2d share on CUDA: the plan of a launch, and arithmetic on the values of a thread.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/group_norm.h"
#include "norm_passes.h"
#include "norm_paths.h"

namespace advdl_ops::cuda {

// Blocks of a launch, more than run at a time. In backward each has a row of sums in the workspace.
inline constexpr int64_t kBlocks = 8 * kMultiprocessors;
// Positions for which a backward block is worth its row of sums.
inline constexpr int64_t kBlockPositions = 16;

// Packs of each tensor that a thread works on at a time, limited by registers.
template <int V, bool Simple>
ADVDL_HOST_DEVICE constexpr int forward_unroll() {
  return V == 1 ? 4 : (Simple ? 16 : 8) / V;
}

struct PositionPlan {
  int64_t positions = 0;       // N * S
  int64_t row = 1, packs = 1;  // tiles: S and its number of packs; 1 for a long row of channels
  int64_t rounds = 0;          // rows: groups of rows that a block takes at a time
  int64_t tiles = 0;
  int64_t blocks = 1;
  int channels = 0;
  int team = 1, columns = 1;
  int threads = kWarp;
  bool keeps = false;        // tiles: what was read stays in shared memory; else it is read again
  bool shared_sums = false;  // tiles: a block's sums for dweight and dbias are in shared memory
};

template <class From, int N, class A>
__device__ __forceinline__ void copy_params(const void* pointer, int count, const int (&index)[N],
                                            A (&out)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k)
    out[k] =
        static_cast<A>(to_acc(static_cast<const From*>(pointer)[index[k] < count ? index[k] : 0]));
}

// Several elements of a per-channel parameter, or `otherwise` if it is null. For an index past its end, the value is
// arbitrary.
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

// values[i] = function(values[i]), with only one or two copies of the (large) code of `function`. Registers cannot be
// indexed, so the loop rotates the array.
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

// z becomes act(z).
template <bool Simple, int N, class A>
__device__ __forceinline__ void activate_values(Activation act, A param, A (&z)[N]) {
  if constexpr (Simple) {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = apply_activation<true>(act, z[i], param);
  } else {
    map_in_turn(z, [&](A value) { return activate(act, value, param); });
  }
}

// z becomes act'(z).
template <bool Simple, int N, class A>
__device__ __forceinline__ void activate_grad_values(Activation act, A param, A (&z)[N]) {
  if constexpr (Simple) {
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = apply_activation_grad<true>(act, z[i], param);
  } else {
    map_in_turn(z, [&](A value) { return activate_grad(act, value, param); });
  }
}

// The pack at `at`, or zeros if it is not wanted.
template <class T, int V>
__device__ __forceinline__ Pack<T, V> load_whole(const T* base, int64_t at, bool wanted) {
  return load_pack<T, V, true>(base, at, wanted, 0);
}

// Pack k of the values, rounded to T. store_values also writes it.
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

// The inputs of dz: the packs of U places.
template <class T, int V, int U>
struct PositionInputs {
  Pack<T, V> x[U], dout[U], saved[U];

  __device__ __forceinline__ void load(const GroupNormBackward& p, int k, int64_t at, bool wanted) {
    x[k] = load_whole<T, V>(static_cast<const T*>(p.x), at, wanted);
    dout[k] = load_whole<T, V>(static_cast<const T*>(p.dout), at, wanted);
    if (p.z_source != ZSource::input)
      saved[k] = load_whole<T, V>(static_cast<const T*>(p.saved), at, wanted);
  }
  // z of element j of pack k, given the output `norm` of the normalization.
  template <class A>
  __device__ __forceinline__ A z(const GroupNormBackward& p, int k, int j, A norm) const {
    if (p.z_source == ZSource::output) return to_acc(saved[k].v[j]);
    return p.z_source == ZSource::residual ? norm + to_acc(saved[k].v[j]) : norm;
  }
};

// ---- host ----

inline bool channels_side_by_side(const GroupNormShape& s) {
  return s.layout == Layout::channels_last || s.s == 1;
}

// The most blocks of a backward launch.
inline int64_t backward_blocks(const GroupNormShape& s) {
  const int64_t positions = s.n * s.s;
  return std::clamp(positions / kBlockPositions, std::min(positions, kMultiprocessors), kBlocks);
}

inline PositionPlan base_plan(const GroupNormShape& s) {
  PositionPlan plan;
  plan.positions = s.n * s.s;
  plan.channels = static_cast<int>(s.c);
  return plan;
}

// ---- the two paths ----

// A block's sums of dz and dz * xhat, one row of the workspace for each block.
template <class A>
struct LayerNorm2dPartials {
  A* values;
  LayerNorm2dPartials(const GroupNormShape& s, Arena& arena)
      : values(arena.take<A>(2 * backward_blocks(s) * s.c)) {}
};

// layer_norm_2d_rows.cu: a team of threads holds the channels of a position in registers.
bool layer_norm_2d_takes_rows(const GroupNormShape& s, bool aligned);
void layer_norm_2d_rows(const GroupNormForward& p, bool aligned, void* stream);
// Returns the number of blocks, which is the number of rows of sums in `partials`.
int64_t layer_norm_2d_rows_backward(const GroupNormBackward& p, bool aligned, void* partials,
                                    void* stream);

// layer_norm_2d_tiles.cu: a block holds the channels of neighbouring positions in shared memory.
void layer_norm_2d_tiles(const GroupNormForward& p, bool aligned, void* stream);
int64_t layer_norm_2d_tiles_backward(const GroupNormBackward& p, bool aligned, void* partials,
                                     void* stream);

}  // namespace advdl_ops::cuda
