// Depthwise convolution in channels_first: vectors run along the rows of an image, weights are broadcast.
//
// A strip of the image is copied into a padded buffer first, in the type of the arithmetic: no border is left to care for, and
// the columns of a strided convolution are sorted by their remainder, so that each tap reads neighbours. For the gradient
// of the input the buffer holds dz with zeros between its elements, and the same loop runs over it with the taps reversed.
#include "depthwise_conv2d.h"

#include <cstdlib>

#include "dispatch.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

// What a strip may take: half of the second-level cache of today's CPUs and less.
constexpr int64_t kStripBytes = 192 * 1024;

// A strip of a padded image: rows of `phases` runs, each `pitch` long and zero beyond its columns.
template <class Acc>
struct Strip {
  static constexpr int64_t lanes = Simd<Acc>::lanes;
  int64_t phases, pitch, row, halo, out_rows;  // row = phases * pitch elements; halo rows
  Acc* data = nullptr;

  // For `columns` outputs from taps that reach `reach` columns on; `stride` of the rows read.
  Strip(int64_t columns, int64_t reach, int64_t phases_, int64_t row_reach, int64_t row_stride,
        int64_t rows)
      : phases(phases_),
        pitch(round_up(round_up(columns, lanes) + reach / phases_ + 1, lanes)),
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
};

template <class Acc>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<Acc*>(std::aligned_alloc(64, round_up(count * sizeof(Acc), 64)))) {
    if (data_ == nullptr) std::abort();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Acc* data() { return data_; }

 private:
  Acc* data_;
};

