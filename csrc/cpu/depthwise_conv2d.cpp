// Depthwise convolution in channels_first: vectors run along the rows of an image, weights are broadcast.
//
// A strip of the image is copied into a padded buffer first, in the type of the arithmetic: no border is left to care for, and
// the columns of a strided convolution are sorted by their remainder, so that each tap reads neighbours. For the gradient
// of the input the buffer holds dz with zeros between its elements, and the same loop runs over it with the taps reversed.
#include "depthwise_conv2d.h"

#include "dispatch.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

// What a strip may take: half of the second-level cache of today's CPUs and less.
constexpr int64_t kStripBytes = 192 * 1024;

// Outputs of one channel in registers at once: rows that share rows of input, by vectors of columns.
constexpr int kRows = 4;
constexpr int kVectors = 2;

// A strip of a padded image, for out_rows x out_columns outputs: rows of `phases` runs, each `pitch` long and zero beyond
// its columns. Only very long rows are cut into several tiles of columns.
template <class Acc>
struct Strip {
  static constexpr int64_t lanes = Simd<Acc>::lanes;
  int64_t out_columns, phases, pitch, row, halo,
      out_rows;  // row = phases * pitch elements; halo rows

  // For rows of `columns` outputs from taps that reach `reach` columns on; `stride` of the rows read.
  Strip(int64_t columns, int64_t reach, int64_t phases_, int64_t row_reach, int64_t row_stride,
        int64_t rows)
      : out_columns(columns < kDepthwiseTileColumns ? columns : kDepthwiseTileColumns),
        phases(phases_),
        pitch(round_up(round_up(out_columns, lanes) + reach / phases_ + 1, lanes)),
        row(phases_ * pitch),
        halo(row_reach + 1) {
    const int64_t fitting = kStripBytes / static_cast<int64_t>(row * sizeof(Acc)) - halo;
    out_rows = fitting / row_stride + 1;
    if (out_rows < 4) out_rows = 4;
    if (out_rows > rows) out_rows = rows;
  }
  int64_t rows(int64_t out_count, int64_t row_stride) const {
    return (out_count - 1) * row_stride + halo;
  }
  // Elements of the buffer: blocks of columns may read past the last row, for outputs that are not stored.
  int64_t size(int64_t row_stride) const {
    return rows(out_rows, row_stride) * row + kVectors * lanes;
  }
};

// The parts of rows x columns outputs that strips compute one by one.
class Cuts {
 public:
  struct Part {
    int64_t row, rows, column, columns;
  };
  template <class Acc>
  Cuts(int64_t rows, int64_t columns, const Strip<Acc>& strip)
      : rows_(rows), columns_(columns), height_(strip.out_rows), width_(strip.out_columns) {}
  int64_t across() const { return ceil_div(columns_, width_); }
  int64_t count() const { return ceil_div(rows_, height_) * across(); }
  Part part(int64_t i) const {
    const int64_t row = i / across() * height_, column = i % across() * width_;
    return {row, rows_ - row < height_ ? rows_ - row : height_, column,
            columns_ - column < width_ ? columns_ - column : width_};
  }
  // How far on in an image the next part begins, mostly: `row` and `column` elements of it to an output.
  int64_t ahead(int64_t row, int64_t column) const {
    return across() == 1 ? height_ * row : width_ * column;
  }

 private:
  int64_t rows_, columns_, height_, width_;
};

