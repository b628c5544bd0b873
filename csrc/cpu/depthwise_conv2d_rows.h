// Rows of outputs of a depthwise convolution in channels_last: vectors run along the channels, so every weight is a vector
// of its own. A row of outputs is a sum over taps of rows of inputs, each shifted and weighted; that holds for forward
// and for the gradient of the input.
#pragma once

#include "depthwise_conv2d.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

// Whether filters of 3, 5 and 7 have loops of their own; fp64 and 16-byte vectors have too few registers or users for them.
template <class T>
inline constexpr bool kHasRuns = ADVDL_VECTOR_BYTES >= 32 && sizeof(T) < 8;
// Whether there are registers for the sums of two rows of outputs.
inline constexpr bool kHasPairs = ADVDL_VECTOR_BYTES == 64;

// Columns that lie a multiple of this apart are in two of the 64 sets of the L1 cache.
constexpr int64_t kSharedSetsBytes = 2048;

// begin <= i < end.
struct Range {
  int64_t begin, end;
};

// Columns of output that a tap reaches: 0 <= j * step + column < size.
ADVDL_INLINE Range reached(int64_t column, int64_t step, int64_t size, int64_t count) {
  const int64_t begin = ceil_div(-column, step), end = floor_div(size - 1 - column, step) + 1;
  return {begin > 0 ? begin : 0, end < count ? end : count};
}

// A tap of one row of outputs.
struct Tap {
  int64_t from;    // element of the input at output column 0 (may lie outside), channel 0
  int64_t weight;  // which of the weights
  Range columns;   // the outputs that it reaches
};

// What two have in common, at an end of `b` where that is nothing.
ADVDL_INLINE Range common(const Range& a, const Range& b) {
  const int64_t begin = min_of(max_of(a.begin, b.begin), b.end);
  return {begin, max_of(min_of(a.end, b.end), begin)};
}

template <class T>
struct Row {
  const T* in = nullptr;             // elements of channels that lie together: c of them
  const acc_t<T>* weight = nullptr;  // [taps, weight_step], from the first of the c channels on
  int64_t c = 0, weight_step = 0;    // weight_step: elements between the weights of taps
  // Elements between the inputs of neighbouring outputs, and of neighbouring taps of a run.
  int64_t in_step = 0, tap_step = 0;
  int64_t out = 0,
          out_step = 0;  // element of the output at column 0, and elements between its columns
  int64_t in_columns = 0, out_columns = 0;
  // The taps come in runs of this many, which read neighbouring columns in ascending order, and outputs are `run_step`
  // (1 or 2) of these columns apart. run = 1: no such runs.
  int64_t run = 1, run_step = 1;
  int64_t first_column = 0;  // with runs: the input column that the first tap reads for output 0
  const Tap* taps = nullptr;
  int64_t tap_count = 0;
  int64_t own_taps =
      0;  // of the first of two rows: taps before the inputs that the second reads too
  // Rows of the input to prefetch for the next rows of outputs: how many, the element that output column 0 reads of the
  // first, elements between rows.
  int64_t next_rows = 0, next = 0, next_step = 0;
  bool descends = false;  // from the last channels to the first
  Range inside{};         // what every tap reaches
};

// Computes kCount outputs of kRows rows from column j on, for kVectors vectors of channels from c on. The taps come in runs
// of kRun neighbours and the outputs are kStep input columns apart, so each vector of input is read once for all products
// of a run, of both rows if these share it (see Row::own_taps). The first `missing_left` and the last `missing_right` input
// columns are outside the image, fewer than kRun each.
template <int kRows, int kCount, int kVectors, int kRun, int kStep, class T, class Lanes>
ADVDL_INLINE void correlate_columns(const Row<T>* rows, const Epilogue<T>& epilogue, int64_t j,
                                    int64_t c, int64_t missing_left, int64_t missing_right,
                                    const Lanes& lanes) {
  using Vec = typename Epilogue<T>::Vec;
  constexpr int inputs = (kCount - 1) * kStep + kRun;
  constexpr int64_t width = Simd<acc_t<T>>::lanes;
  const Row<T>& row = rows[0];
  Vec sums[kRows][kVectors][kCount] = {};
  const int64_t step = kRun == 1 ? row.in_step : row.tap_step;
  const T* start = row.in + j * row.in_step + c;
  // One run of taps of each of the rows kFirst to kLast, which read the same inputs.
  const auto add = [&]<int kFirst, int kLast>(Index<kFirst>, Index<kLast>, const Tap* const* taps) {
    constexpr int some = kLast - kFirst + 1;
    Vec weights[some][kVectors][kRun];
#pragma GCC unroll 2
    for (int q = 0; q < some; ++q) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
        for (int b = 0; b < kRun; ++b)
          weights[q][v][b] =
              lanes.read(row.weight + taps[kFirst + q][b].weight * row.weight_step + c + v * width);
      }
    }
    const T* in = start + taps[kFirst]->from;
