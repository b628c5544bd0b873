// The parts of an LSTM step between its matrix products, and their gradients, on CUDA. Launches and bytes:
// docs/kernels.md.
//
//   units  a thread has a pack of neighbouring units of one sequence, or a single unit
//   rows   with layer norm a block has a sequence. It goes over the row several times, each thread over the same
//          units, and keeps in shared memory what the next pass needs
#include <algorithm>

#include "../common/lstm.h"
#include "../common/lstm_gates.h"
#include "launch.h"
#include "reduce.h"
#include "vec.h"

namespace advdl_ops::cuda {
namespace {

using Forward = LstmStepForward;
using Backward = LstmStepBackward;

constexpr int kUnitThreads = 128;
// The most threads of a row. Packs of 8 need more than 128 registers.
template <int V>
inline constexpr int kRowThreads = V > 4 ? 256 : 512;

// ---- packs of units ----

// V elements in the type of the tensor, zeros until they are loaded. They are not converted at once, so that a thread
// issues all its loads before it waits for the first.
template <class T, int V>
struct Raw {
  static constexpr int kPack = sizeof(T) * V <= kVectorBytes ? V : kVectorBytes / sizeof(T);
  static constexpr int kPacks = V / kPack;
  Pack<T, kPack> packs[kPacks]{};

  __device__ __forceinline__ void load(const void* base, int64_t at) {
    if (base == nullptr) return;
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      packs[k] = load_pack<T, kPack, true>(static_cast<const T*>(base), at + k * kPack, 1u, 0);
  }
  __device__ __forceinline__ void store(void* base, int64_t at) const {
    if (base == nullptr) return;
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      store_pack<true>(static_cast<T*>(base), at + k * kPack, 1u, packs[k]);
  }
  template <class A>
  __device__ __forceinline__ void round(const A (&values)[V]) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      A part[kPack];
#pragma unroll
      for (int j = 0; j < kPack; ++j) part[j] = values[k * kPack + j];
      packs[k] = make_pack<T, kPack>(part);
    }
  }
  __device__ __forceinline__ T element(int j) const { return packs[j / kPack].v[j % kPack]; }
  __device__ __forceinline__ acc_t<T> operator[](int j) const { return to_acc(element(j)); }
};

template <class T, int V, class A>
__device__ __forceinline__ void store_values(void* base, int64_t at, const A (&values)[V]) {
  Raw<T, V> raw;
  raw.round(values);
  raw.store(base, at);
}

template <class T, int V>
__device__ __forceinline__ void store_zeros(void* base, int64_t at) {
  Raw<T, V>{}.store(base, at);
}

template <class Pointer>
__device__ __forceinline__ int64_t offset(const LstmStepRows<Pointer>& rows, int64_t row,
                                          int64_t unit) {
  return row * rows.stride + unit;
}

template <class T, int V>
__device__ __forceinline__ void load_gates(const void* base, int64_t at, int64_t hidden,
                                           Raw<T, V> (&gates)[kLstmGates]) {
#pragma unroll
  for (int gate = 0; gate < kLstmGates; ++gate) gates[gate].load(base, at + gate * hidden);
}

template <class T, int V>
__device__ __forceinline__ void store_zero_gates(const LstmStepRows<void*>& rows, int64_t row,
                                                 int64_t unit, int64_t hidden) {
#pragma unroll
  for (int gate = 0; gate < kLstmGates; ++gate)
    store_zeros<T, V>(rows.data, offset(rows, row, unit) + gate * hidden);
}

template <class A, int V>
__device__ __forceinline__ LstmGates<A> gates_of(const A (&values)[kLstmGates][V], int j) {
  return {values[0][j], values[1][j], values[2][j], values[3][j]};
}

template <class A, int V>
__device__ __forceinline__ void set_gates(const LstmGates<A>& gates, A (&values)[kLstmGates][V],
                                          int j) {
  values[0][j] = gates.i;
  values[1][j] = gates.f;
  values[2][j] = gates.g;
  values[3][j] = gates.o;
}

// The zoneout factor of the previous state.
template <class A, int V>
struct Keep {
  Raw<uint8_t, V> mask;
  A rate = A(0);
  bool masked = false;

  __device__ __forceinline__ void load(const LstmStepRows<const uint8_t*>& rows, double constant,
                                       int64_t row, int64_t unit) {
    masked = rows.data != nullptr;
    rate = static_cast<A>(constant);
    mask.load(rows.data, offset(rows, row, unit));
  }
  __device__ __forceinline__ bool on() const { return masked || rate != A(0); }
  __device__ __forceinline__ A operator[](int j) const {
    return masked ? static_cast<A>(mask.element(j)) : rate;
  }
};