// Rows first .. first + count of an image [rows, columns], into a strip whose column 0 is the image's column `left`.
// Column q of the strip's phase f is the image's column left + q * phases + f. `ahead` elements on lies what is read next.
template <class T>
void fill(const Strip<acc_t<T>>& strip, acc_t<T>* to, const T* image, int64_t rows, int64_t columns,
          int64_t first, int64_t count, int64_t left, int64_t ahead) {
  using Acc = acc_t<T>;
  constexpr int64_t lanes = Simd<Acc>::lanes;
  const int64_t width = strip.pitch * strip.phases;
  const int64_t begin = left > 0 ? left : 0;
  const int64_t end = left + width < columns ? left + width : columns;
  for (int64_t i = 0; i < count; ++i, to += strip.row) {
    const bool is_outside = first + i < 0 || first + i >= rows || end <= begin;
    if (is_outside || strip.phases > 1) std::memset(to, 0, strip.row * sizeof(Acc));
    if (is_outside) continue;
    const T* from = image + (first + i) * columns;
    if (ahead != 0) {
      constexpr int64_t line = 64 / sizeof(T);
      for (int64_t j = begin; j < end; j += line) prefetch(from + ahead + j);
    }
    if (strip.phases == 1) {
      // Zeros at both ends, in whole vectors; the image's own columns come over them.
      const typename Simd<Acc>::Vec zero{};
      for (int64_t j = 0; j < begin - left; j += lanes) store(to + j, zero);
      for (int64_t j = (end - left) / lanes * lanes; j < strip.pitch; j += lanes)
        store(to + j, zero);
      Acc* start = to + (begin - left);
      for_vectors<Acc, 1>(end - begin, [&](int64_t j, const auto& policy, auto) {
        policy.write(start + j, policy.read(from + begin + j));
      });
      continue;
    }
    if (strip.phases == 2) {
      // The usual stride, without a division for each element.
      for (int64_t j = begin; j < end; ++j) {
        const int64_t at = j - left;
        to[(at & 1) * strip.pitch + (at >> 1)] = widened(from[j]);
      }
      continue;
    }
    for (int64_t j = begin; j < end; ++j) {
      const int64_t at = j - left;
      to[at % strip.phases * strip.pitch + at / strip.phases] = widened(from[j]);
    }
  }
}

// The same of an image with stride - 1 zeros between its elements, of which row and column 0 stand at (first, left).
template <class T>
void fill_spread(const Strip<acc_t<T>>& strip, acc_t<T>* to, const T* image, const Conv2dAxis& h,
                 const Conv2dAxis& w, int64_t first, int64_t count, int64_t left, int64_t ahead) {
  using Acc = acc_t<T>;
  if (h.stride == 1 && w.stride == 1) {
    return fill(strip, to, image, h.out, w.out, first, count, left, ahead);
  }
  for (int64_t i = 0; i < count; ++i, to += strip.row) {
    std::memset(to, 0, strip.row * sizeof(Acc));
    const int64_t place = first + i;
    if (place < 0 || place % h.stride != 0 || place / h.stride >= h.out) continue;
    const T* from = image + place / h.stride * w.out;
    for (int64_t j = left > 0 ? ceil_div(left, w.stride) : 0; j < w.out; ++j) {
      const int64_t at = j * w.stride - left;
      if (at >= strip.pitch) break;
      to[at] = widened(from[j]);
    }
  }
}

// The filter of one channel over a strip: sum over a, b of in[a * row_step + columns[b]] * weights[a, b].
template <class Acc>
struct Filter {
  int64_t height, width;  // of the kernel
  int64_t row_step;       // between the rows that a filter reads
  int64_t out_row_step;   // between the first rows of neighbouring rows of output
  int64_t dilation;       // rows of output this far apart share rows of input, where `shares`
  bool shares;
  int64_t* columns;  // [width]
  Acc* weights;      // [height, width]
  Acc scale, shift;
};

// Where tap column b reads in a row of a strip.
ADVDL_INLINE int64_t column_offset(int64_t b, const Conv2dAxis& w, int64_t phases, int64_t pitch) {
  const int64_t column = b * w.dilation;
  return column % phases * pitch + column / phases;
}

