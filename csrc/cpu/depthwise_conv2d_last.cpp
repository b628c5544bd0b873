// Depthwise convolution in channels_last: vectors run along the channels, so every weight is a vector of its own.
//
// A row of outputs is a sum over taps of rows of inputs, each shifted and weighted. Forward and the input's gradient are
// that one loop (`correlate_row`): forward steps through the input by the stride, the gradient through the output, once for
// each column modulo the stride, with the taps that meet it.
#include "depthwise_conv2d.h"
#include "dispatch.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

// Output columns of a block: as many as keep their sums in registers, with kVectors vectors of channels.
template <int kVectors>
inline constexpr int kColumns = ADVDL_VECTOR_BYTES == 64 ? 8 : 8 / kVectors;

// Whether filters of 3, 5 and 7 have loops of their own; fp64 and 16-byte vectors have too few registers or users for them.
template <class T>
inline constexpr bool kHasRuns = ADVDL_VECTOR_BYTES >= 32 && sizeof(T) < 8;

// Columns of output that a tap reaches: 0 <= j * step + column < size.
struct Columns {
  int64_t begin, end;
};
ADVDL_INLINE Columns reached(int64_t column, int64_t step, int64_t size, int64_t count) {
  const int64_t begin = ceil_div(-column, step), end = floor_div(size - 1 - column, step) + 1;
  return {begin > 0 ? begin : 0, end < count ? end : count};
}

// A tap of one row of outputs.
struct Tap {
  int64_t from;     // element of the input at output column 0 (may lie outside), channel 0
  int64_t weight;   // which of the weights
  Columns columns;  // the outputs that it reaches
};

// What two have in common, at an end of `b` where that is nothing.
ADVDL_INLINE Columns common(const Columns& a, const Columns& b) {
  const int64_t begin = min_of(max_of(a.begin, b.begin), b.end);
  return {begin, max_of(min_of(a.end, b.end), begin)};
}

template <class T>
struct Row {
  const T* in = nullptr;             // [.., C]
  const acc_t<T>* weight = nullptr;  // [taps, C]
  int64_t c = 0, in_step = 1, in_columns = 0, out_columns = 0, out_step = 1;
  // The taps come in runs of this many, which read neighbouring columns in ascending order. 1: no such runs.
  int64_t run = 1;
  int64_t first_column =
      0;  // with runs: the input column that the first tap of a run reads for output column 0
  int64_t out = 0;  // element of the output at column 0
  const Tap* taps = nullptr;
  int64_t tap_count = 0;
  // Elements from the input of the last tap to the input that the next row of outputs reads first; 0: no prefetch.
  int64_t ahead = 0;
  Columns inside{};  // what every tap reaches
};

// Computes kCount outputs from column j on, for kVectors vectors of channels from c on. The taps come in runs of kRun
// neighbours and the outputs are kStep input columns apart, so each vector of input is read once for all products of a
// run. The first `missing_left` and the last `missing_right` input columns are outside the image, fewer than kRun each.
template <int kCount, int kVectors, int kRun, int kStep, class T, class Lanes>
ADVDL_INLINE void correlate_columns(const Row<T>& row, const Epilogue<T>& epilogue, int64_t j,
                                    int64_t c, int64_t missing_left, int64_t missing_right,
                                    const Lanes& lanes) {
  using Vec = typename Epilogue<T>::Vec;
  constexpr int inputs = (kCount - 1) * kStep + kRun;
  constexpr int64_t width = Simd<acc_t<T>>::lanes;
  Vec sums[kVectors][kCount] = {};
  const int64_t step = (kRun == 1 ? row.in_step : 1) * row.c;
  const T* start = row.in + j * row.in_step * row.c + c;
  for (int64_t t = 0; t < row.tap_count; t += kRun) {
    Vec weights[kVectors][kRun];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
      for (int b = 0; b < kRun; ++b)
        weights[v][b] = lanes.read(row.weight + row.taps[t + b].weight * row.c + c + v * width);
    }
    const T* in = start + row.taps[t].from;
    if (row.ahead != 0 && t + kRun >= row.tap_count) {
#pragma GCC unroll 16
      for (int i = 0; i < kCount * kStep; ++i) {
        for (int v = 0; v < kVectors; ++v) prefetch(in + i * step + v * width + row.ahead);
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < inputs; ++i) {
      if (i < kRun - 1 && i < missing_left) continue;
      if (inputs - i < kRun && inputs - 1 - i < missing_right) continue;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const Vec x = lanes.read(in + i * step + v * width);
#pragma GCC unroll 8
        for (int b = 0; b < kRun; ++b) {
          const int k = (i - b) / kStep;
          if (i >= b && (i - b) % kStep == 0 && k < kCount) sums[v][k] += x * weights[v][b];
        }
      }
    }
  }
  const int64_t out_step = row.out_step * row.c;
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = c + v * width;
    epilogue.template finish<kCount>(sums[v], lanes.read(epilogue.scale + at),
                                     lanes.read(epilogue.shift + at), row.out + j * out_step + at,
                                     out_step, lanes);
  }
}