#pragma GCC unroll 32
    for (int i = 0; i < inputs; ++i) {
      if (i < kRun - 1 && i < missing_left) continue;
      if (inputs - i < kRun && inputs - 1 - i < missing_right) continue;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const Vec x = lanes.read(in + i * step + v * width);
#pragma GCC unroll 2
        for (int q = 0; q < some; ++q) {
#pragma GCC unroll 8
          for (int b = 0; b < kRun; ++b) {
            const int k = (i - b) / kStep;
            if (i >= b && (i - b) % kStep == 0 && k < kCount)
              sums[kFirst + q][v][k] += x * weights[q][v][b];
          }
        }
      }
    }
  };
  const Tap* taps[kRows];
  for (int q = 0; q < kRows; ++q) taps[q] = rows[q].taps;
  const Tap* const end = taps[0] + row.tap_count;
  if constexpr (kRows == 1) {
    for (; taps[0] < end; taps[0] += kRun) add(Index<0>{}, Index<0>{}, taps);
  } else {
    const Tap* const last = taps[kRows - 1] + rows[kRows - 1].tap_count;
    for (const Tap* shared = taps[0] + row.own_taps; taps[0] < shared; taps[0] += kRun)
      add(Index<0>{}, Index<0>{}, taps);
    for (; taps[0] < end; taps[0] += kRun, taps[kRows - 1] += kRun)
      add(Index<0>{}, Index<kRows - 1>{}, taps);
    for (; taps[kRows - 1] < last; taps[kRows - 1] += kRun)
      add(Index<kRows - 1>{}, Index<kRows - 1>{}, taps);
  }
  for (int64_t next = 0; next < row.next_rows; ++next) {
    const T* ahead = start + row.next + next * row.next_step;
#pragma GCC unroll 16
    for (int i = 0; i < kCount * kStep; ++i) {
      for (int v = 0; v < kVectors; ++v) prefetch(ahead + i * step + v * width);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = c + v * width;
#pragma GCC unroll 2
    for (int q = 0; q < kRows; ++q) {
      epilogue.template finish<kCount>(sums[q][v], lanes.read(epilogue.scale + at),
                                       lanes.read(epilogue.shift + at),
                                       rows[q].out + j * row.out_step + at, row.out_step, lanes);
    }
  }
}

// Computes the columns `all` in blocks of kCount. The last block may overlap the one before. The loop over
// channels is inside the one over blocks, so that memory is read in order, which the prefetchers follow.
template <int kRows, int kCount, int kVectors, int kRun, int kStep, class T>
void correlate_blocks(const Row<T>* rows, const Epilogue<T>& epilogue, Range all) {
  constexpr int64_t width = Simd<acc_t<T>>::lanes;
  const Row<T>& row = rows[0];
  for (int64_t next = all.begin; next < all.end; next += kCount) {
    const int64_t j = min_of(next, all.end - kCount);
    int64_t left = 0, right = 0;
    if constexpr (kRun > 1) {
      const int64_t column = j * kStep + row.first_column;
      left = -column;
      right = column + (kCount - 1) * kStep + kRun - row.in_columns;
    }
    if (row.c < width) {
      const PartialLanes part{static_cast<int32_t>(row.c)};
      correlate_columns<kRows, kCount, 1, kRun, kStep>(rows, epilogue, j, 0, left, right, part);
      continue;
    }
    const int64_t groups = row.c / (kVectors * width), rest = row.c - groups * kVectors * width;
    const int64_t count = groups + ceil_div(rest, width);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t group = row.descends ? count - 1 - k : k;
      if (group < groups) {
        correlate_columns<kRows, kCount, kVectors, kRun, kStep>(
            rows, epilogue, j, group * kVectors * width, left, right, FullLanes{});
      } else {  // the last vector may overlap the one before
        const int64_t at = groups * (kVectors - 1) * width + group * width;
        correlate_columns<kRows, kCount, 1, kRun, kStep>(
            rows, epilogue, j, min_of(at, row.c - width), left, right, FullLanes{});
      }
    }
  }
}