// A block of height x width_ vectors of outputs: rows filter.dilation apart. A vector of input is read once for all the rows
// that it is part of; `count` columns are stored. kSize: height and width of the filter, or 0 for any.
template <int kHeight, int kWidth, int kSize, class T>
ADVDL_INLINE void correlate_block(const acc_t<T>* in, const Filter<acc_t<T>>& filter,
                                  const Epilogue<T>& epilogue, int64_t at, int64_t row_at,
                                  int64_t count) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  constexpr int64_t lanes = Simd<Acc>::lanes;
  Vec sums[kHeight][kWidth] = {};
  const int64_t tall = kSize > 0 ? kSize : filter.height;
  const int64_t wide = kSize > 0 ? kSize : filter.width;
  const auto add_taps = [&](int64_t i, int64_t b) {
    const Acc* row = in + i * filter.row_step;
    const Acc* weights = filter.weights + i * wide;
    Vec x[kWidth];
#pragma GCC unroll 8
    for (int k = 0; k < kWidth; ++k) x[k] = load(row + filter.columns[b] + k * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; ++r) {
      if (kHeight > 1 && (i < r || i - r >= tall)) continue;
      const Vec weight = broadcast(weights[b - r * wide]);
#pragma GCC unroll 8
      for (int k = 0; k < kWidth; ++k) sums[r][k] += x[k] * weight;
    }
  };
  const auto add_row = [&](int64_t i) {
    if constexpr (kSize > 0) {
#pragma GCC unroll 8
      for (int64_t b = 0; b < kSize; ++b) add_taps(i, b);
    } else {
      for (int64_t b = 0; b < wide; ++b) add_taps(i, b);
    }
  };
  if constexpr (kSize > 0) {
    // Which rows of output meet a row of input is then known here: no branch is left in between.
#pragma GCC unroll 8
    for (int64_t i = 0; i < kSize + kHeight - 1; ++i) add_row(i);
  } else {
    for (int64_t i = 0; i < tall + kHeight - 1; ++i) add_row(i);
  }
  const Vec scale = broadcast(filter.scale), shift = broadcast(filter.shift);
#pragma GCC unroll 8
  for (int r = 0; r < kHeight; ++r) {
    if (count == kWidth * lanes) {
      epilogue.template finish<kWidth>(sums[r], scale, shift, at + r * row_at, lanes, FullLanes{});
      continue;
    }
    // The last vectors of a row are cut.
#pragma GCC unroll 8
    for (int k = 0; k < kWidth; ++k) {
      Vec one[1] = {sums[r][k]};
      const int64_t left = count - k * lanes, to = at + r * row_at + k * lanes;
      if (left >= lanes) {
        epilogue.template finish<1>(one, scale, shift, to, 0, FullLanes{});
      } else if (left > 0) {
        epilogue.template finish<1>(one, scale, shift, to, 0,
                                    PartialLanes{static_cast<int32_t>(left)});
      }
    }
  }
}

template <int kHeight, int kSize, class T>
void correlate_rows(const acc_t<T>* in, const Filter<acc_t<T>>& filter, const Epilogue<T>& epilogue,
                    int64_t at, int64_t out_row, int64_t columns) {
  constexpr int64_t lanes = Simd<acc_t<T>>::lanes, width = kVectors * lanes;
  const int64_t row_at = filter.dilation * out_row;
  int64_t j = 0;
  for (; j + width <= columns; j += width) {
    correlate_block<kHeight, kVectors, kSize, T>(in + j, filter, epilogue, at + j, row_at, width);
  }
  const int64_t rest = columns - j;
  if (rest > lanes) {
    correlate_block<kHeight, kVectors, kSize, T>(in + j, filter, epilogue, at + j, row_at, rest);
  } else if (rest > 0) {
    correlate_block<kHeight, 1, kSize, T>(in + j, filter, epilogue, at + j, row_at, rest);
  }
}

// rows x columns outputs from a strip, the first of them at out[at], rows `out_row` apart.
template <class T>
void correlate_strip(const acc_t<T>* in, const Filter<acc_t<T>>& filter,
                     const Epilogue<T>& epilogue, int64_t at, int64_t out_row, int64_t rows,
                     int64_t columns) {
  const int64_t apart = filter.shares ? filter.dilation : rows;
  for (int64_t first = 0; first < rows; first += filter.shares ? kRows * apart : 1) {
    for (int64_t q = 0; q < (filter.shares ? apart : 1) && first + q < rows; ++q) {
      int64_t i = first + q;
      const int64_t last = first + kRows * apart;
      const auto run = [&]<int kHeight>(Index<kHeight>) {
        const auto rows_from = filter.height == 3 && filter.width == 3
                                   ? correlate_rows<kHeight, 3, T>
                                   : correlate_rows<kHeight, 0, T>;
        rows_from(in + i * filter.out_row_step, filter, epilogue, at + i * out_row, out_row,
                  columns);
        i += kHeight * apart;
      };
      if (i + (kRows - 1) * apart < rows) {
        run(Index<kRows>{});
        continue;
      }
      if (i + apart < rows) run(Index<2>{});
      while (i < rows && i < last) run(Index<1>{});
    }
  }
}