// R, the size of h.
ADVDL_HOST_DEVICE int64_t recurrent(const LstmStep& step) {
  return step.projection > 0 ? step.projection : step.hidden;
}

__device__ __forceinline__ bool has_ended(const LstmStep& step, int64_t row) {
  return step.lengths != nullptr && step.lengths[row] <= step.time;
}

__device__ __forceinline__ bool begins(const Backward& p, int64_t row) {
  return row >= p.begun || (p.begin_at_lengths && p.step.lengths[row] == p.step.time + 1);
}

// ---- forward ----

// The inputs of the new h other than the hidden state.
template <class T, int V>
struct StateInputs {
  using A = acc_t<T>;
  Keep<A, V> keep;
  Raw<T, V> h, mask;

  __device__ __forceinline__ void load(const Forward& p, int64_t row, int64_t unit) {
    const int64_t at = row * recurrent(p.step) + unit;
    keep.load(p.step.zoneout_h_mask, p.step.zoneout_h, row, unit);
    if (keep.on()) h.load(p.h, at);
    mask.load(p.recurrent_mask, at);
  }
};

// Applies zoneout to h and writes h, y and `fed`.
template <class T, int V>
__device__ __forceinline__ void store_state(const Forward& p, int64_t row, int64_t unit,
                                            const StateInputs<T, V>& in, acc_t<T> (&hidden)[V]) {
  if (in.keep.on()) {
#pragma unroll
    for (int j = 0; j < V; ++j) hidden[j] = lstm_zoneout(in.keep[j], in.h[j], hidden[j]);
  }
  const int64_t at = row * recurrent(p.step) + unit;
  Raw<T, V> h;
  h.round(hidden);
  h.store(p.h, at);
  h.store(p.y.data, offset(p.y, row, unit));
  if (p.recurrent_mask == nullptr) return;
  // From the rounded h, because backward has only that.
#pragma unroll
  for (int j = 0; j < V; ++j) hidden[j] = h[j] * in.mask[j];
  store_values<T, V>(p.fed, at, hidden);
}

// The inputs of the pre-activations and of the cell.
template <class T, int V>
struct GateInputs {
  using A = acc_t<T>;
  Raw<T, V> projected[kLstmGates], product[kLstmGates], b_ih[kLstmGates], b_hh[kLstmGates];
  Raw<A, V> c;
  Keep<A, V> keep;

  __device__ __forceinline__ void load(const Forward& p, int64_t row, int64_t unit) {
    const int64_t hidden = p.step.hidden;
    load_gates(p.projected.data, offset(p.projected, row, unit), hidden, projected);
    load_gates(p.product, row * kLstmGates * hidden + unit, hidden, product);
    load_gates(p.b_ih, unit, hidden, b_ih);
    load_gates(p.b_hh, unit, hidden, b_hh);
    c.load(p.c, row * hidden + unit);
    keep.load(p.step.zoneout_c_mask, p.step.zoneout_c, row, unit);
  }
};

// Turns the pre-activations in `gates` into the gates and computes the cell (before zoneout). Writes gates, c and
// cells.
template <class T, int V>
__device__ __forceinline__ void advance_cell(const Forward& p, int64_t row, int64_t unit,
                                             const GateInputs<T, V>& in,
                                             acc_t<T> (&gates)[kLstmGates][V],
                                             acc_t<T> (&cell)[V]) {
  using A = acc_t<T>;
  const int64_t hidden = p.step.hidden;
  A c[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    LstmGates<A> now = gates_of(gates, j);
    lstm_activate(now);
    set_gates(now, gates, j);
    cell[j] = lstm_cell_state(now, in.c[j]);
    c[j] = in.keep.on() ? lstm_zoneout(in.keep[j], in.c[j], cell[j]) : cell[j];
  }
#pragma unroll
  for (int gate = 0; gate < kLstmGates; ++gate)
    store_values<T, V>(p.gates.data, offset(p.gates, row, unit) + gate * hidden, gates[gate]);
  store_values<A, V>(p.c, row * hidden + unit, c);
  store_values<T, V>(p.cells.data, offset(p.cells, row, unit), c);
}

// For a sequence that has ended. The states and the tensors saved for backward are not written.
template <class T, int V>
__device__ __forceinline__ void skip_forward(const Forward& p, int64_t row, int64_t unit) {
  if (p.step.projection > 0) {
    store_zeros<T, V>(p.hidden_out, row * p.step.hidden + unit);
  } else {
    store_zeros<T, V>(p.y.data, offset(p.y, row, unit));
  }
}

// The row and the first unit of a thread. Rows have `width` units.
template <int V>
struct Place {
  int64_t row, unit;