// Computes the columns `all` in blocks of about equal size.
template <int kRows, int kVectors, int kRun, int kStep, class T>
void correlate_columns_of(const Row<T>* rows, const Epilogue<T>& epilogue, Range all) {
  constexpr int most = ADVDL_VECTOR_BYTES == 64 ? 8 : 8 / kVectors / kRows;
  const int64_t count = all.end - all.begin;
  if (count <= 0) return;
  const int64_t wanted = ceil_div(count, ceil_div(count, most));
  if constexpr (most == 8) {
    if (wanted > 7) return correlate_blocks<kRows, 8, kVectors, kRun, kStep>(rows, epilogue, all);
    if (wanted > 4 && count >= 7)
      return correlate_blocks<kRows, 7, kVectors, kRun, kStep>(rows, epilogue, all);
  }
  if (wanted > 2 && count >= 4)
    return correlate_blocks<kRows, 4, kVectors, kRun, kStep>(rows, epilogue, all);
  correlate_blocks<kRows, 1, kVectors, kRun, kStep>(rows, epilogue, all);
}

// Output j near a border: only the taps that reach it. kCount vectors of channels, to keep as many sums in flight.
template <int kCount, class T, class Lanes>
ADVDL_INLINE void correlate_border(const Row<T>& row, const Epilogue<T>& epilogue, int64_t j,
                                   int64_t c, const Lanes& lanes) {
  using Vec = typename Epilogue<T>::Vec;
  constexpr int64_t width = Simd<acc_t<T>>::lanes;
  Vec sums[kCount] = {};
  for (int64_t t = 0; t < row.tap_count; ++t) {
    const Range& columns = row.taps[t].columns;
    if (j < columns.begin || j >= columns.end) continue;
    const acc_t<T>* weight = row.weight + row.taps[t].weight * row.weight_step + c;
    const T* in = row.in + row.taps[t].from + j * row.in_step + c;
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
      sums[k] += lanes.read(in + k * width) * lanes.read(weight + k * width);
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) {
    Vec one[1] = {sums[k]};
    const int64_t at = c + k * width;
    epilogue.template finish<1>(one, lanes.read(epilogue.scale + at),
                                lanes.read(epilogue.shift + at), row.out + j * row.out_step + at, 0,
                                lanes);
  }
}

// A row without runs of taps.
template <class T>
void correlate_taps(const Row<T>& row, const Epilogue<T>& epilogue) {
  using Acc = acc_t<T>;
  constexpr int64_t lanes = Simd<Acc>::lanes;
  const auto border = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      int64_t c = 0;
      for (; c + 4 * lanes <= row.c; c += 4 * lanes) {
        correlate_border<4>(row, epilogue, j, c, FullLanes{});
      }
      for_vectors<Acc, 1>(row.c - c, [&](int64_t i, const auto& policy, auto) {
        correlate_border<1>(row, epilogue, j, c + i, policy);
      });
    }
  };
  border(0, row.inside.begin);
  correlate_columns_of<1, 1, 1, 1>(&row, epilogue, row.inside);
  border(row.inside.end, row.out_columns);
}

// A row of outputs, or two (kRows) with taps in runs of 3. Both have the same columns; the taps of the second, from the first
// on, read the inputs of those that the first has from own_taps on.
template <int kRows, class T>
void correlate_rows(const Row<T>* rows, const Epilogue<T>& epilogue) {
  const Row<T>& row = rows[0];
  const Range all{0, row.out_columns};
  if constexpr (kHasRuns<T>) {
    // Two vectors of channels for runs of 3 of one row: each input is added to three sums in a row, and with one vector
    // these additions would wait for each other. Vectors of half a line of the cache have registers for half of the
    // columns then. With a stride of 2 they take two all the same where a line would be evicted before its second half
    // is read.
    constexpr int vectors = kRows == 1 && kHasPairs ? 2 : 1;
    switch (10 * row.run + row.run_step) {  // see has_run
      case 31:
        return correlate_columns_of<kRows, vectors, 3, 1>(rows, epilogue, all);
      case 32:
        if (kRows == 1 && row.in_step * sizeof(T) % kSharedSetsBytes == 0)
          return correlate_columns_of<1, 2, 3, 2>(rows, epilogue, all);
        return correlate_columns_of<kRows, vectors, 3, 2>(rows, epilogue, all);
    }
    if constexpr (kRows == 1) {
      switch (10 * row.run + row.run_step) {
        case 51:
          return correlate_columns_of<1, 1, 5, 1>(rows, epilogue, all);
        case 52:
          return correlate_columns_of<1, 1, 5, 2>(rows, epilogue, all);
        case 71:
          return correlate_columns_of<1, 1, 7, 1>(rows, epilogue, all);
      }
    }
  }
  if constexpr (kRows == 1) correlate_taps(row, epilogue);
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