// Where taps read, and the weights of one channel.
template <class Acc>
struct Taps {
  static constexpr int64_t kOnStack = 128;
  int64_t few_offsets[kOnStack];
  Acc few_weights[kOnStack];
  int64_t* offsets = few_offsets;
  Acc* weights = few_weights;
  int64_t count;
  explicit Taps(int64_t n) : count(n) {
    if (n > kOnStack) {
      offsets = new int64_t[n];
      weights = new Acc[n];
    }
  }
  ~Taps() {
    if (offsets == few_offsets) return;
    delete[] offsets;
    delete[] weights;
  }
  Taps(const Taps&) = delete;
  Taps& operator=(const Taps&) = delete;
};

template <class T>
void forward(const DepthwiseConv2dForward& p, void* workspace) {
  using Acc = acc_t<T>;
  const DepthwiseConv2dShape& s = p.shape;
  Acc *scale = static_cast<Acc*>(workspace), *shift = scale + s.c;
  widen(s.scale_dtype, p.scale, Acc(1), scale, s.c);
  widen(s.shift_dtype, p.shift, Acc(0), shift, s.c);
  const Epilogue<T> epilogue{scale,
                             shift,
                             static_cast<const T*>(p.residual),
                             static_cast<T*>(p.out),
                             p.act,
                             static_cast<Acc>(p.act_param),
                             p.scale != nullptr || p.shift != nullptr};
  const int64_t outputs = s.h.out * s.w.out;
  const Strip<Acc> strip(s.w.out, s.w.reach(), s.w.stride, s.h.reach(), s.h.stride, s.h.out);
  // Images alone may be too few to share out.
  const Cuts cuts(s.h.out, s.w.out, strip);
  cpu::parallel_ranges(
      s.n * s.c * cuts.count(), outputs / cuts.count(), [&](int64_t begin, int64_t end) {
        Buffer<Acc> buffer(strip.size(s.h.stride));
        Taps<Acc> taps(s.taps());
        for (int64_t b = 0; b < s.w.kernel; ++b) {
          taps.offsets[b] = column_offset(b, s.w, strip.phases, strip.pitch);
        }
        Filter<Acc> filter{s.h.kernel,
                           s.w.kernel,
                           s.h.dilation * strip.row,
                           s.h.stride * strip.row,
                           s.h.dilation,
                           s.h.stride == 1,
                           taps.offsets,
                           taps.weights,
                           1,
                           0};
        for (int64_t task = begin; task < end; ++task) {
          const int64_t image = task / cuts.count(), c = image % s.c;
          const auto [o, rows, j, columns] = cuts.part(task % cuts.count());
          widen(s.dtype, static_cast<const T*>(p.weight) + c * taps.count, Acc(0), taps.weights,
                taps.count);
          fill(strip, buffer.data(), static_cast<const T*>(p.x) + image * s.h.in * s.w.in, s.h.in,
               s.w.in, o * s.h.stride - s.h.padding, strip.rows(rows, s.h.stride),
               j * s.w.stride - s.w.padding, cuts.ahead(s.h.stride * s.w.in, s.w.stride));
          filter.scale = scale[c];
          filter.shift = shift[c];
          correlate_strip<T>(buffer.data(), filter, epilogue, image * outputs + o * s.w.out + j,
                             s.w.out, rows, columns);
        }
      });
}