// Computes the columns `all` in blocks of kCount. The last block may overlap the one before. The loop over
// channels is inside the one over blocks, so that memory is read in order, which the prefetchers follow.
template <int kCount, int kVectors, int kRun, int kStep, class T>
void correlate_blocks(const Row<T>& row, const Epilogue<T>& epilogue, Columns all) {
  constexpr int64_t width = Simd<acc_t<T>>::lanes;
  for (int64_t next = all.begin; next < all.end; next += kCount) {
    const int64_t j = min_of(next, all.end - kCount);
    int64_t left = 0, right = 0, c = 0;
    if constexpr (kRun > 1) {
      const int64_t column = j * kStep + row.first_column;
      left = -column;
      right = column + (kCount - 1) * kStep + kRun - row.in_columns;
    }
    if constexpr (kVectors > 1) {
      for (; c + kVectors * width <= row.c; c += kVectors * width)
        correlate_columns<kCount, kVectors, kRun, kStep>(row, epilogue, j, c, left, right,
                                                         FullLanes{});
    }
    if (row.c < width) {
      const PartialLanes part{static_cast<int32_t>(row.c)};
      correlate_columns<kCount, 1, kRun, kStep>(row, epilogue, j, 0, left, right, part);
      continue;
    }
    for (; c < row.c; c += width) {  // the last vector may overlap the one before
      const int64_t at = min_of(c, row.c - width);
      correlate_columns<kCount, 1, kRun, kStep>(row, epilogue, j, at, left, right, FullLanes{});
    }
  }
}

// Computes the columns `all` in blocks of about equal size.
template <int kVectors, int kRun, int kStep, class T>
void correlate_columns_of(const Row<T>& row, const Epilogue<T>& epilogue, Columns all) {
  constexpr int most = kColumns<kVectors>;
  const int64_t count = all.end - all.begin;
  if (count <= 0) return;
  const int64_t wanted = ceil_div(count, ceil_div(count, most));
  if constexpr (most == 8) {
    if (wanted > 7) return correlate_blocks<8, kVectors, kRun, kStep>(row, epilogue, all);
    if (wanted > 4 && count >= 7)
      return correlate_blocks<7, kVectors, kRun, kStep>(row, epilogue, all);
  }
  if (wanted > 2 && count >= 4)
    return correlate_blocks<4, kVectors, kRun, kStep>(row, epilogue, all);
  correlate_blocks<1, kVectors, kRun, kStep>(row, epilogue, all);
}

