// The transform of a weight for Winograd's convolution.
#pragma once

#include "depthwise_conv2d.h"
#include "matmul.h"
#include "winograd_conv2d_tile.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

// f<S>() for the stored type.
template <class F>
ADVDL_INLINE auto with_stored(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16:
      return f.template operator()<BFloat16>();
    case DType::f16:
      return f.template operator()<Float16>();
    default:
      return f.template operator()<float>();
  }
}
inline float element(DType dtype, const void* data, int64_t at) {
  return with_stored(dtype, [&]<class S>() { return widened(static_cast<const S*>(data)[at]); });
}
// data + elements
inline const void* moved(DType dtype, const void* data, int64_t elements) {
  return data == nullptr ? nullptr
                         : static_cast<const char*>(data) + elements * element_bytes(dtype);
}

// Elements of one panel at one point. A row more, as distances of a power of two would share few sets of a cache.
inline int64_t packed_of_point(const WinogradFilters& f) { return (f.c_in + 1) * kPanel<float>; }
// Of one group.
template <class T>
int64_t packed_size_of(const WinogradFilters& f) {
  return T::points * ceil_div(f.c_out, kPanel<float>) * packed_of_point(f);
}

// Where the taps of a weight are, for sums over its input channels; turned: over its output channels.
struct Taps {
  // Elements from one output channel, input channel and tap to the next.
  int64_t of_out, of_in, tap;
  Taps(const WinogradFilters& f, const WinogradWeight& w) {
    const bool is_last = w.layout == Layout::channels_last;
    const int64_t first = w.turned ? f.c_out : f.c_in;  // channels of a row of the weight
    const int64_t row = first * kTaps, column = is_last ? 1 : kTaps;
    of_out = w.turned ? column : row;
    of_in = w.turned ? row : column;
    tap = is_last ? first : 1;
  }
};

// Input channels that are transformed at a time: their numbers stay in the first-level cache. Output channels: a
// vector.
inline constexpr int64_t kPackInputs = 8;

// to[input * kTaps + tap][output] of up to kPackInputs and kLanes channels; zeros for outputs that do not exist.
template <class S>
void read_taps(const Taps& taps, const S* from, int64_t inputs, int64_t outputs,
               float (*to)[kLanes]) {
  if (taps.of_out == 1) {
    with_lanes<float>(outputs, [&](auto part) {
      for (int64_t i = 0; i < inputs * kTaps; ++i)
        store(to[i], part.read(from + i / kTaps * taps.of_in + i % kTaps * taps.tap));
    });
    return;
  }
  // Runs of neighbouring numbers, which are transposed. A run goes over inputs and taps, over inputs, or over taps.
  struct {
    int64_t count, length, distance;  // of the runs
    int64_t next_run, next;           // rows of `to`
  } runs;
  if (taps.of_in == kTaps && taps.tap == 1)
    runs = {1, inputs * kTaps, 0, 0, 1};
  else if (taps.of_in == 1)
    runs = {kTaps, inputs, taps.tap, 1, kTaps};
  else
    runs = {inputs, kTaps, taps.of_in, kTaps, 1};
  for (int64_t run = 0; run < runs.count; ++run) {
    for (int64_t first = 0; first < runs.length; first += kLanes) {
      const int64_t count = min_of(kLanes, runs.length - first);
      Vec block[kLanes] = {};
      with_lanes<float>(count, [&](auto part) {
        const S* start = from + run * runs.distance + first;
        for (int64_t lane = 0; lane < outputs; ++lane)
          block[lane] = part.read(start + lane * taps.of_out);
      });
      transpose<decltype(block[0] < block[0])>(block);
      for (int64_t i = 0; i < count; ++i)
        store(to[run * runs.next_run + (first + i) * runs.next], block[i]);
    }
  }
}

// to[point][channel][panel]: the input channels [begin, end) of panel q of the group that w begins with, points
// `of_point` apart. In fp64, as the points are no powers of two.
template <class T>
void pack_panel(const WinogradFilters& f, const WinogradWeight& w, int64_t q, int64_t begin,
                int64_t end, float* to, int64_t of_point) {
  constexpr int64_t panel = kPanel<float>, half = Simd<double>::lanes;
  typedef float HalfVec __attribute__((vector_size(ADVDL_VECTOR_BYTES / 2)));
  const Taps taps(f, w);
  alignas(64) float read[kPackInputs * kTaps][kLanes] = {};
  for (int64_t c = begin; c < end; c += kPackInputs) {
    const int64_t inputs = min_of(kPackInputs, end - c);
    for (int64_t first = 0; first < panel; first += kLanes) {
      const int64_t o = q * panel + first, outputs = max_of(0, min_of(kLanes, f.c_out - o));
      if (outputs > 0) {
        with_stored(w.dtype, [&]<class S>() {
          read_taps(taps, static_cast<const S*>(w.data) + o * taps.of_out + c * taps.of_in, inputs,
                    outputs, read);
        });
      } else {
        for (auto& row : read) store(row, Vec{});
      }
      for (int64_t k = 0; k < inputs; ++k) {
        for (int64_t lane = 0; lane < kLanes; lane += half) {
          DoubleVec g[kTaps], m[T::points];
#pragma GCC unroll 9
          for (int t = 0; t < kTaps; ++t) {
            HalfVec v;
            std::memcpy(&v, read[k * kTaps + (w.turned ? kTaps - 1 - t : t)] + lane, sizeof(v));
            g[t] = __builtin_convertvector(v, DoubleVec);
          }
          T::weights(g, m);
          float* at = to + (c - begin + k) * panel + first + lane;
#pragma GCC unroll 36
          for (int i = 0; i < T::points; ++i) {
            const HalfVec v = __builtin_convertvector(m[i], HalfVec);
            std::memcpy(at + i * of_point, &v, sizeof(v));
          }
        }
      }
    }
  }
}

// The weight of the group that w begins with.
template <class T>
void pack(const WinogradFilters& f, const WinogradWeight& w, float* packed) {
  constexpr int64_t panel = kPanel<float>;
  const int64_t panels = ceil_div(f.c_out, panel), parts = ceil_div(f.c_in, kPackInputs);
  cpu::parallel_ranges(panels * parts, kPackInputs * panel * T::points * 2,
                       [&](int64_t begin, int64_t end) {
                         for (int64_t i = begin; i < end; ++i) {
                           const int64_t q = i / parts, c = i % parts * kPackInputs;
                           pack_panel<T>(f, w, q, c, min_of(c + kPackInputs, f.c_in),
                                         packed + q * T::points * packed_of_point(f) + c * panel,
                                         packed_of_point(f));
                         }
                       });
}

// The part of a weight that is group g's.
inline WinogradWeight of_group(const WinogradFilters& f, WinogradWeight w, int64_t g) {
  w.data = moved(w.dtype, w.data, g * f.c_out * f.c_in * kTaps);
  return w;
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
