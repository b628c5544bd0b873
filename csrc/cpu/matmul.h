// Matrix products inside other kernels: a few rows times a panel of columns, with the sums of the tile in registers.
//
// A panel is kPanelVectors vectors of columns wide. In a packed panel, its rows (the depth) follow each other. A tile
// of kTileRows rows by one panel is summed over the whole depth in a fixed order, so that no result depends on the
// number of threads.
#pragma once

#include "simd.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

inline constexpr int kPanelVectors = 4;
template <class A>
inline constexpr int64_t kPanel = kPanelVectors * Simd<A>::lanes;  // columns
// The most that leave registers for one row of the panel and a factor.
inline constexpr int kTileRows = ADVDL_VECTOR_BYTES == 64 ? 6 : 3;

// Longer sums are split into parts of this depth, because rounding errors grow with the square root of the length.
inline constexpr int64_t kDepth = 256;

// sum[row][vector] += row[i][(first + k) * step] * b[k][vector], k < depth.
template <int kRows, int kVectors, class A, class Vec>
ADVDL_INLINE void add_products(const A* const (&row)[kRows], int64_t first, int64_t step,
                               const A* b, int64_t b_stride, int64_t depth,
                               Vec (&sum)[kRows][kVectors]) {
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    Vec columns[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) columns[j] = load(b + j * Simd<A>::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec factor = broadcast(row[i][(first + k) * step]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] += factor * columns[j];
    }
  }
}

// tile[kRows][panel] = a[kRows][depth] * b[depth][panel], or += if `adds`. The elements of a row of `a` are kStep apart
// and begin at `first`; rows of b and of the tile are b_stride and tile_stride apart.
template <int kRows, int kStep, class A>
__attribute__((noinline)) void multiply_rows(const A* const* a, int64_t first, const A* b,
                                             int64_t b_stride, int64_t depth, A* tile,
                                             int64_t tile_stride, bool adds) {
  constexpr int64_t lanes = Simd<A>::lanes;
  using Vec = typename Simd<A>::Vec;
  Vec sum[kRows][kPanelVectors];
  const A* row[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    row[i] = a[i] + first * kStep;
#pragma GCC unroll 4
    for (int j = 0; j < kPanelVectors; ++j) sum[i][j] = Vec{};
  }
  add_products(row, 0, kStep, b, b_stride, depth, sum);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kPanelVectors; ++j) {
      A* to = tile + i * tile_stride + j * lanes;
      store(to, adds ? load(to) + sum[i][j] : sum[i][j]);
    }
  }
}

// The same for a number of rows known only at run time, from 1 to kMost.
template <int kMost, int kStep, class A>
void multiply_at_most(int64_t rows, const A* const* a, int64_t first, const A* b, int64_t b_stride,
                      int64_t depth, A* tile, int64_t tile_stride, bool adds) {
  if (kMost == 1 || rows == kMost)
    multiply_rows<kMost, kStep>(a, first, b, b_stride, depth, tile, tile_stride, adds);
  else if constexpr (kMost > 1)
    multiply_at_most<kMost - 1, kStep>(rows, a, first, b, b_stride, depth, tile, tile_stride, adds);
}

// The same for any depth.
template <int kStep, class A>
void multiply_tile(int64_t rows, const A* const* a, const A* b, int64_t b_stride, int64_t depth,
                   A* tile, int64_t tile_stride, bool adds = true) {
  for (int64_t first = 0; first < depth; first += kDepth, adds = true) {
    const int64_t length = min_of(kDepth, depth - first);
    const A* columns = b + first * b_stride;
    multiply_at_most<kTileRows, kStep>(rows, a, first, columns, b_stride, length, tile, tile_stride,
                                       adds);
  }
}

// Columns of multiply_in_parts: as many as leave registers for a second sum of each.
inline constexpr int kPartVectors = ADVDL_VECTOR_BYTES == 64 ? 2 : kPanelVectors;

// As multiply_rows, with the depth summed in parts of kPart, each for itself, and the columns of kPartVectors vectors.
template <int kRows, int64_t kPart, class A>
__attribute__((noinline)) void multiply_rows_in_parts(const A* const* a, int64_t step, const A* b,
                                                      int64_t b_stride, int64_t depth, A* tile,
                                                      int64_t tile_stride, bool adds) {
  constexpr int64_t lanes = Simd<A>::lanes;
  using Vec = typename Simd<A>::Vec;
  Vec total[kRows][kPartVectors];
  const A* row[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    row[i] = a[i];
#pragma GCC unroll 4
    for (int j = 0; j < kPartVectors; ++j) total[i][j] = Vec{};
  }
  for (int64_t first = 0; first < depth; first += kPart) {
    Vec sum[kRows][kPartVectors] = {};
    const int64_t count = min_of(kPart, depth - first);
    add_products(row, first, step, b + first * b_stride, b_stride, count, sum);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kPartVectors; ++j) total[i][j] += sum[i][j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kPartVectors; ++j) {
      A* to = tile + i * tile_stride + j * lanes;
      store(to, adds ? load(to) + total[i][j] : total[i][j]);
    }
  }
}

// tile[rows][panel] = a[rows][depth] * b[depth][panel], or += if `adds`, for 1 to kTileRows rows. Elements of a row of
// `a` are `step` apart.
template <int64_t kPart, int kMost = kTileRows, class A>
void multiply_in_parts(int64_t rows, const A* const* a, int64_t step, const A* b, int64_t b_stride,
                       int64_t depth, A* tile, int64_t tile_stride, bool adds) {
  if (kMost == 1 || rows == kMost) {
    for (int64_t j = 0; j < kPanel<A>; j += kPartVectors * Simd<A>::lanes)
      multiply_rows_in_parts<kMost, kPart>(a, step, b + j, b_stride, depth, tile + j, tile_stride,
                                           adds);
  } else if constexpr (kMost > 1) {
    multiply_in_parts<kPart, kMost - 1>(rows, a, step, b, b_stride, depth, tile, tile_stride, adds);
  }
}