// Output j near a border: only the taps that reach it. kCount vectors of channels, to keep as many sums in flight.
template <int kCount, class T, class Lanes>
ADVDL_INLINE void correlate_border(const Row<T>& row, const Epilogue<T>& epilogue, int64_t j,
                                   int64_t c, const Lanes& lanes) {
  using Vec = typename Epilogue<T>::Vec;
  constexpr int64_t width = Simd<acc_t<T>>::lanes;
  Vec sums[kCount] = {};
  for (int64_t t = 0; t < row.tap_count; ++t) {
    const Columns& reached = row.taps[t].columns;
    if (j < reached.begin || j >= reached.end) continue;
    const acc_t<T>* weight = row.weight + row.taps[t].weight * row.c + c;
    const T* in = row.in + row.taps[t].from + j * row.in_step * row.c + c;
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
                                lanes.read(epilogue.shift + at),
                                row.out + j * row.out_step * row.c + at, 0, lanes);
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
  correlate_columns_of<1, 1, 1>(row, epilogue, row.inside);
  border(row.inside.end, row.out_columns);
}

template <class T>
void correlate_row(const Row<T>& row, const Epilogue<T>& epilogue) {
  if (!kHasRuns<T> || row.run == 1) return correlate_taps(row, epilogue);
  if constexpr (kHasRuns<T>) {
    const Columns all{0, row.out_columns};
    // Two vectors of channels for runs of 3: each input is added to three sums in a row, and with one vector these
    // additions would wait for each other. Vectors of half a cache line have too few registers for two. They take two all
    // the same if columns fall into the same sets of the L1 cache, because a line would be evicted before its second half
    // is read.
    const bool whole_lines =
        ADVDL_VECTOR_BYTES == 64 || row.in_step * row.c * sizeof(T) % 2048 == 0;
    switch (10 * row.run + row.in_step) {  // see run_of
      case 31:
        return whole_lines ? correlate_columns_of<2, 3, 1>(row, epilogue, all)
                           : correlate_columns_of<1, 3, 1>(row, epilogue, all);
      case 32:
        return whole_lines ? correlate_columns_of<2, 3, 2>(row, epilogue, all)
                           : correlate_columns_of<1, 3, 2>(row, epilogue, all);
      case 51:
        return correlate_columns_of<1, 5, 1>(row, epilogue, all);
      case 52:
        return correlate_columns_of<1, 5, 2>(row, epilogue, all);
      case 71:
        return correlate_columns_of<1, 7, 1>(row, epilogue, all);
    }
  }
}

// [taps, C] and behind it scale [C], shift [C].
template <class Acc>
struct Parameters {
  Acc *weight, *scale, *shift;
  Parameters(void* workspace, const DepthwiseConv2dShape& s)
      : weight(static_cast<Acc*>(workspace)), scale(weight + s.taps() * s.c), shift(scale + s.c) {}
  static size_t bytes(const DepthwiseConv2dShape& s) {
    return round_up((s.taps() + 2) * s.c * static_cast<int64_t>(sizeof(Acc)), 64);
  }
  void fill(const DepthwiseConv2dShape& s, const void* weight_, const void* scale_,
            const void* shift_) {
    with_type(s.dtype, [&]<class T>() {
      const T* from = static_cast<const T*>(weight_);
      for (int64_t t = 0; t < s.taps(); ++t) {
        for (int64_t c = 0; c < s.c; ++c)
          weight[t * s.c + c] = static_cast<Acc>(widened(from[c * s.taps() + t]));
      }
    });
    widen(s.scale_dtype, scale_, Acc(1), scale, s.c);
    widen(s.shift_dtype, shift_, Acc(0), shift, s.c);
  }
};

// A row and its taps, on the stack of whoever computes it.
template <class T>
class RowOfTaps {
 public:
  Row<T> row;
  // A row like this one, of at most max_taps taps.
  RowOfTaps(const Row<T>& like, int64_t max_taps) : row(like) {
    if (max_taps > kOnStack) many_ = new Tap[max_taps];
    row.taps = taps();
  }
  ~RowOfTaps() { delete[] many_; }
  RowOfTaps(const RowOfTaps&) = delete;
  RowOfTaps& operator=(const RowOfTaps&) = delete;
  Tap* taps() { return many_ != nullptr ? many_ : few_; }
  // The row has the first tap_count of the taps, and its output begins at element `out`.
  void set(int64_t tap_count, int64_t out) {
    row.tap_count = tap_count;
    row.out = out;
    row.inside = {0, row.out_columns};
    for (int64_t t = 0; t < tap_count; ++t) row.inside = common(taps()[t].columns, row.inside);
  }