  __device__ __forceinline__ explicit Place(int64_t width) {
    const int64_t packs = width / V;
    const int64_t index = int64_t{blockIdx.x} * kUnitThreads + threadIdx.x;
    row = index / packs;
    unit = (index - row * packs) * V;
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kUnitThreads) lstm_units(const Forward p) {
  using A = acc_t<T>;
  const auto [row, unit] = Place<V>(p.step.hidden);
  if (row >= p.step.rows) return;
  if (has_ended(p.step, row)) return skip_forward<T, V>(p, row, unit);
  GateInputs<T, V> in;
  in.load(p, row, unit);
  StateInputs<T, V> state;
  if (p.step.projection == 0) state.load(p, row, unit);
  A gates[kLstmGates][V], hidden[V];
#pragma unroll
  for (int gate = 0; gate < kLstmGates; ++gate) {
#pragma unroll
    for (int j = 0; j < V; ++j)
      gates[gate][j] =
          in.projected[gate][j] + in.product[gate][j] + in.b_ih[gate][j] + in.b_hh[gate][j];
  }
  advance_cell(p, row, unit, in, gates, hidden);
#pragma unroll
  for (int j = 0; j < V; ++j) hidden[j] = gates[3][j] * math::tanh(hidden[j]);
  if (p.step.projection > 0) {
    store_values<T, V>(p.hidden_out, row * p.step.hidden + unit, hidden);
  } else {
    store_state(p, row, unit, state, hidden);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kUnitThreads)
    lstm_output(const Forward p, const void* projected_h) {
  const int64_t width = recurrent(p.step);
  const auto [row, unit] = Place<V>(width);
  if (row >= p.step.rows) return;
  if (has_ended(p.step, row)) return store_zeros<T, V>(p.y.data, offset(p.y, row, unit));
  Raw<T, V> projected;
  projected.load(projected_h, row * width + unit);
  StateInputs<T, V> state;
  state.load(p, row, unit);
  acc_t<T> hidden[V];
#pragma unroll
  for (int j = 0; j < V; ++j) hidden[j] = projected[j];
  store_state(p, row, unit, state, hidden);
}

// ---- layer norm ----

// Adds N values to `state`: their own mean and squared deviations, then one Chan merge.
template <int N, class A>
__device__ __forceinline__ void merge_values(Moments<A>& state, const A (&values)[N]) {
  A sum = A(0), m2 = A(0);
#pragma unroll
  for (int i = 0; i < N; ++i) sum += values[i];
  const A mean = sum / static_cast<A>(N);
#pragma unroll
  for (int i = 0; i < N; ++i) m2 += (values[i] - mean) * (values[i] - mean);
  state.merge({static_cast<A>(N), mean, m2});
}

template <class A, int V>
__device__ __forceinline__ void merge_gates(Moments<A>& state, const A (&gates)[kLstmGates][V]) {
  A values[kLstmGates * V];
#pragma unroll
  for (int i = 0; i < kLstmGates * V; ++i) values[i] = gates[i / V][i % V];
  merge_values(state, values);
}

template <class A>
struct Normalization {
  A mean, rstd;

  __device__ __forceinline__ Normalization(const Moments<A>& s, double eps)
      : mean(s.mean), rstd(reciprocal_std(s.m2 / s.count, eps)) {}
  __device__ __forceinline__ A operator()(A value) const { return (value - mean) * rstd; }
};

// The block's shared memory: `slots` kept values, then the results of a reduction, then its scratch. The results have
// their own memory: a later reduction writes there only after all threads have read them.
template <class A>
struct RowMemory {
  A* kept;
  unsigned char* reduction;

  static constexpr int kStates = 2;  // the most states of one reduction
  __device__ RowMemory(unsigned char* memory, int64_t slots)
      : kept(reinterpret_cast<A*>(memory)), reduction(memory + slots * sizeof(A)) {}
  static size_t bytes(int64_t slots, int threads) {
    return slots * sizeof(A) + (1 + threads / kWarp) * kStates * sizeof(Moments<A>);
  }
  template <int N, class State>
  __device__ __forceinline__ const State* reduce(State (&states)[N]) const {
    static_assert(N <= kStates && sizeof(State) <= sizeof(Moments<A>));
    auto* result = reinterpret_cast<State*>(reduction);
    block_reduce(states, 1, reinterpret_cast<State*>(reduction + kStates * sizeof(Moments<A>)),
                 result);
    return result;
  }
};

// Calls body(unit) for the first unit of each of this thread's packs.
template <int V, class Body>
__device__ __forceinline__ void walk_row(int64_t hidden, Body body) {
#pragma unroll 1
  for (int64_t unit = int64_t{threadIdx.x} * V; unit < hidden; unit += int64_t{blockDim.x} * V)
    body(unit);
}

template <class T, int V>
__global__ void __launch_bounds__(kRowThreads<V>, 1) lstm_rows(const Forward p) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(bytes);
  const int64_t row = blockIdx.x, hidden = p.step.hidden;
  const RowMemory<A> memory(bytes, 2 * hidden);
  if (has_ended(p.step, row)) {
    walk_row<V>(hidden, [&](int64_t unit) { skip_forward<T, V>(p, row, unit); });
    return;
  }
  Moments<A> product_state[1], cell_state[1];
  walk_row<V>(hidden, [&](int64_t unit) {
    Raw<T, V> product[kLstmGates];
    load_gates(p.product, row * kLstmGates * hidden + unit, hidden, product);
    A values[kLstmGates][V];
#pragma unroll
    for (int gate = 0; gate < kLstmGates; ++gate) {
      product[gate].store(p.products.data, offset(p.products, row, unit) + gate * hidden);
#pragma unroll
      for (int j = 0; j < V; ++j) values[gate][j] = product[gate][j];
    }
    merge_gates(product_state[0], values);
  });
  const Normalization<A> in_product(*memory.reduce(product_state), p.norm.eps);
  walk_row<V>(hidden, [&](int64_t unit) {
    GateInputs<T, V> in;
    in.load(p, row, unit);
    Raw<T, V> weight[kLstmGates], bias[kLstmGates];
    load_gates(p.norm.hh_weight, unit, hidden, weight);
    load_gates(p.norm.hh_bias, unit, hidden, bias);
    A gates[kLstmGates][V], cell[V];
#pragma unroll
    for (int gate = 0; gate < kLstmGates; ++gate) {
#pragma unroll
      for (int j = 0; j < V; ++j)
        gates[gate][j] = in.projected[gate][j] +
                         (in_product(in.product[gate][j]) * weight[gate][j] + bias[gate][j]) +
                         in.b_ih[gate][j] + in.b_hh[gate][j];
    }
    advance_cell(p, row, unit, in, gates, cell);
    merge_values(cell_state[0], cell);
    store_values<A, V>(memory.kept, unit, cell);
    store_values<A, V>(memory.kept, hidden + unit, gates[3]);
  });
  const Normalization<A> in_cell(*memory.reduce(cell_state), p.norm.eps);
  walk_row<V>(hidden, [&](int64_t unit) {
    Raw<T, V> weight, bias;
    weight.load(p.norm.c_weight, unit);
    bias.load(p.norm.c_bias, unit);
    StateInputs<T, V> state;
    if (p.step.projection == 0) state.load(p, row, unit);
    Raw<A, V> cell, o;
    cell.load(memory.kept, unit);
    o.load(memory.kept, hidden + unit);
    A values[V];
#pragma unroll
    for (int j = 0; j < V; ++j)
      values[j] = o[j] * math::tanh(in_cell(cell[j]) * weight[j] + bias[j]);
    if (p.step.projection > 0) {
      store_values<T, V>(p.hidden_out, row * hidden + unit, values);
    } else {
      store_state(p, row, unit, state, values);
    }
  });
}

// ---- backward ----

// The gradient of h (from y, dh and dfed). Writes the part that zoneout passes on to dh, and returns the rest in
// dhidden. For an ended sequence, dh gets all of it and dhidden is zero. Also writes `fed`.
template <class T, int V>
__device__ __forceinline__ void state_gradient(const Backward& p, int64_t row, int64_t unit,
                                               bool ended, acc_t<T> (&dhidden)[V]) {
  using A = acc_t<T>;
  const int64_t at = row * recurrent(p.step) + unit;
  Raw<T, V> dy, dfed, mask, before;
  Raw<A, V> dh;
  Keep<A, V> keep;
  dh.load(p.dh, at);
  dfed.load(p.dfed, at);
  mask.load(p.recurrent_mask, at);
  if (!ended) {
    dy.load(p.dy.data, offset(p.dy, row, unit));
    keep.load(p.step.zoneout_h_mask, p.step.zoneout_h, row, unit);
    if (p.fed.data != nullptr) {
      if (begins(p, row)) {
        before.load(p.h_begin, at);
      } else {
        before.load(p.h_before.data, offset(p.h_before, row, unit));
      }
    }
  }
  A kept[V], fed[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const A factor = p.recurrent_mask != nullptr ? mask[j] : A(1);
    const A gradient = dy[j] + (dh[j] + factor * dfed[j]);
    kept[j] = ended ? gradient : keep[j] * gradient;
    dhidden[j] = ended ? A(0) : (A(1) - keep[j]) * gradient;
    fed[j] = before[j] * factor;
  }
  store_values<A, V>(p.dh, at, kept);
  store_values<T, V>(p.fed.data, offset(p.fed, row, unit), fed);
}

// For a sequence that has ended. Without a projection, dfed is added to dh.
template <class T, int V>
__device__ __forceinline__ void skip_backward(const Backward& p, int64_t row, int64_t unit) {
  const int64_t hidden = p.step.hidden;
  store_zero_gates<T, V>(p.dgates, row, unit, hidden);
  store_zero_gates<T, V>(p.dproducts, row, unit, hidden);
  store_zero_gates<T, V>(p.dhh_weight, row, unit, hidden);
  store_zeros<T, V>(p.hidden_out.data, offset(p.hidden_out, row, unit));
  store_zeros<T, V>(p.dc_weight.data, offset(p.dc_weight, row, unit));
  store_zeros<T, V>(p.dc_bias.data, offset(p.dc_bias, row, unit));
  acc_t<T> nothing[V];
  if (p.dhidden == nullptr) state_gradient<T, V>(p, row, unit, true, nothing);
}

// The inputs of the cell.
template <class T, int V>
struct CellInputs {
  using A = acc_t<T>;
  Raw<T, V> gates[kLstmGates], before;