template <class T>
void input_gradient(const DepthwiseConv2dBackward& p) {
  using Acc = acc_t<T>;
  const DepthwiseConv2dShape& s = p.shape;
  const Epilogue<T> epilogue{nullptr, nullptr, nullptr, static_cast<T*>(p.dx), Activation::identity,
                             0,       false};
  const int64_t inputs = s.h.in * s.w.in;
  const Strip<Acc> strip(s.w.in, s.w.reach(), 1, s.h.reach(), 1, s.h.in);
  const Cuts cuts(s.h.in, s.w.in, strip);
  cpu::parallel_ranges(
      s.n * s.c * cuts.count(), inputs / cuts.count(), [&](int64_t begin, int64_t end) {
        Buffer<Acc> buffer(strip.size(1));
        Taps<Acc> taps(s.taps());
        for (int64_t b = 0; b < s.w.kernel; ++b) taps.offsets[b] = b * s.w.dilation;
        const Filter<Acc> filter{s.h.kernel,
                                 s.w.kernel,
                                 s.h.dilation * strip.row,
                                 strip.row,
                                 s.h.dilation,
                                 true,
                                 taps.offsets,
                                 taps.weights,
                                 1,
                                 0};
        for (int64_t task = begin; task < end; ++task) {
          const int64_t image = task / cuts.count(), c = image % s.c;
          const auto [o, rows, j, columns] = cuts.part(task % cuts.count());
          // Backwards.
          widen(s.dtype, static_cast<const T*>(p.weight) + c * taps.count, Acc(0),
                taps.weights + taps.count - 1, taps.count, -1);
          fill_spread(strip, buffer.data(), static_cast<const T*>(p.dz) + image * s.h.out * s.w.out,
                      s.h, s.w, o + s.h.padding - s.h.reach(), strip.rows(rows, 1),
                      j + s.w.padding - s.w.reach(), cuts.ahead(s.w.out, 1));
          correlate_strip<T>(buffer.data(), filter, epilogue, image * inputs + o * s.w.in + j,
                             s.w.in, rows, columns);
        }
      });
}

// Where tap (a, b) reads in a strip, from the first row of an output row on.
ADVDL_INLINE int64_t tap_offset(int64_t t, const DepthwiseConv2dShape& s, int64_t row,
                                int64_t phases, int64_t pitch) {
  return t / s.w.kernel * s.h.dilation * row + column_offset(t % s.w.kernel, s.w, phases, pitch);
}

// sums[k] += sum over the rows of a strip of dz * x, for kTaps taps.
template <int kTaps, class T>
ADVDL_INLINE void add_products(const acc_t<T>* strip, int64_t strip_step, const int64_t* offsets,
                               const T* dz, int64_t dz_row, int64_t rows, int64_t columns,
                               double* sums) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  constexpr int64_t lanes = Simd<Acc>::lanes;
  Vec acc[kTaps] = {};
  const Acc* from[kTaps];
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) from[k] = strip + offsets[k];
  for (int64_t i = 0; i < rows; ++i, dz += dz_row) {
    const int64_t row = i * strip_step;
    int64_t j = 0;
    for (; j + lanes <= columns; j += lanes) {
      const Vec gradient = load(dz + j);
#pragma GCC unroll 16
      for (int k = 0; k < kTaps; ++k) acc[k] += gradient * load(from[k] + row + j);
    }
    if (j < columns) {
      const Vec gradient = load_partial(dz + j, columns - j);
#pragma GCC unroll 16
      for (int k = 0; k < kTaps; ++k) {
        // Lanes past the row are zero on the left; what they meet must be finite, which x need not be.
        const Vec x =
            PartialLanes{static_cast<int32_t>(columns - j)}.counted(load(from[k] + row + j));
        acc[k] += gradient * x;
      }
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) sums[k] += lane_sum(acc[k]);
}

// The same of kHeight x kWidth taps from (a, b) on, at stride 1: a vector of x is read once for all of a column of taps, as
// the rows of dz that it meets move through registers. Meanwhile as many rows from next_dz and next_x on are prefetched, if
// these are not null.
template <int kHeight, int kWidth, class T>
void add_products_sliding(const acc_t<T>* strip, const DepthwiseConv2dShape& s,
                          const Strip<acc_t<T>>& form, int64_t a, int64_t b, const T* dz,
                          int64_t rows, int64_t columns, double* sums, const T* next_dz,
                          const T* next_x) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  Vec acc[kHeight][kWidth] = {};
  int64_t of_tap[kWidth];