 private:
  static constexpr int64_t kOnStack = 256;
  Tap few_[kOnStack];
  Tap* many_ = nullptr;
};

// Taps of row `i` of the output of forward, from image n of x [N, H, W, C].
int64_t forward_taps(const DepthwiseConv2dShape& s, int64_t n, int64_t i, Tap* taps) {
  int64_t count = 0;
  for (int64_t a = 0; a < s.h.kernel; ++a) {
    const int64_t row = i * s.h.stride + a * s.h.dilation - s.h.padding;
    if (row < 0 || row >= s.h.in) continue;
    for (int64_t b = 0; b < s.w.kernel; ++b) {
      const int64_t column = b * s.w.dilation - s.w.padding;
      // Divisions only in the first row of taps.
      const Columns columns =
          count < s.w.kernel ? reached(column, s.w.stride, s.w.in, s.w.out) : taps[b].columns;
      taps[count++] = {((n * s.h.in + row) * s.w.in + column) * s.c, a * s.w.kernel + b, columns};
    }
  }
  return count;
}

// Taps of row `i` of dx, of its columns r, r + stride, ..., from image n of dz [N, H_out, W_out, C].
int64_t gradient_taps(const DepthwiseConv2dShape& s, int64_t n, int64_t i, int64_t r, Tap* taps) {
  const int64_t columns = ceil_div(s.w.in - r, s.w.stride);
  int64_t count = 0;
  for (int64_t a = 0; a < s.h.kernel; ++a) {
    const int64_t place = i + s.h.padding - a * s.h.dilation;
    if (place < 0 || place % s.h.stride != 0 || place / s.h.stride >= s.h.out) continue;
    for (int64_t b = s.w.kernel - 1; b >= 0; --b) {
      const int64_t along = r + s.w.padding - b * s.w.dilation;
      const int64_t column = floor_div(along, s.w.stride);
      if (column * s.w.stride != along) continue;
      taps[count++] = {((n * s.h.out + place / s.h.stride) * s.w.out + column) * s.c,
                       a * s.w.kernel + b, reached(column, 1, s.w.out, columns)};
    }
  }
  return count;
}

// The number of taps in a run: the taps of a row of the filter, or 1 if correlate_row has no loop for such runs. Outputs
// are `step` input columns apart, and `padding` columns beside the image are read on each side.
int64_t run_of(const Conv2dAxis& w, int64_t step, int64_t padding) {
  const bool is_known = w.kernel == 3 || w.kernel == 5 || (w.kernel == 7 && step == 1);
  return is_known && w.dilation == 1 && step <= 2 && padding < w.kernel ? w.kernel : 1;
}

// A row of x, for forward and the gradient of the weight, without its taps.
template <class T>
Row<T> row_over(const DepthwiseConv2dShape& s, const T* x, const acc_t<T>* weight) {
  Row<T> row{x, weight, s.c};
  row.in_step = s.w.stride;
  row.in_columns = s.w.in;
  row.out_columns = s.w.out;
  row.run = run_of(s.w, s.w.stride, s.w.padding);
  row.first_column = -s.w.padding;
  // A prefetch pays if the images are larger than a cache and the filter is small. Else it only costs instructions.
  constexpr int64_t kCachedBytes = 4 << 20, kFewTaps = 9;
  const int64_t read_bytes = s.n * s.c * (s.h.in * s.w.in + s.h.out * s.w.out) * sizeof(T);
  if (read_bytes > kCachedBytes && s.taps() <= kFewTaps) row.ahead = s.h.stride * s.w.in * s.c;
  return row;
}

// Whether an output of `count` runs of channels streams: each of its vectors must then be aligned.
ADVDL_INLINE bool streams(const void* out, int64_t count, int64_t run_bytes) {
  return count * run_bytes >= kConvStreamBytes && run_bytes % ADVDL_VECTOR_BYTES == 0 &&
         reinterpret_cast<uintptr_t>(out) % ADVDL_VECTOR_BYTES == 0;
}