  __device__ __forceinline__ void load(const Backward& p, int64_t row, int64_t unit) {
    load_gates(p.gates.data, offset(p.gates, row, unit), p.step.hidden, gates);
    if (begins(p, row)) {
      before.load(p.c_begin, row * p.step.hidden + unit);
    } else {
      before.load(p.cells_before.data, offset(p.cells_before, row, unit));
    }
  }
  __device__ __forceinline__ LstmGates<A> at(int j) const {
    return {gates[0][j], gates[1][j], gates[2][j], gates[3][j]};
  }
  __device__ __forceinline__ A cell(int j) const { return lstm_cell_state(at(j), before[j]); }
};

// The gradient of the hidden state: p.dhidden, or without a projection the result of state_gradient.
template <class T, int V>
__device__ __forceinline__ void hidden_gradient(const Backward& p, int64_t row, int64_t unit,
                                                acc_t<T> (&dhidden)[V]) {
  if (p.dhidden == nullptr) return state_gradient<T, V>(p, row, unit, false, dhidden);
  Raw<T, V> given;
  given.load(p.dhidden, row * p.step.hidden + unit);
#pragma unroll
  for (int j = 0; j < V; ++j) dhidden[j] = given[j];
}

// The gradients of the pre-activations, from dhidden, from t (tanh of the cell, normalized or not), and from through_t
// (the gradient of the cell through t). Writes dgates and dc.
template <class T, int V>
__device__ __forceinline__ void gate_gradients(const Backward& p, int64_t row, int64_t unit,
                                               const CellInputs<T, V>& in,
                                               const acc_t<T> (&dhidden)[V], const acc_t<T> (&t)[V],
                                               const acc_t<T> (&through_t)[V],
                                               acc_t<T> (&dgates)[kLstmGates][V]) {
  using A = acc_t<T>;
  const int64_t hidden = p.step.hidden, at = row * hidden + unit;
  Raw<A, V> dc;
  Keep<A, V> keep;
  dc.load(p.dc, at);
  keep.load(p.step.zoneout_c_mask, p.step.zoneout_c, row, unit);
  A before[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    A dcell = (A(1) - keep[j]) * dc[j] + through_t[j];
    set_gates(lstm_gates_backward(in.at(j), in.before[j], t[j], dhidden[j], dcell), dgates, j);
    before[j] = keep[j] * dc[j] + dcell;
  }
  store_values<A, V>(p.dc, at, before);
#pragma unroll
  for (int gate = 0; gate < kLstmGates; ++gate)
    store_values<T, V>(p.dgates.data, offset(p.dgates, row, unit) + gate * hidden, dgates[gate]);
}

template <class T, int V>
__global__ void __launch_bounds__(kUnitThreads) lstm_backward_units(const Backward p) {
  using A = acc_t<T>;
  const auto [row, unit] = Place<V>(p.step.hidden);
  if (row >= p.step.rows) return;
  if (has_ended(p.step, row)) return skip_backward<T, V>(p, row, unit);
  CellInputs<T, V> in;
  in.load(p, row, unit);
  A dhidden[V], t[V], through_t[V], out[V], dgates[kLstmGates][V];
  hidden_gradient<T, V>(p, row, unit, dhidden);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const A o = in.gates[3][j];
    t[j] = math::tanh(in.cell(j));
    through_t[j] = dhidden[j] * o * (A(1) - t[j] * t[j]);
    out[j] = o * t[j];
  }
  gate_gradients(p, row, unit, in, dhidden, t, through_t, dgates);
  store_values<T, V>(p.hidden_out.data, offset(p.hidden_out, row, unit), out);
}