// Calls f(lanes) with all lanes, or with the first `count` if fewer are left. Does not call it if count <= 0.
template <class A, class F>
ADVDL_INLINE void with_lanes(int64_t count, F&& f) {
  if (count >= Simd<A>::lanes) {
    f(FullLanes{});
  } else if (count > 0) {
    f(PartialLanes{static_cast<int32_t>(count)});
  }
}

// The rows of a matrix [rows][depth] that become the columns of a panel: one run of neighbouring rows for each vector.
struct RowRuns {
  int64_t first;      // row of the first run
  int64_t stride;     // rows from one run to the next
  int64_t available;  // rows that exist from the first run on
  int64_t taken;      // by how many that decreases from one run to the next
  int64_t count(int64_t run, int64_t lanes) const {
    return max_of(0, min_of(lanes, available - run * taken));
  }
};

// Packs such rows into a panel [depth][panel], padded with zeros.
template <class A, class T>
void pack_rows(const T* matrix, const RowRuns& runs, int64_t depth, A* panel) {
  constexpr int64_t lanes = Simd<A>::lanes;
  using Vec = typename Simd<A>::Vec;
  for (int64_t run = 0; run < kPanelVectors; ++run) {
    const int64_t count = runs.count(run, lanes);
    const T* first = matrix + (runs.first + run * runs.stride) * depth;
    A* column = panel + run * lanes;
    for_vectors<A, 1, false>(depth, [&](int64_t k, auto part, auto) {
      Vec block[lanes] = {};
      if (count == lanes) {
        for (int64_t i = 0; i < lanes; ++i) block[i] = part.read(first + i * depth + k);
      } else {
        for (int64_t i = 0; i < count; ++i) block[i] = part.read(first + i * depth + k);
      }
      transpose<decltype(block[0] < block[0])>(block);
      for (int64_t i = 0; i < part.count(lanes); ++i) store(column + (k + i) * kPanel<A>, block[i]);
    });
  }
}

// tile[rows][panel] += a[rows][depth] times such rows, read from the matrix itself without packing.
template <class A, class T>
void multiply_runs(int64_t rows, const A* const* a, const T* matrix, const RowRuns& runs,
                   int64_t depth, A* tile) {
  constexpr int64_t lanes = Simd<A>::lanes;
  for (int64_t lane = 0; lane < runs.count(0, lanes); ++lane) {
    const T* row[kPanelVectors];
    int64_t present = 0;
    for (; present < kPanelVectors && lane < runs.count(present, lanes); ++present)
      row[present] = matrix + (runs.first + present * runs.stride + lane) * depth;
    for (int64_t run = present; run < kPanelVectors; ++run) row[run] = row[0];
    for (int64_t i = 0; i < rows; ++i) {
      typename Simd<A>::Vec products[kPanelVectors] = {};
      for_vectors<A, 1, false>(depth, [&](int64_t k, auto part, auto) {
        const auto factor = part.read(a[i] + k);
#pragma GCC unroll 4
        for (int64_t run = 0; run < kPanelVectors; ++run)
          products[run] += factor * part.read(row[run] + k);
      });
      for (int64_t run = 0; run < present; ++run)
        tile[i * kPanel<A> + run * lanes + lane] += static_cast<A>(lane_sum(products[run]));
    }
  }
}

// tile[rows][panel] += a[rows][depth] times the first columns of a matrix with `depth` rows, `stride` apart, without
// packing.
template <class A, class T>
void multiply_columns(int64_t rows, const A* const* a, const T* matrix, int64_t stride,
                      int64_t columns, int64_t depth, A* tile) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const auto add = [&](const A* factors, A* sums, int64_t vectors, auto part) {
    typename Simd<A>::Vec sum[kPanelVectors];
    for (int64_t v = 0; v < vectors; ++v) sum[v] = load(sums + v * lanes);
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t v = 0; v < vectors; ++v)
        sum[v] +=
            factors[k] * part.read(matrix + k * stride + (sums - tile) % kPanel<A> + v * lanes);
    }
    for (int64_t v = 0; v < vectors; ++v) store(sums + v * lanes, sum[v]);
  };
  for (int64_t i = 0; i < rows; ++i) {
    if (columns >= kPanel<A>) {
      add(a[i], tile + i * kPanel<A>, kPanelVectors, FullLanes{});
      continue;
    }
    for (int64_t j = 0; j < columns; j += lanes)
      with_lanes<A>(columns - j, [&](auto part) { add(a[i], tile + i * kPanel<A> + j, 1, part); });
  }
}

// Packs the first `columns` values of row(0), row(1), ... into a panel [depth][panel], padded with zeros.
template <class A, class Row>
ADVDL_INLINE void pack_columns(int64_t columns, int64_t depth, A* panel, Row&& row) {
  constexpr int64_t lanes = Simd<A>::lanes;
  for (int64_t k = 0; k < depth; ++k, panel += kPanel<A>) {
    const auto* values = row(k);
    if (columns == kPanel<A>) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < kPanelVectors; ++v)
        store(panel + v * lanes, load(values + v * lanes));
      continue;
    }
    for (int64_t v = 0; v < kPanelVectors; ++v) {
      store(panel + v * lanes, typename Simd<A>::Vec{});
      with_lanes<A>(columns - v * lanes,
                    [&](auto part) { store(panel + v * lanes, part.read(values + v * lanes)); });
    }
  }
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