template <class T>
void forward(const DepthwiseConv2dForward& p, void* workspace) {
  using Acc = acc_t<T>;
  const DepthwiseConv2dShape& s = p.shape;
  Parameters<Acc> parameters(workspace, s);
  parameters.fill(s, p.weight, p.scale, p.shift);
  const Epilogue<T> epilogue{parameters.scale,
                             parameters.shift,
                             static_cast<const T*>(p.residual),
                             static_cast<T*>(p.out),
                             p.act,
                             static_cast<Acc>(p.act_param),
                             p.scale != nullptr || p.shift != nullptr,
                             streams(p.out, s.n * s.h.out * s.w.out, s.c * sizeof(T))};
  const Row<T> like = row_over(s, static_cast<const T*>(p.x), parameters.weight);
  cpu::parallel_ranges(s.n * s.h.out, s.w.out * s.c, [&](int64_t begin, int64_t end) {
    RowOfTaps<T> rows(like, s.taps());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t taps = forward_taps(s, i / s.h.out, i % s.h.out, rows.taps());
      rows.set(taps, i * s.w.out * s.c);
      correlate_row(rows.row, epilogue);
    }
    if (epilogue.streams) stream_fence();
  });
}

// Rows `begin` to `end` of the N * H rows of dx.
template <class T>
void input_gradient(const DepthwiseConv2dBackward& p, const Parameters<acc_t<T>>& parameters,
                    int64_t begin, int64_t end) {
  const DepthwiseConv2dShape& s = p.shape;
  const Epilogue<T> epilogue{parameters.scale,
                             parameters.shift,
                             nullptr,
                             static_cast<T*>(p.dx),
                             Activation::identity,
                             0,
                             false,
                             streams(p.dx, s.n * s.h.in * s.w.in, s.c * sizeof(T))};
  Row<T> like{static_cast<const T*>(p.dz), parameters.weight, s.c};
  // With a stride, the taps of a phase are every stride-th tap of the filter. The binding drops the stride over a single
  // output; columns of dx that no tap reaches may then be more than a block at the border leaves out.
  const bool reaches_all = s.w.in + 2 * s.w.padding - s.w.reach() == s.w.out;
  like.run = s.w.stride == 1 && reaches_all ? run_of(s.w, 1, s.w.padding) : 1;
  like.first_column = s.w.padding - (s.w.kernel - 1);
  like.in_columns = s.w.out;
  like.ahead = (s.h.reach() / s.h.stride + 1) * s.w.out * s.c;  // the first tap reads farthest
  like.in_step = 1;
  like.out_step = s.w.stride;
  RowOfTaps<T> rows(like, s.taps());
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t r = 0; r < s.w.stride && r < s.w.in; ++r) {
      const int64_t taps = gradient_taps(s, i / s.h.in, i % s.h.in, r, rows.taps());
      rows.row.out_columns = ceil_div(s.w.in - r, s.w.stride);
      rows.set(taps, (i * s.w.in + r) * s.c);
      correlate_row(rows.row, epilogue);
    }
  }
  if (epilogue.streams) stream_fence();
}

// How the sums over N, H_out and W_out are split: each part has sums of its own, which are then added in order. By the shape
// alone, so that the result does not depend on the threads.
struct Split {
  int64_t parts, rows, blocks, channels;  // rows of dz in a part; blocks of `channels` channels
  explicit Split(const DepthwiseConv2dShape& s) {
    const int64_t all = s.n * s.h.out;
    // A part's sums are small beside what it reads.
    int64_t wanted = all * s.w.out / (8 * (s.taps() + 1));
    wanted = wanted < 1 ? 1 : wanted > 64 ? 64 : wanted;
    rows = ceil_div(all > 0 ? all : 1, wanted);
    parts = ceil_div(all, rows);
    const int64_t least = 4 * ADVDL_VECTOR_BYTES / 4;
    int64_t count = s.c / least;
    const int64_t useful = 32 / (parts > 0 ? parts : 1);
    count = count < 1 ? 1 : count;
    count = useful < 1 ? 1 : count < useful ? count : useful;
    channels = round_up(ceil_div(s.c, count), least);
    blocks = ceil_div(s.c, channels);
  }
};