template <class T, int V>
__global__ void __launch_bounds__(kUnitThreads) lstm_backward_output(const Backward p) {
  const int64_t width = recurrent(p.step);
  const auto [row, unit] = Place<V>(width);
  if (row >= p.step.rows) return;
  acc_t<T> dprojected[V];
  state_gradient<T, V>(p, row, unit, has_ended(p.step, row), dprojected);
  store_values<T, V>(p.dprojected, row * width + unit, dprojected);
}

// The input gradient of a layer norm, from the sums of d * weight and of d * weight * xhat over the row.
template <class A>
struct NormalizationGradient {
  A shift, slope, rstd;

  __device__ __forceinline__ NormalizationGradient(const GradientSums<A>& sums, int64_t count,
                                                   A rstd)
      : shift(sums.dz / static_cast<A>(count)),
        slope(sums.dz_x / static_cast<A>(count)),
        rstd(rstd) {}
  __device__ __forceinline__ A operator()(A weighted, A xhat) const {
    return rstd * (weighted - shift - xhat * slope);
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kRowThreads<V>, 1) lstm_backward_rows(const Backward p) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(bytes);
  const int64_t row = blockIdx.x, hidden = p.step.hidden;
  const RowMemory<A> memory(bytes, kLstmGates * hidden);
  if (has_ended(p.step, row)) {
    walk_row<V>(hidden, [&](int64_t unit) { skip_backward<T, V>(p, row, unit); });
    return;
  }
  Moments<A> states[2];  // of the product and of the cell
  walk_row<V>(hidden, [&](int64_t unit) {
    Raw<T, V> product[kLstmGates];
    load_gates(p.products.data, offset(p.products, row, unit), hidden, product);
    CellInputs<T, V> in;
    in.load(p, row, unit);
    A values[kLstmGates][V], cell[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
#pragma unroll
      for (int gate = 0; gate < kLstmGates; ++gate) values[gate][j] = product[gate][j];
      cell[j] = in.cell(j);
    }
    merge_gates(states[0], values);
    merge_values(states[1], cell);
  });
  const Moments<A>* merged = memory.reduce(states);
  const Normalization<A> in_product(merged[0], p.norm.eps), in_cell(merged[1], p.norm.eps);

