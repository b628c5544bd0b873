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

// Columns that every tap reaches; where there are none, begin == end.
ADVDL_INLINE Columns reached_by_all(const Tap* taps, int64_t tap_count, int64_t count) {
  Columns all{0, count};
  for (int64_t t = 0; t < tap_count; ++t) {
    if (taps[t].columns.begin > all.begin) all.begin = taps[t].columns.begin;
    if (taps[t].columns.end < all.end) all.end = taps[t].columns.end;
  }
  if (all.begin > count) all.begin = count;
  if (all.end < all.begin) all.end = all.begin;
  return all;
}

template <class T>
struct Row {
  const T* in;             // [.., C]
  const acc_t<T>* weight;  // [taps, C]
  const Tap* taps;
  int64_t tap_count;
  int64_t c, in_step, out_columns, out_step;
  int64_t out;  // element of the output at column 0
};

// kCount outputs from column j on, of one vector of channels, all of which every tap reaches. kTaps weights are given in
// registers, or, with kTaps = 0, all are read here.
template <int kCount, int kTaps, class T, class Lanes>
ADVDL_INLINE void correlate_columns(const Row<T>& row, const Epilogue<T>& epilogue,
                                    const typename Epilogue<T>::Vec* weights, int64_t j, int64_t c,
                                    const Lanes& lanes) {
  using Vec = typename Epilogue<T>::Vec;
  Vec sums[kCount] = {};
  const int64_t step = row.in_step * row.c;
  const T* start = row.in + j * step + c;
  if constexpr (kTaps > 0) {
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) {
      const T* in = start + row.taps[t].from;
#pragma GCC unroll 8
      for (int k = 0; k < kCount; ++k) sums[k] += lanes.read(in + k * step) * weights[t];
    }
  } else {
    for (int64_t t = 0; t < row.tap_count; ++t) {
      const Vec weight = lanes.read(row.weight + row.taps[t].weight * row.c + c);
      const T* in = start + row.taps[t].from;
#pragma GCC unroll 8
      for (int k = 0; k < kCount; ++k) sums[k] += lanes.read(in + k * step) * weight;
    }
  }
  epilogue.template finish<kCount>(
      sums, lanes.read(epilogue.scale + c), lanes.read(epilogue.shift + c),
      row.out + j * row.out_step * row.c + c, row.out_step * row.c, lanes);
}