#pragma GCC unroll 8
  for (int i = 0; i < kWidth; ++i) of_tap[i] = column_offset(b + i, s.w, 1, form.pitch);
  const int64_t apart = s.h.dilation, step = apart * form.row, dz_step = apart * s.w.out;
  for (int64_t q = 0; q < apart && q < rows; ++q) {
    const int64_t count = (rows - q - 1) / apart + 1;  // rows of dz that are `apart`
    for_vectors<Acc, 1, false>(columns, [&](int64_t j, const auto& lanes, auto) {
      const Acc* in = strip + q * form.row + a * step + j;
      const T* gradient = dz + q * s.w.out + j;
      Vec met[kHeight] = {};
      // Row u of x meets rows u, u - 1 ... of dz; near both ends not all of them are there.
      const auto add_row = [&](int64_t u, auto is_border) {
#pragma GCC unroll 8
        for (int k = kHeight - 1; k > 0; --k) met[k] = met[k - 1];
        if (!decltype(is_border)::value || u < count) met[0] = lanes.read(gradient + u * dz_step);
        if (next_x != nullptr) {
          prefetch(next_dz + (q + u * apart) * s.w.out + j);
          prefetch(next_x + (q + u * apart) * s.w.in + j);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kWidth; ++i) {
          const Vec x = lanes.counted(load(in + u * step + of_tap[i]));
#pragma GCC unroll 8
          for (int k = 0; k < kHeight; ++k) {
            if (decltype(is_border)::value && (u < k || u - k >= count)) continue;
            acc[k][i] += met[k] * x;
          }
        }
      };
      int64_t u = 0;
      for (; u < kHeight - 1; ++u) add_row(u, Index<1>{});
      for (; u < count; ++u) add_row(u, Index<0>{});
      for (; u < count + kHeight - 1; ++u) add_row(u, Index<1>{});
    });
  }
#pragma GCC unroll 8
  for (int k = 0; k < kHeight; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < kWidth; ++i) sums[(a + k) * s.w.kernel + b + i] += lane_sum(acc[k][i]);
  }
}

// All taps, in blocks of 3 x 3.
template <class T>
void add_all_products_sliding(const acc_t<T>* strip, const DepthwiseConv2dShape& s,
                              const Strip<acc_t<T>>& form, const T* dz, int64_t rows,
                              int64_t columns, double* sums, const T* next_dz, const T* next_x) {
  for (int64_t a = 0; a < s.h.kernel;) {
    const bool is_tall = a + 3 <= s.h.kernel;
    for (int64_t b = 0; b < s.w.kernel;) {
      const bool is_wide = b + 3 <= s.w.kernel;
      const auto add =
          is_tall ? (is_wide ? add_products_sliding<3, 3, T> : add_products_sliding<3, 1, T>)
                  : (is_wide ? add_products_sliding<1, 3, T> : add_products_sliding<1, 1, T>);
      const bool is_first = a == 0 && b == 0;
      add(strip, s, form, a, b, dz, rows, columns, sums, is_first ? next_dz : nullptr,
          is_first ? next_x : nullptr);
      b += is_wide ? 3 : 1;
    }
    a += is_tall ? 3 : 1;
  }
}

template <class T>
double sum_of(const T* values, int64_t count) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  Vec sums[4] = {};
  for_vectors<Acc, 4>(count, [&](int64_t i, const auto& lanes, auto chain) {
    sums[decltype(chain)::value] += lanes.counted(lanes.read(values + i));
  });
  return lane_sum(sums[0] + sums[1]) + lane_sum(sums[2] + sums[3]);
}

// Images are summed up in parts, by the shape alone: the result does not depend on the threads.
ADVDL_INLINE int64_t parts_of(const DepthwiseConv2dShape& s) {
  const int64_t wanted = ceil_div(64, s.c > 0 ? s.c : 1);
  return wanted < s.n ? wanted : s.n;
}