  // Backward through tanh. Keeps dhidden and t.
  GradientSums<A> cell_sums[1];
  walk_row<V>(hidden, [&](int64_t unit) {
    CellInputs<T, V> in;
    in.load(p, row, unit);
    Raw<T, V> weight, bias;
    weight.load(p.norm.c_weight, unit);
    bias.load(p.norm.c_bias, unit);
    A dhidden[V], t[V], dn[V], product[V], out[V];
    hidden_gradient<T, V>(p, row, unit, dhidden);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const A o = in.gates[3][j], xhat = in_cell(in.cell(j));
      t[j] = math::tanh(xhat * weight[j] + bias[j]);
      dn[j] = dhidden[j] * o * (A(1) - t[j] * t[j]);
      product[j] = dn[j] * xhat;
      cell_sums[0].merge({dn[j] * weight[j], product[j] * weight[j]});
      out[j] = o * t[j];
    }
    store_values<A, V>(memory.kept, unit, dhidden);
    store_values<A, V>(memory.kept, hidden + unit, t);
    store_values<T, V>(p.hidden_out.data, offset(p.hidden_out, row, unit), out);
    store_values<T, V>(p.dc_bias.data, offset(p.dc_bias, row, unit), dn);
    store_values<T, V>(p.dc_weight.data, offset(p.dc_weight, row, unit), product);
  });
  const NormalizationGradient<A> of_cell(*memory.reduce(cell_sums), hidden, in_cell.rstd);

  // Backward through the gates. Keeps their gradients.
  GradientSums<A> product_sums[1];
  walk_row<V>(hidden, [&](int64_t unit) {
    CellInputs<T, V> in;
    in.load(p, row, unit);
    Raw<T, V> c_weight, product[kLstmGates], weight[kLstmGates];
    c_weight.load(p.norm.c_weight, unit);
    load_gates(p.products.data, offset(p.products, row, unit), hidden, product);
    load_gates(p.norm.hh_weight, unit, hidden, weight);
    Raw<A, V> kept_dhidden, kept_t;
    kept_dhidden.load(memory.kept, unit);
    kept_t.load(memory.kept, hidden + unit);
    A dhidden[V], t[V], through_t[V], dgates[kLstmGates][V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      dhidden[j] = kept_dhidden[j];
      t[j] = kept_t[j];
      const A dn = dhidden[j] * A(in.gates[3][j]) * (A(1) - t[j] * t[j]);
      through_t[j] = of_cell(dn * c_weight[j], in_cell(in.cell(j)));
    }
    gate_gradients(p, row, unit, in, dhidden, t, through_t, dgates);
#pragma unroll
    for (int gate = 0; gate < kLstmGates; ++gate) {
      A terms[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        terms[j] = dgates[gate][j] * in_product(product[gate][j]);
        product_sums[0].merge({dgates[gate][j] * weight[gate][j], terms[j] * weight[gate][j]});
      }
      store_values<A, V>(memory.kept, gate * hidden + unit, dgates[gate]);
      store_values<T, V>(p.dhh_weight.data, offset(p.dhh_weight, row, unit) + gate * hidden, terms);
    }
  });
  const NormalizationGradient<A> of_product(*memory.reduce(product_sums), kLstmGates * hidden,
                                            in_product.rstd);
  walk_row<V>(hidden, [&](int64_t unit) {
#pragma unroll
    for (int gate = 0; gate < kLstmGates; ++gate) {
      const int64_t at = gate * hidden + unit;
      Raw<T, V> product, weight;
      product.load(p.products.data, row * p.products.stride + at);
      weight.load(p.norm.hh_weight, at);
      Raw<A, V> dgate;
      dgate.load(memory.kept, at);
      A dproduct[V];
#pragma unroll
      for (int j = 0; j < V; ++j)
        dproduct[j] = of_product(dgate[j] * weight[j], in_product(product[j]));
      store_values<T, V>(p.dproducts.data, row * p.dproducts.stride + at, dproduct);
    }
  });
}

