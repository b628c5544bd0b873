// What the forward and the backward pass of the LSTM share: sizes, addresses of rows, zoneout, layer norm statistics.
#pragma once

#include "../common/arena.h"
#include "../common/lstm.h"

#include "dispatch.h"
#include "matmul.h"
#include "simd_math.h"

// Must follow the overloads for vectors: its templates call math::tanh by its qualified name and see only earlier
// declarations.
#include "../common/lstm_gates.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

// A call with fewer rows in total does not pack the weights, because packing would cost as much as the product itself.
inline constexpr int64_t kFewRows = 8;

// Maps the steps of the forward pass to times. In reverse, the first step is the last time.
struct Times {
  const LstmSequences& s;

  ADVDL_INLINE int64_t at(int64_t step) const { return s.reverse ? s.steps - 1 - step : step; }
  // The number of sequences that have the time of a step: 0 before the first step and after the last.
  ADVDL_INLINE int64_t active(int64_t step) const {
    if (step < 0 || step >= s.steps) return 0;
    return s.batch_sizes == nullptr ? s.batch : s.batch_sizes[at(step)];
  }
  // The caller's number of the k-th longest sequence.
  ADVDL_INLINE int64_t number(int64_t k) const { return s.order == nullptr ? k : s.order[k]; }
  int64_t rows() const {
    if (s.batch_sizes == nullptr) return s.steps * s.batch;
    int64_t sum = 0;
    for (int64_t t = 0; t < s.steps; ++t) sum += s.batch_sizes[t];
    return sum;
  }
  // The row of the k-th longest sequence at the time of a step. T is the element type, const if the tensor's pointer
  // is.
  template <class T, class Rows>
  ADVDL_INLINE T* row(const Rows& tensor, int64_t step, int64_t k) const {
    const int64_t t = at(step);
    const int64_t offset = s.starts != nullptr ? (s.starts[t] + k) * tensor.time
                                               : t * tensor.time + number(k) * tensor.batch;
    return static_cast<T*>(tensor.data) + offset;
  }
  // The row of a state `data` [B, size], or null if that is null.
  template <class T>
  ADVDL_INLINE const T* state(const void* data, int64_t size, int64_t k) const {
    return data == nullptr ? nullptr : static_cast<const T*>(data) + number(k) * size;
  }
};

// Sizes in elements. Rows of states are padded to whole vectors, so that they can be read and written without masks.
template <class A>
struct LstmSizes {
  int64_t input, hidden, recurrent, gates;  // I, H, R, 4H
  int64_t units;                            // panels that cover H, with one vector of each gate
  int64_t hidden_row, recurrent_row;        // H and R, rounded up to whole vectors
  int64_t
      gates_row;  // 4H plus a vector: rows with a stride of 4 KB would compete for the same cache sets

  explicit LstmSizes(const LstmShape& shape)
      : input(shape.input),
        hidden(shape.hidden),
        recurrent(shape.recurrent()),
        gates(kLstmGates * shape.hidden),
        units(ceil_div(hidden, Simd<A>::lanes)),
        hidden_row(units * Simd<A>::lanes),
        recurrent_row(round_up(recurrent, Simd<A>::lanes)),
        gates_row(round_up(gates, Simd<A>::lanes) + Simd<A>::lanes) {}
};

// The number of tiles that cover these rows.
inline int64_t tiles_of(int64_t rows) { return ceil_div(rows, kTileRows); }

// Calls f(panel, first row, rows) for all tiles of all panels. A thread goes through the tiles of a panel one after
// another.
template <class A, class F>
void for_tiles(int64_t panels, int64_t rows, int64_t depth, F&& f) {
  const int64_t tiles = tiles_of(rows);
  cpu::parallel_ranges(panels * tiles, depth * kTileRows * kPanelVectors,
                       [&](int64_t begin, int64_t end) {
                         for (int64_t i = begin; i < end; ++i) {
                           const int64_t first = i % tiles * kTileRows;
                           f(i / tiles, first, min_of(kTileRows, rows - first));
                         }
                       });
}

// A vector of a row from element j on, converted to A. A null row is all zeros.
template <class A, class T, class Lanes>
ADVDL_INLINE typename Simd<A>::Vec read_or_zero(const T* row, int64_t j, Lanes part) {
  return row == nullptr ? typename Simd<A>::Vec{} : part.read(row + j);
}

// The factors of the previous state in a zoneout, for the units of a row from j on.
template <class A>
ADVDL_INLINE typename Simd<A>::Vec zoneout_keep(const Times& times, const LstmZoneout& zoneout,
                                                int64_t step, int64_t k, int64_t j, int64_t size) {
  typename Simd<A>::Vec keep = broadcast(static_cast<A>(zoneout.rate));
  if (zoneout.mask.data == nullptr) return keep;
  const uint8_t* row = times.template row<const uint8_t>(zoneout.mask, step, k);
  for (int64_t i = 0; i < Simd<A>::lanes; ++i) keep[i] = j + i < size ? row[j + i] : 0;
  return keep;
}

// The entries of the kernel table. Pass<T> is the class of a pass for the element type T.
template <template <class> class Pass, class Params>
size_t lstm_workspace(const Params& p) {
  size_t bytes = 0;
  with_type(p.shape.dtype, [&]<class T>() { bytes = Pass<T>(p, nullptr).workspace(); });
  return bytes;
}
template <template <class> class Pass, class Params>
void lstm_run(const Params& p, void* workspace) {
  with_type(p.shape.dtype, [&]<class T>() { Pass<T>(p, workspace).run(); });
}

// Mean and 1 / std of a row in two passes. The row has `parts` runs of `size` values, `stride` apart.
template <class A>
struct RowStatistics {
  A mean, rstd;

  RowStatistics(const A* row, int64_t parts, int64_t size, int64_t stride, double eps) {
    const double count = static_cast<double>(parts * size);
    mean = static_cast<A>(sum_of(row, parts, size, stride, [](auto v) { return v; }) / count);
    const auto centre = broadcast(mean);
    const double var =
        sum_of(row, parts, size, stride, [&](auto v) { return (v - centre) * (v - centre); }) /
        count;
    rstd = static_cast<A>(1 / __builtin_sqrt(var + eps));
  }
  template <class Vec>
  ADVDL_INLINE Vec normalized(Vec v) const {
    return (v - mean) * rstd;
  }

 private:
  template <class F>
  static double sum_of(const A* row, int64_t parts, int64_t size, int64_t stride, F&& f) {
    typename Simd<A>::Vec sum{};
    for (int64_t part = 0; part < parts; ++part) {
      for_vectors<A, 1, false>(size, [&](int64_t i, auto lanes, auto) {
        sum += lanes.counted(f(load(row + part * stride + i)));
      });
    }
    return lane_sum(sum);
  }
};

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