// Rows first .. first + count of an image [rows, columns], into a strip whose column 0 is the image's column `left`.
// Column q of the strip's phase f is the image's column left + q * phases + f.
template <class T>
void fill(const Strip<acc_t<T>>& strip, acc_t<T>* to, const T* image, int64_t rows, int64_t columns,
          int64_t first, int64_t count, int64_t left) {
  using Acc = acc_t<T>;
  for (int64_t i = 0; i < count; ++i, to += strip.row) {
    std::memset(to, 0, strip.row * sizeof(Acc));
    if (first + i < 0 || first + i >= rows) continue;
    const T* from = image + (first + i) * columns;
    const int64_t width = strip.pitch * strip.phases;
    const int64_t begin = left > 0 ? left : 0;
    const int64_t end = left + width < columns ? left + width : columns;
    if (end <= begin) continue;
    if (strip.phases == 1) {
      Acc* start = to + (begin - left);
      for_vectors<Acc, 1>(end - begin, [&](int64_t j, const auto& lanes, auto) {
        lanes.write(start + j, lanes.read(from + begin + j));
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
                 const Conv2dAxis& w, int64_t first, int64_t count, int64_t left) {
  using Acc = acc_t<T>;
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

// Where the taps read in a strip, from the first row of an output row on.
ADVDL_INLINE int64_t tap_offset(int64_t a, int64_t b, const Conv2dAxis& h, const Conv2dAxis& w,
                                int64_t phases, int64_t pitch) {
  const int64_t column = b * w.dilation;
  return a * h.dilation * phases * pitch + column % phases * pitch + column / phases;
}

// kVectors vectors of one row of outputs: sums[k] = sum over taps of in[offset + k * lanes] * weight.
template <int kVectors, class T>
ADVDL_INLINE void correlate(const acc_t<T>* in, const acc_t<T>* weight, const int64_t* offsets,
                            int64_t taps, const Epilogue<T>& epilogue, acc_t<T> scale,
                            acc_t<T> shift, int64_t at, int64_t count) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  constexpr int64_t lanes = Simd<Acc>::lanes;
  Vec sums[kVectors] = {};
  for (int64_t t = 0; t < taps; ++t) {
    const Vec w = broadcast(weight[t]);
    const Acc* from = in + offsets[t];
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) sums[k] += load(from + k * lanes) * w;
  }
  if (count == kVectors * lanes) {
    epilogue.template finish<kVectors>(sums, broadcast(scale), broadcast(shift), at, lanes,
                                       FullLanes{});
    return;
  }
  // The last vector of a row is cut.
#pragma GCC unroll 8
  for (int k = 0; k < kVectors; ++k) {
    Vec one[1] = {sums[k]};
    const int64_t left = count - k * lanes;
    if (left >= lanes) {
      epilogue.template finish<1>(one, broadcast(scale), broadcast(shift), at + k * lanes, 0,
                                  FullLanes{});
    } else {
      epilogue.template finish<1>(one, broadcast(scale), broadcast(shift), at + k * lanes, 0,
                                  PartialLanes{static_cast<int32_t>(left)});
    }
  }
}

template <class T>
void correlate_row(const acc_t<T>* in, const acc_t<T>* weight, const int64_t* offsets, int64_t taps,
                   const Epilogue<T>& epilogue, acc_t<T> scale, acc_t<T> shift, int64_t at,
                   int64_t columns) {
  constexpr int64_t lanes = Simd<acc_t<T>>::lanes;
  int64_t j = 0;
  for (; j + 4 * lanes <= columns; j += 4 * lanes) {
    correlate<4, T>(in + j, weight, offsets, taps, epilogue, scale, shift, at + j, 4 * lanes);
  }
  const int64_t rest = columns - j;
  if (rest > 3 * lanes) {
    correlate<4, T>(in + j, weight, offsets, taps, epilogue, scale, shift, at + j, rest);
  } else if (rest > 2 * lanes) {
    correlate<3, T>(in + j, weight, offsets, taps, epilogue, scale, shift, at + j, rest);
  } else if (rest > lanes) {
    correlate<2, T>(in + j, weight, offsets, taps, epilogue, scale, shift, at + j, rest);
  } else if (rest > 0) {
    correlate<1, T>(in + j, weight, offsets, taps, epilogue, scale, shift, at + j, rest);
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
  const int64_t strips = ceil_div(s.h.out, strip.out_rows);
  cpu::parallel_ranges(s.n * s.c * strips, outputs / strips, [&](int64_t begin, int64_t end) {
    Buffer<Acc> buffer(strip.rows(strip.out_rows, s.h.stride) * strip.row);
    Taps<Acc> taps(s.taps());
    for (int64_t t = 0; t < taps.count; ++t) {
      taps.offsets[t] =
          tap_offset(t / s.w.kernel, t % s.w.kernel, s.h, s.w, strip.phases, strip.pitch);
    }
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / strips, o = task % strips * strip.out_rows, c = image % s.c;
      const int64_t rows = s.h.out - o < strip.out_rows ? s.h.out - o : strip.out_rows;
      widen(s.dtype, static_cast<const T*>(p.weight) + c * taps.count, Acc(0), taps.weights,
            taps.count);
      fill(strip, buffer.data(), static_cast<const T*>(p.x) + image * s.h.in * s.w.in, s.h.in,
           s.w.in, o * s.h.stride - s.h.padding, strip.rows(rows, s.h.stride), -s.w.padding);
      for (int64_t i = 0; i < rows; ++i) {
        correlate_row<T>(buffer.data() + i * s.h.stride * strip.row, taps.weights, taps.offsets,
                         taps.count, epilogue, scale[c], shift[c],
                         image * outputs + (o + i) * s.w.out, s.w.out);
      }
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
  const int64_t strips = ceil_div(s.h.in, strip.out_rows);
  cpu::parallel_ranges(s.n * s.c * strips, inputs / strips, [&](int64_t begin, int64_t end) {
    Buffer<Acc> buffer(strip.rows(strip.out_rows, 1) * strip.row);
    Taps<Acc> taps(s.taps());
    for (int64_t t = 0; t < taps.count; ++t) {
      // Reversed: tap a of the filter stands at kernel - 1 - a.
      const int64_t a = s.h.kernel - 1 - t / s.w.kernel, b = s.w.kernel - 1 - t % s.w.kernel;
      taps.offsets[t] = tap_offset(a, b, s.h, s.w, 1, strip.pitch);
    }
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / strips, o = task % strips * strip.out_rows, c = image % s.c;
      const int64_t rows = s.h.in - o < strip.out_rows ? s.h.in - o : strip.out_rows;
      widen(s.dtype, static_cast<const T*>(p.weight) + c * taps.count, Acc(0), taps.weights,
            taps.count);
      fill_spread(strip, buffer.data(), static_cast<const T*>(p.dz) + image * s.h.out * s.w.out,
                  s.h, s.w, o + s.h.padding - s.h.reach(), strip.rows(rows, 1),
                  s.w.padding - s.w.reach());
      for (int64_t i = 0; i < rows; ++i) {
        correlate_row<T>(buffer.data() + i * strip.row, taps.weights, taps.offsets, taps.count,
                         epilogue, Acc(1), Acc(0), image * inputs + (o + i) * s.w.in, s.w.in);
      }
    }
  });
}

// sums[k] += sum over the rows of a strip of dz * x, for kTaps taps.
template <int kTaps, class T>
ADVDL_INLINE void add_products(const acc_t<T>* strip, int64_t strip_step, const int64_t* offsets,
                               const T* dz, int64_t rows, int64_t columns, double* sums) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  constexpr int64_t lanes = Simd<Acc>::lanes;
  Vec acc[kTaps] = {};
  const Acc* from[kTaps];
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) from[k] = strip + offsets[k];
  for (int64_t i = 0; i < rows; ++i, dz += columns) {
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
  const bool wants_weight = p.dweight != nullptr;
  cpu::parallel_ranges(
      s.c * parts, s.n / (parts > 0 ? parts : 1) * outputs, [&](int64_t begin, int64_t end) {
        Buffer<Acc> buffer(strip.rows(strip.out_rows, s.h.stride) * strip.row);
        Taps<Acc> taps(s.taps());
        for (int64_t t = 0; t < taps.count; ++t) {
          taps.offsets[t] =
              tap_offset(t / s.w.kernel, t % s.w.kernel, s.h, s.w, strip.phases, strip.pitch);
        }
        for (int64_t task = begin; task < end; ++task) {
          const int64_t c = task / parts, part = task % parts;
          double* sums = partial + task * per_channel;
          for (int64_t t = 0; t < per_channel; ++t) sums[t] = 0;
          for (int64_t n = s.n * part / parts; n < s.n * (part + 1) / parts; ++n) {
            const int64_t image = n * s.c + c;
            const T* dz = static_cast<const T*>(p.dz) + image * outputs;
            if (p.dbias != nullptr) sums[s.taps()] += sum_of(dz, outputs);
            for (int64_t o = 0; wants_weight && o < s.h.out; o += strip.out_rows) {
              const int64_t rows = s.h.out - o < strip.out_rows ? s.h.out - o : strip.out_rows;
              fill(strip, buffer.data(), static_cast<const T*>(p.x) + image * s.h.in * s.w.in,
                   s.h.in, s.w.in, o * s.h.stride - s.h.padding, strip.rows(rows, s.h.stride),
                   -s.w.padding);
              const int64_t step = s.h.stride * strip.row;
              const T* from = dz + o * s.w.out;
              int64_t t = 0;
              for (; t + 9 <= taps.count; t += 9) {
                add_products<9>(buffer.data(), step, taps.offsets + t, from, rows, s.w.out,
                                sums + t);
              }
              for (; t + 3 <= taps.count; t += 3) {
                add_products<3>(buffer.data(), step, taps.offsets + t, from, rows, s.w.out,
                                sums + t);
              }
              for (; t < taps.count; ++t) {
                add_products<1>(buffer.data(), step, taps.offsets + t, from, rows, s.w.out,
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
  table.depthwise_conv2d_forward_workspace = forward_workspace;
  table.depthwise_conv2d_backward_workspace = backward_workspace;
  table.depthwise_conv2d_forward = run_forward;
  table.depthwise_conv2d_backward = run_backward;
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