// ---- padding ----

// Strides and `width` count elements of type Unit.
template <class Unit>
__global__ void __launch_bounds__(kUnitThreads) lstm_copy_padded(const LstmPadding p) {
  const int64_t index = int64_t{blockIdx.x} * kUnitThreads + threadIdx.x;
  const int64_t row = index / p.width, unit = index - row * p.width;
  const int64_t sequence = row / p.steps, time = row - sequence * p.steps;
  if (sequence >= p.batch) return;
  Unit value{};
  if (time < p.lengths[sequence])
    value = static_cast<const Unit*>(p.x.data)[time * p.x.time + sequence * p.x.batch + unit];
  static_cast<Unit*>(p.out.data)[time * p.out.time + sequence * p.out.batch + unit] = value;
}

// ---- host ----

// Whether all rows begin at multiples of a pack. Null counts as aligned.
template <class... Rows>
bool rows_aligned(int64_t v, const Rows&... rows) {
  return ((vector_aligned(rows.data) && (rows.data == nullptr || rows.stride % v == 0)) && ...);
}

bool takes_packs(const LstmStep& step, int64_t width) {
  const int64_t v = kVectorBytes / element_bytes(step.dtype);
  const auto mask_aligned = [&](const LstmStepRows<const uint8_t*>& mask) {
    return mask.data == nullptr ||
           (reinterpret_cast<uintptr_t>(mask.data) % v == 0 && mask.stride % v == 0);
  };
  return step.dtype != DType::f64 && width % v == 0 && step.rows * (width / v) >= step.packs_from &&
         mask_aligned(step.zoneout_c_mask) && mask_aligned(step.zoneout_h_mask);
}

bool takes_packs(const Forward& p, int64_t width) {
  const int64_t v = kVectorBytes / element_bytes(p.step.dtype);
  return takes_packs(p.step, width) &&
         vector_aligned(p.norm.hh_weight, p.norm.hh_bias, p.norm.c_weight, p.norm.c_bias, p.product,
                        p.b_ih, p.b_hh, p.c, p.hidden_out, p.recurrent_mask, p.h, p.fed) &&
         rows_aligned(v, p.projected, p.gates, p.cells, p.products, p.y);
}

bool takes_packs(const Backward& p, int64_t width) {
  const int64_t v = kVectorBytes / element_bytes(p.step.dtype);
  return takes_packs(p.step, width) &&
         vector_aligned(p.norm.hh_weight, p.norm.hh_bias, p.norm.c_weight, p.norm.c_bias, p.c_begin,
                        p.h_begin, p.recurrent_mask, p.dfed, p.dh, p.dc, p.dprojected, p.dhidden) &&
         rows_aligned(v, p.gates, p.cells_before, p.products, p.h_before, p.dy, p.dgates,
                      p.dproducts, p.fed, p.hidden_out, p.dhh_weight, p.dc_weight, p.dc_bias);
}