// All columns of `inside` but for a last odd one, of one vector of channels. The nine weights of a 3x3 stay in registers.
template <int kTaps, class T, class Lanes>
ADVDL_INLINE void correlate_inside(const Row<T>& row, const Epilogue<T>& epilogue,
                                   const Columns& inside, int64_t c, const Lanes& lanes) {
  using Vec = typename Epilogue<T>::Vec;
  Vec weights[kTaps > 0 ? kTaps : 1];
  if constexpr (kTaps > 0) {
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) {
      weights[t] = lanes.read(row.weight + row.taps[t].weight * row.c + c);
    }
  }
  int64_t j = inside.begin;
  for (; j + kColumns <= inside.end; j += kColumns) {
    correlate_columns<kColumns, kTaps>(row, epilogue, weights, j, c, lanes);
  }
  for (; j + 2 <= inside.end; j += 2) {
    correlate_columns<2, kTaps>(row, epilogue, weights, j, c, lanes);
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
  const Columns inside = reached_by_all(row.taps, row.tap_count, row.out_columns);
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
  border(0, inside.begin);
  for_vectors<Acc, 1>(row.c, [&](int64_t c, const auto& policy, auto) {
    // With the 16 registers of AVX2 nine weights and eight sums are too many.
    if (ADVDL_VECTOR_BYTES == 64 && row.tap_count == 9) {
      correlate_inside<9>(row, epilogue, inside, c, policy);
    } else {
      correlate_inside<0>(row, epilogue, inside, c, policy);
    }
  });
  border(inside.begin + (inside.end - inside.begin) / 2 * 2, row.out_columns);
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

// Room for the taps of one row, for each of the rows that run at once: on the stack of whoever runs them.
constexpr int64_t kTapsOnStack = 256;
struct TapStorage {
  Tap few[kTapsOnStack];
  Tap* many = nullptr;
  explicit TapStorage(int64_t count) {
    if (count > kTapsOnStack) many = new Tap[count];
  }
  ~TapStorage() { delete[] many; }
  TapStorage(const TapStorage&) = delete;
  TapStorage& operator=(const TapStorage&) = delete;
  Tap* taps() { return many != nullptr ? many : few; }
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
    for (int64_t b = 0; b < s.w.kernel; ++b) {
      const int64_t along = r + s.w.padding - b * s.w.dilation;
      const int64_t column = floor_div(along, s.w.stride);
      if (column * s.w.stride != along) continue;
      taps[count++] = {((n * s.h.out + place / s.h.stride) * s.w.out + column) * s.c,
                       a * s.w.kernel + b, reached(column, 1, s.w.out, columns)};
    }
  }
  return count;
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
                             p.scale != nullptr || p.shift != nullptr};
  cpu::parallel_ranges(s.n * s.h.out, s.w.out * s.c, [&](int64_t begin, int64_t end) {
    TapStorage storage(s.taps());
    Row<T> row{static_cast<const T*>(p.x),
               parameters.weight,
               storage.taps(),
               0,
               s.c,
               s.w.stride,
               s.w.out,
               1,
               0};
    for (int64_t i = begin; i < end; ++i) {
      row.tap_count = forward_taps(s, i / s.h.out, i % s.h.out, storage.taps());
      row.out = i * s.w.out * s.c;
      correlate_row(row, epilogue);
    }
  });
}

template <class T>
void input_gradient(const DepthwiseConv2dBackward& p, const Parameters<acc_t<T>>& parameters) {
  const DepthwiseConv2dShape& s = p.shape;
  const Epilogue<T> epilogue{parameters.scale,
                             parameters.shift,
                             nullptr,
                             static_cast<T*>(p.dx),
                             Activation::identity,
                             0,
                             false};
  cpu::parallel_ranges(s.n * s.h.in, s.w.in * s.c, [&](int64_t begin, int64_t end) {
    TapStorage storage(s.taps());
    Row<T> row{static_cast<const T*>(p.dz),
               parameters.weight,
               storage.taps(),
               0,
               s.c,
               1,
               0,
               s.w.stride,
               0};
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t r = 0; r < s.w.stride && r < s.w.in; ++r) {
        row.tap_count = gradient_taps(s, i / s.h.in, i % s.h.in, r, storage.taps());
        row.out_columns = ceil_div(s.w.in - r, s.w.stride);
        row.out = (i * s.w.in + r) * s.c;
        correlate_row(row, epilogue);
      }
    }
  });
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

// sums[k] [C] += dz[j] * x[j * step + from[k]] of one row, one vector of channels.
template <int kTaps, class T, class Lanes>
ADVDL_INLINE void add_products(const T* dz, const T* x, const Tap* taps, const Columns& inside,
                               const DepthwiseConv2dShape& s, acc_t<T>* sums, int64_t c,
                               const Lanes& lanes) {
  using Vec = typename Simd<acc_t<T>>::Vec;
  Vec acc[kTaps];
  const T* from[kTaps];
  const int64_t step = s.w.stride * s.c;
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) {
    acc[k] = lanes.read(sums + taps[k].weight * s.c + c);
    from[k] = x + taps[k].from + c;
  }
  for (int64_t j = inside.begin; j < inside.end; ++j) {
    const Vec gradient = lanes.read(dz + j * s.c + c);
    const int64_t at = j * step;
#pragma GCC unroll 16
    for (int k = 0; k < kTaps; ++k) acc[k] += gradient * lanes.read(from[k] + at);
  }
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) {
    const Columns own = taps[k].columns;
    const auto add = [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        acc[k] += lanes.read(dz + j * s.c + c) * lanes.read(from[k] + j * step);
      }
    };
    add(own.begin, own.end < inside.begin ? own.end : inside.begin);
    add(own.begin > inside.end ? own.begin : inside.end, own.end);
  }
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) lanes.write(sums + taps[k].weight * s.c + c, acc[k]);
}