// sums[k] [C] += dz[j] * x[j * step + from[k]] of one row, one vector of channels. kAhead: with what the next row reads
// prefetched; an `if` for that in the loop, never taken, made it a third slower.
template <int kTaps, bool kAhead, class T, class Lanes>
ADVDL_INLINE void add_products(const T* dz, const Row<T>& row, const Tap* taps, acc_t<T>* sums,
                               int64_t c, const Lanes& lanes) {
  using Vec = typename Simd<acc_t<T>>::Vec;
  Vec acc[kTaps];
  const T* from[kTaps];
  const int64_t step = row.in_step * row.c;
  const Columns inside = row.inside;
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) {
    acc[k] = lanes.read(sums + taps[k].weight * row.c + c);
    from[k] = row.in + taps[k].from + c;
  }
  for (int64_t j = inside.begin; j < inside.end; ++j) {
    const Vec gradient = lanes.read(dz + j * row.c + c);
    const int64_t at = j * step;
    if constexpr (kAhead) {
      prefetch(dz + (row.out_columns + j) * row.c + c);
      prefetch(from[kTaps - 1] + at + row.ahead);
    }
#pragma GCC unroll 16
    for (int k = 0; k < kTaps; ++k) acc[k] += gradient * lanes.read(from[k] + at);
  }
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) {
    const Columns own = taps[k].columns;
    const auto add = [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        acc[k] += lanes.read(dz + j * row.c + c) * lanes.read(from[k] + j * step);
      }
    };
    add(own.begin, min_of(own.end, inside.begin));
    add(max_of(own.begin, inside.end), own.end);
  }
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) lanes.write(sums + taps[k].weight * row.c + c, acc[k]);
}

// Of channels c_begin to c_end; `bias` [C] or null.
template <class T>
void add_row(const T* dz, const Row<T>& row, acc_t<T>* sums, acc_t<T>* bias, int64_t c_begin,
             int64_t c_end) {
  // No overlapping vectors: sums are added to.
  for_vectors<acc_t<T>, 1, false>(c_end - c_begin, [&](int64_t i, const auto& lanes, auto) {
    const int64_t c = c_begin + i;
    const Tap *tap = row.taps, *end = tap + row.tap_count;
    const bool waits = row.ahead != 0;
    for (; waits && tap + 9 <= end; tap += 9) {
      add_products<9, true>(dz, row, tap, sums, c, lanes);
    }
    for (; tap + 9 <= end; tap += 9) add_products<9, false>(dz, row, tap, sums, c, lanes);
    for (; tap + 3 <= end; tap += 3) add_products<3, false>(dz, row, tap, sums, c, lanes);
    for (; tap < end; ++tap) add_products<1, false>(dz, row, tap, sums, c, lanes);
    if (bias != nullptr) {
      auto acc = lanes.read(bias + c);
      for (int64_t j = 0; j < row.out_columns; ++j) acc += lanes.read(dz + j * row.c + c);
      lanes.write(bias + c, acc);
    }
  });
}