// Calls body<T, V>(). fp64 has no packs.
template <class Body>
void dispatch(DType dtype, bool packs, Body body) {
  const auto typed = [&]<class T>() {
    packs ? body.template operator()<T, kVectorBytes / sizeof(T)>()
          : body.template operator()<T, 1>();
  };
  switch (dtype) {
    case DType::f64:
      return body.template operator()<double, 1>();
    case DType::f16:
      return typed.template operator()<__half>();
    case DType::bf16:
      return typed.template operator()<__nv_bfloat16>();
    default:
      return typed.template operator()<float>();
  }
}

LaunchConfig unit_config(int64_t rows, int64_t packs, void* stream) {
  LaunchConfig config;
  config.grid = divide_up(rows * packs, kUnitThreads);
  config.block = kUnitThreads;
  config.stream = stream;
  return config;
}

// `slots`: values that a block keeps in shared memory.
template <class A, int V>
LaunchConfig row_config(int64_t rows, int64_t hidden, int64_t slots, void* stream) {
  LaunchConfig config;
  config.grid = rows;
  config.block = static_cast<int>(
      std::clamp(power_of_two_above(hidden / V), int64_t{kWarp}, int64_t{kRowThreads<V>}));
  config.shared = RowMemory<A>::bytes(slots, config.block);
  config.stream = stream;
  if (config.shared > shared_memory_limit())
    throw std::runtime_error("lstm: layer norm keeps " + std::to_string(config.shared) +
                             " bytes of a row; a block of this GPU has " +
                             std::to_string(shared_memory_limit()));
  return config;
}

}  // namespace

void lstm_step_forward(const LstmStepForward& p, void* stream) {
  const int64_t rows = p.step.rows, hidden = p.step.hidden;
  if (rows == 0 || hidden == 0) return;
  dispatch(p.step.dtype, takes_packs(p, hidden), [&]<class T, int V>() {
    if (p.norm.on()) {
      launch("lstm_rows", &lstm_rows<T, V>,
             row_config<acc_t<T>, V>(rows, hidden, 2 * hidden, stream), p);
    } else {
      launch("lstm_units", &lstm_units<T, V>, unit_config(rows, hidden / V, stream), p);
    }
  });
}

void lstm_step_output(const LstmStepForward& p, const void* projected_h, void* stream) {
  const int64_t rows = p.step.rows, width = recurrent(p.step);
  if (rows == 0 || width == 0) return;
  dispatch(p.step.dtype, takes_packs(p, width) && vector_aligned(projected_h),
           [&]<class T, int V>() {
             launch("lstm_output", &lstm_output<T, V>, unit_config(rows, width / V, stream), p,
                    projected_h);
           });
}

void lstm_step_backward_output(const LstmStepBackward& p, void* stream) {
  const int64_t rows = p.step.rows, width = recurrent(p.step);
  if (rows == 0 || width == 0) return;
  dispatch(p.step.dtype, takes_packs(p, width), [&]<class T, int V>() {
    launch("lstm_backward_output", &lstm_backward_output<T, V>,
           unit_config(rows, width / V, stream), p);
  });
}

void lstm_step_backward(const LstmStepBackward& p, void* stream) {
  const int64_t rows = p.step.rows, hidden = p.step.hidden;
  if (rows == 0 || hidden == 0) return;
  dispatch(p.step.dtype, takes_packs(p, hidden), [&]<class T, int V>() {
    if (p.norm.on()) {
      launch("lstm_backward_rows", &lstm_backward_rows<T, V>,
             row_config<acc_t<T>, V>(rows, hidden, kLstmGates * hidden, stream), p);
    } else {
      launch("lstm_backward_units", &lstm_backward_units<T, V>,
             unit_config(rows, hidden / V, stream), p);
    }
  });
}

void lstm_without_padding(const LstmPadding& p, void* stream) {
  const int64_t bytes = element_bytes(p.dtype);
  const auto is_pack = [&](int64_t elements) { return elements * bytes % kVectorBytes == 0; };
  const bool packs = vector_aligned(p.x.data, p.out.data) && is_pack(p.width) &&
                     is_pack(p.x.time) && is_pack(p.x.batch) && is_pack(p.out.time) &&
                     is_pack(p.out.batch);
  const int64_t unit = packs ? kVectorBytes : sizeof(uint16_t);
  LstmPadding units = p;
  for (int64_t* size :
       {&units.width, &units.x.time, &units.x.batch, &units.out.time, &units.out.batch})
    *size = *size * bytes / unit;
  if (p.steps * p.batch * p.width == 0) return;
  launch("lstm_copy_padded", packs ? &lstm_copy_padded<uint4> : &lstm_copy_padded<uint16_t>,
         unit_config(p.steps * p.batch, units.width, stream), units);
}

}  // namespace advdl_ops::cuda