template <class T>
void weight_gradient(const DepthwiseConv2dBackward& p, double* partial) {
  using Acc = acc_t<T>;
  const DepthwiseConv2dShape& s = p.shape;
  const int64_t parts = parts_of(s), per_channel = s.taps() + 1, outputs = s.h.out * s.w.out;
  const Strip<Acc> strip(s.w.out, s.w.reach(), s.w.stride, s.h.reach(), s.h.stride, s.h.out);
  const Cuts cuts(s.h.out, s.w.out, strip);
  const bool wants_weight = p.dweight != nullptr;
  cpu::parallel_ranges(
      s.c * parts, s.n / (parts > 0 ? parts : 1) * outputs, [&](int64_t begin, int64_t end) {
        Buffer<Acc> buffer(strip.size(s.h.stride));
        Taps<Acc> taps(s.taps());
        for (int64_t t = 0; t < taps.count; ++t) {
          taps.offsets[t] = tap_offset(t, s, strip.row, strip.phases, strip.pitch);
        }
        for (int64_t task = begin; task < end; ++task) {
          const int64_t c = task / parts, part = task % parts;
          double* sums = partial + task * per_channel;
          for (int64_t t = 0; t < per_channel; ++t) sums[t] = 0;
          for (int64_t n = s.n * part / parts; n < s.n * (part + 1) / parts; ++n) {
            const int64_t image = n * s.c + c;
            const T* dz = static_cast<const T*>(p.dz) + image * outputs;
            if (p.dbias != nullptr) sums[s.taps()] += sum_of(dz, outputs);
            const T* x = static_cast<const T*>(p.x) + image * s.h.in * s.w.in;
            for (int64_t i = 0; wants_weight && i < cuts.count(); ++i) {
              const auto [o, rows, j, columns] = cuts.part(i);
              fill(strip, buffer.data(), x, s.h.in, s.w.in, o * s.h.stride - s.h.padding,
                   strip.rows(rows, s.h.stride), j * s.w.stride - s.w.padding, 0);
              const int64_t step = s.h.stride * strip.row;
              const T* from = dz + o * s.w.out + j;
              if (s.h.stride == 1 && s.w.stride == 1) {
                // Next comes the next part of this image, or the first of the channel's next image.
                const bool is_last = i + 1 == cuts.count();
                const int64_t next = is_last ? s.c : 0;
                const Cuts::Part at = is_last ? Cuts::Part{} : cuts.part(i + 1);
                add_all_products_sliding<T>(buffer.data(), s, strip, from, rows, columns, sums,
                                            dz + next * outputs + at.row * s.w.out + at.column,
                                            x + (next * s.h.in + at.row) * s.w.in + at.column);
                continue;
              }
              int64_t t = 0;
              for (; t + 9 <= taps.count; t += 9) {
                add_products<9>(buffer.data(), step, taps.offsets + t, from, s.w.out, rows, columns,
                                sums + t);
              }
              for (; t + 3 <= taps.count; t += 3) {
                add_products<3>(buffer.data(), step, taps.offsets + t, from, s.w.out, rows, columns,
                                sums + t);
              }
              for (; t < taps.count; ++t) {
                add_products<1>(buffer.data(), step, taps.offsets + t, from, s.w.out, rows, columns,
                                sums + t);
              }
            }
          }
        }
      });
  for (int64_t c = 0; c < s.c; ++c) {
    for (int64_t t = 0; t < per_channel; ++t) {
      const bool is_bias = t == s.taps();
      if (is_bias ? p.dbias == nullptr : !wants_weight) continue;
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part)
        sum += partial[(c * parts + part) * per_channel + t];
      (is_bias ? static_cast<Acc*>(p.dbias)[c] : static_cast<Acc*>(p.dweight)[c * s.taps() + t]) =
          static_cast<Acc>(sum);
    }
  }
}

size_t forward_workspace(const DepthwiseConv2dForward& p) { return 2 * p.shape.c * sizeof(double); }
size_t backward_workspace(const DepthwiseConv2dBackward& p) {
  const bool sums = p.dweight != nullptr || p.dbias != nullptr;
  return sums ? parts_of(p.shape) * p.shape.c * (p.shape.taps() + 1) * sizeof(double) : 0;
}
void run_forward(const DepthwiseConv2dForward& p, void* workspace) {
  with_type(p.shape.dtype, [&]<class T>() { forward<T>(p, workspace); });
}
void run_backward(const DepthwiseConv2dBackward& p, void* workspace) {
  with_type(p.shape.dtype, [&]<class T>() {
    if (p.dx != nullptr) input_gradient<T>(p);
    if (p.dweight != nullptr || p.dbias != nullptr) {
      weight_gradient<T>(p, static_cast<double*>(workspace));
    }
  });
}

}  // namespace

void add_depthwise_conv2d(cpu::KernelTable& table) {
  table.depthwise_conv2d = {forward_workspace, backward_workspace, run_forward, run_backward};
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