// With the gradient of the input, where that is wanted too: dz is then still in the cache.
template <class T>
void weight_gradient(const DepthwiseConv2dBackward& p, const Parameters<acc_t<T>>& parameters,
                     void* partial_sums) {
  using Acc = acc_t<T>;
  const DepthwiseConv2dShape& s = p.shape;
  const Split split(s);
  const int64_t per_part = (s.taps() + 1) * s.c, rows = s.n * s.h.out;
  Acc* partial = static_cast<Acc*>(partial_sums);
  const bool wants_weight = p.dweight != nullptr;
  // `out` of a row is where its dz begins.
  const Row<T> like = row_over<T>(s, static_cast<const T*>(p.x), nullptr);
  cpu::parallel_ranges(
      split.parts * split.blocks, split.rows * s.w.out * split.channels,
      [&](int64_t begin, int64_t end) {
        RowOfTaps<T> line(like, s.taps());
        for (int64_t task = begin; task < end; ++task) {
          const int64_t part = task / split.blocks, block = task % split.blocks;
          const int64_t c_begin = block * split.channels;
          const int64_t c_end = min_of(c_begin + split.channels, s.c);
          Acc* sums = partial + part * per_part;
          Acc* bias = p.dbias != nullptr ? sums + s.taps() * s.c : nullptr;
          for (int64_t t = 0; t <= s.taps(); ++t) {
            for (int64_t c = c_begin; c < c_end; ++c) sums[t * s.c + c] = 0;
          }
          const int64_t last = min_of((part + 1) * split.rows, rows);
          for (int64_t i = part * split.rows; i < last; ++i) {
            const int64_t taps =
                wants_weight ? forward_taps(s, i / s.h.out, i % s.h.out, line.taps()) : 0;
            line.set(taps, i * s.w.out * s.c);
            add_row(static_cast<const T*>(p.dz) + line.row.out, line.row, sums, bias, c_begin,
                    c_end);
          }
          if (p.dx != nullptr) {
            const int64_t dx_rows = s.n * s.h.in, tasks = split.parts * split.blocks;
            input_gradient<T>(p, parameters, dx_rows * task / tasks, dx_rows * (task + 1) / tasks);
          }
        }
      });
  cpu::parallel_ranges(s.c, split.parts * (s.taps() + 1), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t t = 0; t <= s.taps(); ++t) {
        const bool is_bias = t == s.taps();
        if (is_bias ? p.dbias == nullptr : !wants_weight) continue;
        double sum = 0;
        for (int64_t part = 0; part < split.parts; ++part) {
          sum += partial[part * per_part + t * s.c + c];
        }
        (is_bias ? static_cast<Acc*>(p.dbias)[c] : static_cast<Acc*>(p.dweight)[c * s.taps() + t]) =
            static_cast<Acc>(sum);
      }
    }
  });
}

template <class Acc>
size_t partial_bytes(const DepthwiseConv2dShape& s) {
  return Split(s).parts * (s.taps() + 1) * s.c * sizeof(Acc);
}

size_t forward_workspace(const DepthwiseConv2dForward& p) {
  return p.shape.dtype == DType::f64 ? Parameters<double>::bytes(p.shape)
                                     : Parameters<float>::bytes(p.shape);
}
size_t backward_workspace(const DepthwiseConv2dBackward& p) {
  const DepthwiseConv2dShape& s = p.shape;
  return s.dtype == DType::f64 ? Parameters<double>::bytes(s) + partial_bytes<double>(s)
                               : Parameters<float>::bytes(s) + partial_bytes<float>(s);
}
void run_forward(const DepthwiseConv2dForward& p, void* workspace) {
  with_type(p.shape.dtype, [&]<class T>() { forward<T>(p, workspace); });
}
void run_backward(const DepthwiseConv2dBackward& p, void* workspace) {
  with_type(p.shape.dtype, [&]<class T>() {
    using Acc = acc_t<T>;
    const DepthwiseConv2dShape& s = p.shape;
    Parameters<Acc> parameters(workspace, s);
    if (p.dx != nullptr) parameters.fill(s, p.weight, nullptr, nullptr);
    if (p.dweight != nullptr || p.dbias != nullptr) {
      weight_gradient<T>(p, parameters, static_cast<char*>(workspace) + parameters.bytes(s));
    } else if (p.dx != nullptr) {
      cpu::parallel_ranges(s.n * s.h.in, s.w.in * s.c, [&](int64_t begin, int64_t end) {
        input_gradient<T>(p, parameters, begin, end);
      });
    }
  });
}

}  // namespace

void add_depthwise_conv2d_last(cpu::KernelTable& table) {
  table.depthwise_conv2d_last = {forward_workspace, backward_workspace, run_forward, run_backward};
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