template <class T>
void add_row(const DepthwiseConv2dShape& s, const T* dz, const T* x, const Tap* taps,
             int64_t tap_count, acc_t<T>* sums, bool adds_bias, int64_t c_begin, int64_t c_end) {
  using Acc = acc_t<T>;
  const Columns inside = reached_by_all(taps, tap_count, s.w.out);
  // No overlapping vectors: sums are added to.
  for_vectors<Acc, 1, false>(c_end - c_begin, [&](int64_t i, const auto& lanes, auto) {
    const int64_t c = c_begin + i;
    int64_t t = 0;
    for (; t + 9 <= tap_count; t += 9) add_products<9>(dz, x, taps + t, inside, s, sums, c, lanes);
    for (; t + 3 <= tap_count; t += 3) add_products<3>(dz, x, taps + t, inside, s, sums, c, lanes);
    for (; t < tap_count; ++t) add_products<1>(dz, x, taps + t, inside, s, sums, c, lanes);
    if (adds_bias) {
      Acc* bias = sums + s.taps() * s.c + c;
      auto acc = lanes.read(bias);
      for (int64_t j = 0; j < s.w.out; ++j) acc += lanes.read(dz + j * s.c + c);
      lanes.write(bias, acc);
    }
  });
}

template <class T>
void weight_gradient(const DepthwiseConv2dBackward& p, void* partial_sums) {
  using Acc = acc_t<T>;
  const DepthwiseConv2dShape& s = p.shape;
  const Split split(s);
  const int64_t per_part = (s.taps() + 1) * s.c, rows = s.n * s.h.out;
  Acc* partial = static_cast<Acc*>(partial_sums);
  const bool wants_weight = p.dweight != nullptr;
  cpu::parallel_ranges(
      split.parts * split.blocks, split.rows * s.w.out * split.channels,
      [&](int64_t begin, int64_t end) {
        TapStorage storage(s.taps());
        for (int64_t task = begin; task < end; ++task) {
          const int64_t part = task / split.blocks, block = task % split.blocks;
          const int64_t c_begin = block * split.channels;
          const int64_t c_end = c_begin + split.channels < s.c ? c_begin + split.channels : s.c;
          Acc* sums = partial + part * per_part;
          for (int64_t t = 0; t <= s.taps(); ++t) {
            for (int64_t c = c_begin; c < c_end; ++c) sums[t * s.c + c] = 0;
          }
          const int64_t last = (part + 1) * split.rows < rows ? (part + 1) * split.rows : rows;
          for (int64_t i = part * split.rows; i < last; ++i) {
            const int64_t count =
                wants_weight ? forward_taps(s, i / s.h.out, i % s.h.out, storage.taps()) : 0;
            add_row(s, static_cast<const T*>(p.dz) + i * s.w.out * s.c, static_cast<const T*>(p.x),
                    storage.taps(), count, sums, p.dbias != nullptr, c_begin, c_end);
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
    if (p.dx != nullptr) {
      Parameters<Acc> parameters(workspace, p.shape);
      parameters.fill(p.shape, p.weight, nullptr, nullptr);
      input_gradient<T>(p, parameters);
    }
    if (p.dweight != nullptr || p.dbias != nullptr) {
      weight_gradient<T>(p, static_cast<char*>(workspace) + Parameters<Acc>::bytes(p.shape));
    }
  });
}

}  // namespace

void add_depthwise_conv2d_last(cpu::KernelTable& table) {
  table.depthwise_conv2d_last_forward_workspace = forward_workspace;
  table.depthwise_conv2d_last_backward_workspace = backward_workspace;
  table.depthwise_conv2d_last_forward = run_forward;
  table.depthwise_conv2d_last_backward = run_backward;
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
