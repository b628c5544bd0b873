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

// Outputs of one vector of channels in registers at once: a weight is read once for all of them.
constexpr int kColumns = 8;
constexpr int64_t kChannels = 64;

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
  int64_t c = 0, in_step = 1, out_columns = 0, out_step = 1;
  int64_t run =
      1;  // so many taps at a time read neighbouring columns, in this order; 1 if they do not
  int64_t out = 0;  // element of the output at column 0
  const Tap* taps = nullptr;
  int64_t tap_count = 0;
  int64_t ahead =
      0;  // from what the last tap reads to what the next row of outputs is the first to read
  Columns inside{};  // what every tap reaches
};

// kCount outputs from column j on, of one vector of channels, all of which every tap reaches. The taps come in runs of kRun
// neighbours: a vector of input is read once for all of a run that it meets.
template <int kCount, int kRun, class T, class Lanes>
ADVDL_INLINE void correlate_columns(const Row<T>& row, const Epilogue<T>& epilogue, int64_t j,
                                    int64_t c, const Lanes& lanes) {
  using Vec = typename Epilogue<T>::Vec;
  Vec sums[kCount] = {};
  const int64_t step = row.in_step * row.c;
  const T* start = row.in + j * step + c;
  for (int64_t t = 0; t < row.tap_count; t += kRun) {
    Vec weights[kRun];
#pragma GCC unroll 8
    for (int b = 0; b < kRun; ++b) {
      weights[b] = lanes.read(row.weight + row.taps[t + b].weight * row.c + c);
    }
    const T* in = start + row.taps[t].from;
    if (t + kRun >= row.tap_count) {
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) prefetch(in + i * step + row.ahead);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount + kRun - 1; ++i) {
      const Vec x = lanes.read(in + i * step);
#pragma GCC unroll 8
      for (int b = 0; b < kRun; ++b) {
        if (i >= b && i - b < kCount) sums[i - b] += x * weights[b];
      }
    }
  }
  epilogue.template finish<kCount>(
      sums, lanes.read(epilogue.scale + c), lanes.read(epilogue.shift + c),
      row.out + j * row.out_step * row.c + c, row.out_step * row.c, lanes);
}

// All columns that every tap reaches, in blocks, of which the last may overlap the one before. Channels inside of columns: what
// is read is one piece of memory, which the prefetchers follow. Not all channels of a wide row: neighbouring columns, which a
// tap reads one by one, would push each other out of the cache.
template <int kRun, class T>
void correlate_inside(const Row<T>& row, const Epilogue<T>& epilogue) {
  const int64_t end = row.inside.end, count = end - row.inside.begin;
  for (int64_t first = 0, channels; first < row.c; first += channels) {
    channels = row.c - first < 2 * kChannels ? row.c - first : kChannels;  // no short rest
    const auto block = [&]<int kCount>(Index<kCount>, int64_t j) {
      for_vectors<acc_t<T>, 1>(channels, [&](int64_t c, const auto& lanes, auto) {
        correlate_columns<kCount, kRun>(row, epilogue, j, first + c, lanes);
      });
      return j + kCount;
    };
    for (int64_t j = row.inside.begin; j < end;) {
      if (count >= kColumns && end - j > kColumns / 2) {
        j = block(Index<kColumns>{}, min_of(j, end - kColumns));
      } else if (count >= kColumns / 2) {
        j = block(Index<kColumns / 2>{}, min_of(j, end - kColumns / 2));
      } else {
        j = block(Index<1>{}, j);
      }
    }
  }
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

template <class T>
void correlate_row(const Row<T>& row, const Epilogue<T>& epilogue) {
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
  switch (row.run) {
    case 3:
      correlate_inside<3>(row, epilogue);
      break;
    case 5:
      correlate_inside<5>(row, epilogue);
      break;
    case 7:
      correlate_inside<7>(row, epilogue);
      break;
    default:
      correlate_inside<1>(row, epilogue);
  }
  border(row.inside.end, row.out_columns);
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
    for (int64_t c = 0; c < s.c; ++c) {
      const int64_t size = s.dtype == DType::f64 ? 8 : s.dtype == DType::f32 ? 4 : 2;
      widen(s.dtype, static_cast<const char*>(weight_) + c * s.taps() * size, Acc(0), weight + c,
            s.taps(), s.c);
    }
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

// How many taps of a row of the filter read neighbours, in forward as in the input's gradient.
int64_t run_of(const Conv2dAxis& w) { return w.stride == 1 && w.dilation == 1 ? w.kernel : 1; }

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
  Row<T> like{static_cast<const T*>(p.x), parameters.weight, s.c};
  like.run = run_of(s.w);
  // Of what a cache holds, or a larger filter multiplies longer than it waits for, it would only cost instructions.
  constexpr int64_t kCachedBytes = 4 << 20, kFewTaps = 9;
  const int64_t read_bytes = s.n * s.c * (s.h.in * s.w.in + s.h.out * s.w.out) * sizeof(T);
  const bool waits = read_bytes > kCachedBytes && s.taps() <= kFewTaps;
  like.ahead = waits ? s.h.stride * s.w.in * s.c : 0;
  like.in_step = s.w.stride;
  like.out_columns = s.w.out;
  like.out_step = 1;
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
  like.run = run_of(s.w);
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
  Row<T> like{static_cast<const T*>(p.x), nullptr, s.c};
  // Of what a cache holds, or a larger filter multiplies longer than it waits for, it would only cost instructions.
  constexpr int64_t kCachedBytes = 4 << 20, kFewTaps = 9;
  const int64_t read_bytes = s.n * s.c * (s.h.in * s.w.in + s.h.out * s.w.out) * sizeof(T);
  const bool waits = read_bytes > kCachedBytes && s.taps() <= kFewTaps;
  like.ahead = waits ? s.h.stride * s.w.in * s.c : 0;
  like.in_step = s.w.stride;
  like.out_columns = s.w.out;
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
