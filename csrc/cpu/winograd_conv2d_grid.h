// The grid of tiles of Winograd's convolution: where their inputs and outputs are.
#pragma once

#include "winograd_conv2d_weight.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

inline constexpr int64_t kCacheLine = 64;  // bytes
inline constexpr int64_t kLineFloats = kCacheLine / int64_t{sizeof(float)};

// The M outputs of a tile along one axis and its M + 2 inputs, by coordinates in the image. Inputs at -1 and at the
// size of the image are zeros; outputs at the size of the image are none.
template <int M>
struct Strip {
  int64_t out[M], in[M + 2];
  bool is_full;    // all outputs exist, in steps of the dilation
  bool is_inside;  // and no input is a zero
  bool follows;    // its first two inputs are the last two of the strip before
};

// The strips of one axis. A dilated convolution is one without dilation on each of the grids of every dilation-th
// coordinate. The strips cover one grid after the other. Where a grid leaves outputs of its last strip unused, the
// next one begins there, behind a gap of two unused outputs, so that no input belongs to both. One is enough where the
// input of both is padding.
template <int M>
class Strips {
 public:
  explicit Strips(const Conv2dAxis& axis) : axis_(axis), count(divide(nullptr)) {}
  size_t bytes() const { return count * sizeof(Strip<M>); }
  // memory: bytes()
  void fill(void* memory) {
    strips_ = static_cast<Strip<M>*>(memory);
    divide(strips_);
  }
  const Strip<M>* at(int64_t index) const { return strips_ + index; }

 private:
  // Returns how many there are.
  int64_t divide(Strip<M>* strips) const {
    const int64_t gap = axis_.padding >= axis_.dilation ? 1 : 2;
    int64_t strip = -1, used = M;  // outputs of the strip
    for (int64_t grid = 0; grid < min_of(axis_.dilation, axis_.out); ++grid, used += gap) {
      for (int64_t out = grid; out < axis_.out; out += axis_.dilation, ++used) {
        if (used >= M) {
          used = 0;
          ++strip;
          if (strips != nullptr) clear(strips[strip]);
        }
        if (strips != nullptr) add(strips[strip], used, out);
      }
    }
    if (strips != nullptr) {
      for (int64_t i = 0; i <= strip; ++i) mark(strips, i);
    }
    return strip + 1;
  }

  void clear(Strip<M>& strip) const {
    for (int64_t& out : strip.out) out = axis_.out;
    for (int64_t& in : strip.in) in = axis_.in;
  }
  void add(Strip<M>& strip, int64_t at, int64_t out) const {
    strip.out[at] = out;
    for (int64_t tap = 0; tap < 3; ++tap) {
      const int64_t in = out + tap * axis_.dilation - axis_.padding;
      strip.in[at + tap] = max_of(-1, min_of(in, axis_.in));
    }
  }
  void mark(Strip<M>* strips, int64_t index) const {
    Strip<M>& strip = strips[index];
    strip.is_full =
        strip.out[M - 1] < axis_.out && strip.out[M - 1] - strip.out[0] == (M - 1) * axis_.dilation;
    strip.is_inside = strip.is_full && strip.in[0] >= 0 && strip.in[M + 1] < axis_.in;
    const Strip<M>& before = strips[max_of(0, index - 1)];
    strip.follows = index > 0 && strip.in[0] == before.in[M] && strip.in[1] == before.in[M + 1];
  }

  const Conv2dAxis& axis_;
  Strip<M>* strips_ = nullptr;

 public:
  const int64_t count;
};

// Tiles by image, row of strips and column of strips, the last the fastest.
template <class T>
class Grid {
 public:
  const WinogradConv2dShape& s;
  Strips<T::MH> rows;
  Strips<T::MW> columns;

  explicit Grid(const WinogradConv2dShape& shape) : s(shape), rows(shape.h), columns(shape.w) {}
  int64_t tiles() const { return s.n * rows.count * columns.count; }
  // Tiles of a dilated row interleave, so that its pixels are staged as a whole.
  bool stages_rows() const { return s.w.dilation > 1; }

  // Makes the strips and the zeros. memory: bytes(), aligned to a line of the cache.
  void fill(void* memory) {
    char* at = static_cast<char*>(memory);
    rows.fill(at);
    columns.fill(at + rows.bytes());
    zeros_ = at + round_up(rows.bytes() + columns.bytes(), kCacheLine);
    std::memset(zeros_, 0, zeros_size());
  }
  size_t bytes() const {
    return round_up(rows.bytes() + columns.bytes(), kCacheLine) + zeros_size();
  }

  struct Place {
    int64_t n, row, column;  // strips
  };
  Place place(int64_t tile) const {
    const int64_t row = tile / columns.count;
    return {row / rows.count, row % rows.count, tile % columns.count};
  }
  // As many as a pixel has channels of a group.
  template <class S>
  const S* zeros() const {
    return reinterpret_cast<const S*>(zeros_);
  }

 private:
  int64_t zeros_size() const {
    return round_up(max_of(s.c_in, s.c_out) * int64_t{sizeof(float)}, kCacheLine);
  }
  char* zeros_ = nullptr;
};

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
