// Dense convolution of channels_last images as products of matrices (see matmul.h): for each tap of the filter rows of pixels
// times a matrix of weights. Packed are weights alone, from the format that they have; pixels are read where they lie, or zeros
// beside the image.
//
// Forward and input gradient are one loop: out[p] = sum over taps of from[p * step + offset] times the matrix of the tap. For
// the gradient `from` is dz, and with a stride the pixels of dx fall into stride x stride phases, each with taps of its own,
// so that nothing is multiplied by the zeros in between (Dumoulin & Visin 2016, arXiv:1603.07285, section 4.6).
#include "../common/dense_conv2d.h"

#include "depthwise_conv2d.h"
#include "dispatch.h"
#include "matmul.h"
#include "parallel.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

// A panel of packed weights of this depth stays in the first-level cache (32 KB) while the tiles of a block pass by.
constexpr int64_t kConvDepth = 128;
// Pixels, or rows of a gradient, whose sums one thread keeps in the second-level cache at a time.
constexpr int64_t kMaxTaps = 64;  // of a filter
constexpr int64_t kBlockTiles = 16, kBlockRows = kBlockTiles * kTileRows;

struct Image {
  int64_t n, h, w;
};

// A tap of the filter as the pixel that it reads, relative to the one that is written, and its place in the weight.
struct Tap {
  int64_t h, w, index;
};

// Along one axis the pixels first, first + step, ... of the output, `count` of them, of which the j-th reads at j * stride + the
// offset of a tap.
struct GridAxis {
  int64_t first, step, count, stride;
};

// ---- out[p] = sum over taps of from[p * stride + offset] times the matrix of the tap ----

template <class A>
struct PixelProduct {
  const A* from;  // [N, from.h, from.w, depth]
  Image image;    // of from
  int64_t depth;
  GridAxis h, w;  // of out
  const Tap* taps;
  int64_t tap_count;
  const A*
      panels;    // [panels][rows][panel]: the k-th row of a tap is tap * tap_step + k * depth_step
  int64_t rows;  // depth times the taps of the filter
  int64_t tap_step, depth_step;
  int64_t columns;  // of out
  const A* zeros;   // [depth]

  int64_t pixels() const { return image.n * h.count * w.count; }
};

template <class A>
void clear(A* sums, int64_t rows) {
  for (int64_t i = 0; i < rows * kPanel<A>; ++i) sums[i] = 0;
}

// tile[rows][panel] of the rows pixels from `first` on.
template <class A>
void multiply_pixels(const PixelProduct<A>& p, int64_t first, int64_t rows, const A* panel,
                     A* tile) {
  int64_t at_n[kBlockRows], at_h[kBlockRows], at_w[kBlockRows];
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t pixel = first + i, in_image = p.h.count * p.w.count;
    at_n[i] = pixel / in_image;
    at_h[i] = pixel % in_image / p.w.count * p.h.stride;
    at_w[i] = pixel % p.w.count * p.w.stride;
  }
  const A* from[kBlockRows];
  for (int64_t t = 0; t < p.tap_count; ++t) {
    const Tap tap = p.taps[t];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t y = at_h[i] + tap.h, x = at_w[i] + tap.w;
      const bool inside = y >= 0 && y < p.image.h && x >= 0 && x < p.image.w;
      from[i] = inside ? p.from + ((at_n[i] * p.image.h + y) * p.image.w + x) * p.depth : p.zeros;
    }
    const A* matrix = panel + tap.index * p.tap_step * kPanel<A>;
    const int64_t step = p.depth_step * kPanel<A>;
    for (int64_t k = 0; k < p.depth; k += kConvDepth) {
      const int64_t depth = min_of(kConvDepth, p.depth - k);
      for (int64_t i = 0; i < rows; i += kTileRows) {
        const A* row[kTileRows];
        const int64_t height = min_of(kTileRows, rows - i);
        for (int64_t j = 0; j < height; ++j) row[j] = from[i + j] + k;
        multiply_tile<1>(height, row, matrix + k * step, step, depth, tile + i * kPanel<A>,
                         kPanel<A>, t > 0 || k > 0);
      }
    }
  }
}

// finish(pixel of the grid, its image, row, column of out, first column of the panel, sums[panel])
template <class A, class Finish>
void multiply_image(const PixelProduct<A>& p, Finish&& finish) {
  const int64_t panels = ceil_div(p.columns, kPanel<A>);
  const int64_t tiles = ceil_div(p.pixels(), kTileRows);
  const int64_t work = kTileRows * kPanel<A> * (p.tap_count * p.depth / 16 + 1);
  cpu::parallel_ranges(panels * tiles, work, [&](int64_t begin, int64_t end) {
    alignas(64) A sums[kBlockRows * kPanel<A>];
    while (begin < end) {
      const int64_t panel = begin / tiles, tile = begin % tiles;
      const int64_t count = min_of(min_of(end - begin, tiles - tile), kBlockTiles);
      const int64_t first = tile * kTileRows;
      const int64_t rows = min_of(count * kTileRows, p.pixels() - first);
      if (p.tap_count * p.depth == 0) clear(sums, rows);
      multiply_pixels(p, first, rows, p.panels + panel * p.rows * kPanel<A>, sums);
      const int64_t in_image = p.h.count * p.w.count;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t pixel = first + i;
        finish(pixel / in_image, p.h.first + pixel % in_image / p.w.count * p.h.step,
               p.w.first + pixel % p.w.count * p.w.step, panel * kPanel<A>, sums + i * kPanel<A>);
      }
      begin += count;
    }
  });
}

// ---- forward ----

// [C_out][depth], the depth as it lies, as panels of columns [panels][depth][panel].
template <class A>
void pack_forward(const DenseConv2dShape& s, const A* weight, A* panels) {
  const int64_t depth = s.taps() * s.c_in, count = ceil_div(s.c_out, kPanel<A>);
  constexpr int64_t lanes = Simd<A>::lanes;
  // In pieces of depth, as there may be fewer panels than threads.
  const int64_t pieces = ceil_div(depth, kConvDepth);
  cpu::parallel_ranges(count * pieces, kConvDepth * kPanel<A>, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const int64_t panel = begin / pieces, first = begin % pieces * kConvDepth;
      const int64_t row = panel * kPanel<A>;
      A* target = panels + (panel * depth + first) * kPanel<A>;
      const int64_t part = min_of(kConvDepth, depth - first);
      for (int64_t v = 0; v < kPanelVectors; ++v) {
        const int64_t rows = max_of(0, min_of(lanes, s.c_out - row - v * lanes));
        const A* source = weight + (row + v * lanes) * depth + first;
        for_vectors<A, 1, false>(part, [&](int64_t k, auto loaded, auto) {
          typename Simd<A>::Vec block[lanes] = {};
          if (rows == lanes) {
            for (int64_t i = 0; i < lanes; ++i) block[i] = loaded.read(source + i * depth + k);
          } else {
            for (int64_t i = 0; i < rows; ++i) block[i] = loaded.read(source + i * depth + k);
          }
          transpose<decltype(block[0] < block[0])>(block);
          for (int64_t i = 0; i < loaded.count(lanes); ++i)
            store(target + (k + i) * kPanel<A> + v * lanes, block[i]);
        });
      }
    }
  });
}

template <class A>
void forward(const DenseConv2dForward& p, void* workspace) {
  const DenseConv2dShape& s = p.shape;
  A* panels = static_cast<A*>(workspace);
  A* zeros = panels + round_up(s.c_out, kPanel<A>) * s.taps() * s.c_in;
  for (int64_t i = 0; i < s.c_in; ++i) zeros[i] = 0;
  pack_forward(s, static_cast<const A*>(p.weight), panels);
  Tap taps[kMaxTaps];
  for (int64_t a = 0; a < s.h.kernel; ++a) {
    for (int64_t b = 0; b < s.w.kernel; ++b) {
      const int64_t index = a * s.w.kernel + b;
      taps[index] = {a * s.h.dilation - s.h.padding, b * s.w.dilation - s.w.padding, index};
    }
  }
  const GridAxis h{0, 1, s.h.out, s.h.stride}, w{0, 1, s.w.out, s.w.stride};
  const bool is_last = s.weight_layout == Layout::channels_last;
  const PixelProduct<A> product{static_cast<const A*>(p.x),
                                {s.n, s.h.in, s.w.in},
                                s.c_in,
                                h,
                                w,
                                taps,
                                s.taps(),
                                panels,
                                s.taps() * s.c_in,
                                is_last ? s.c_in : 1,
                                is_last ? 1 : s.taps(),
                                s.c_out,
                                zeros};
  const A* shift = static_cast<const A*>(p.shift);
  const Epilogue<A> epilogue{nullptr,
                             shift,
                             static_cast<const A*>(p.residual),
                             static_cast<A*>(p.out),
                             p.act,
                             static_cast<A>(p.act_param),
                             shift != nullptr};
  const typename Simd<A>::Vec one = broadcast(A{1}), none{};
  multiply_image(product, [&](int64_t n, int64_t y, int64_t x, int64_t column, const A* sums) {
    const int64_t at = ((n * s.h.out + y) * s.w.out + x) * s.c_out + column;
    const int64_t count = min_of(kPanel<A>, s.c_out - column);
    for_vectors<A, 1, false>(count, [&](int64_t j, auto part, auto) {
      typename Simd<A>::Vec sum[1] = {load(sums + j)};
      epilogue.finish(sum, one, shift == nullptr ? none : part.read(shift + column + j), at + j, 1,
                      part);
    });
  });
}

// ---- backward ----

// The weight as panels of columns [panels][taps][C_out][panel].
template <class A>
void pack_backward(const DenseConv2dShape& s, const A* weight, A* panels) {
  constexpr int64_t kRows = 8;
  const int64_t count = ceil_div(s.c_in, kPanel<A>), taps = s.taps();
  const int64_t pieces = ceil_div(s.c_out, kRows);
  const int64_t work = kRows * taps * kPanel<A>;
  cpu::parallel_ranges(count * pieces, work, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const int64_t column = begin / pieces * kPanel<A>, first = begin % pieces * kRows;
      const int64_t width = min_of(kPanel<A>, s.c_in - column);
      const int64_t rows = min_of(kRows, s.c_out - first);
      for (int64_t tap = 0; tap < taps; ++tap) {
        A* target = panels + ((begin / pieces * taps + tap) * s.c_out + first) * kPanel<A>;
        if (s.weight_layout == Layout::channels_last) {
          pack_columns(width, rows, target, [&](int64_t k) {
            return weight + ((first + k) * taps + tap) * s.c_in + column;
          });
          continue;
        }
        for (int64_t k = 0; k < rows; ++k, target += kPanel<A>) {
          const A* source = weight + ((first + k) * s.c_in + column) * taps + tap;
          for (int64_t j = 0; j < width; ++j) target[j] = source[j * taps];
          for (int64_t j = width; j < kPanel<A>; ++j) target[j] = 0;
        }
      }
    }
  });
}

// Pixels first, first + stride ... of dx along one axis, and the taps [0, kernel) that reach them: from[tap] is what the first
// one reads of dz, and the next ones read the next.
int64_t taps_of_phase(const Conv2dAxis& a, int64_t first, int64_t* from, int64_t* tap) {
  int64_t count = 0;
  for (int64_t k = 0; k < a.kernel; ++k) {
    const int64_t at = first + a.padding - k * a.dilation;
    if (floor_div(at, a.stride) * a.stride != at) continue;
    from[count] = floor_div(at, a.stride);
    tap[count++] = k;
  }
  return count;
}

template <class A>
void backward_input(const DenseConv2dBackward& p, A* workspace) {
  const DenseConv2dShape& s = p.shape;
  A* zeros = workspace + round_up(s.c_in, kPanel<A>) * s.taps() * s.c_out;
  for (int64_t i = 0; i < s.c_out; ++i) zeros[i] = 0;
  pack_backward(s, static_cast<const A*>(p.weight), workspace);
  A* dx = static_cast<A*>(p.dx);
  for (int64_t y = 0; y < min_of(s.h.stride, s.h.in); ++y) {
    for (int64_t x = 0; x < min_of(s.w.stride, s.w.in); ++x) {
      int64_t rows[kMaxTaps], columns[kMaxTaps], tap_h[kMaxTaps], tap_w[kMaxTaps];
      const int64_t height = taps_of_phase(s.h, y, rows, tap_h);
      const int64_t width = taps_of_phase(s.w, x, columns, tap_w);
      Tap taps[kMaxTaps];
      for (int64_t a = 0; a < height; ++a) {
        for (int64_t b = 0; b < width; ++b)
          taps[a * width + b] = {rows[a], columns[b], tap_h[a] * s.w.kernel + tap_w[b]};
      }
      const GridAxis h{y, s.h.stride, ceil_div(s.h.in - y, s.h.stride), 1};
      const GridAxis w{x, s.w.stride, ceil_div(s.w.in - x, s.w.stride), 1};
      const PixelProduct<A> product{static_cast<const A*>(p.dz),
                                    {s.n, s.h.out, s.w.out},
                                    s.c_out,
                                    h,
                                    w,
                                    taps,
                                    height * width,
                                    workspace,
                                    s.taps() * s.c_out,
                                    s.c_out,
                                    1,
                                    s.c_in,
                                    zeros};
      multiply_image(product, [&](int64_t n, int64_t i, int64_t j, int64_t column, const A* sums) {
        A* to = dx + ((n * s.h.in + i) * s.w.in + j) * s.c_in + column;
        for_vectors<A, 1, false>(
            min_of(kPanel<A>, s.c_in - column),
            [&](int64_t k, auto part, auto) { part.write(to + k, load(sums + k)); });
      });
    }
  }
}

// [pixels][C_out] as [tiles][pixels][tile]: what one tile multiplies with lies together.
template <class A>
void pack_gradient(const A* dz, int64_t pixels, int64_t channels, A* to) {
  constexpr int64_t kPixels = 64;
  cpu::parallel_ranges(
      ceil_div(pixels, kPixels), kPixels * channels, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin) {
          const int64_t first = begin * kPixels, last = min_of(first + kPixels, pixels);
          for (int64_t c = 0; c < channels; c += kTileRows) {
            const int64_t count = min_of(kTileRows, channels - c);
            A* target = to + c * pixels;
            for (int64_t i = first; i < last; ++i) {
              const A* source = dz + i * channels + c;
              for (int64_t j = 0; j < count; ++j) target[i * kTileRows + j] = source[j];
            }
          }
        }
      });
}

template <class A>
void backward_weight(const DenseConv2dBackward& p, A* workspace) {
  const DenseConv2dShape& s = p.shape;
  const int64_t pixels = s.n * s.h.out * s.w.out, taps = s.taps();
  const A* x = static_cast<const A*>(p.x);
  A* zeros = workspace + round_up(s.c_out, kTileRows) * pixels;
  const bool converts = s.weight_layout == Layout::channels_first && taps > 1;
  A* found = converts ? zeros + s.c_in : static_cast<A*>(p.dweight);  // [C_out][taps][C_in]
  for (int64_t i = 0; i < s.c_in; ++i) zeros[i] = 0;
  pack_gradient(static_cast<const A*>(p.dz), pixels, s.c_out, workspace);
  const int64_t panels = ceil_div(s.c_in, kPanel<A>), tiles = ceil_div(s.c_out, kTileRows);
  const int64_t work = kTileRows * kPanel<A> * (pixels / 16 + 1);
  cpu::parallel_ranges(taps * panels * tiles, work, [&](int64_t begin, int64_t end) {
    alignas(64) A sums[kBlockRows * kPanel<A>];
    alignas(64) A panel[kConvDepth * kPanel<A>];
    while (begin < end) {
      const int64_t of_tap = begin / tiles, tile = begin % tiles;
      const int64_t count = min_of(min_of(end - begin, tiles - tile), kBlockTiles);
      const int64_t first = tile * kTileRows, rows = min_of(count * kTileRows, s.c_out - first);
      const int64_t tap = of_tap / panels, column = of_tap % panels * kPanel<A>;
      const int64_t width = min_of(kPanel<A>, s.c_in - column);
      const int64_t offset_h = tap / s.w.kernel * s.h.dilation - s.h.padding;
      const int64_t offset_w = tap % s.w.kernel * s.w.dilation - s.w.padding;
      if (pixels == 0) clear(sums, rows);
      int64_t n = 0, i = 0, j = 0;  // of the next pixel
      for (int64_t k = 0; k < pixels; k += kConvDepth) {
        const int64_t depth = min_of(kConvDepth, pixels - k);
        pack_columns(width, depth, panel, [&](int64_t) {
          const int64_t y = i * s.h.stride + offset_h, at = j * s.w.stride + offset_w;
          const bool inside = y >= 0 && y < s.h.in && at >= 0 && at < s.w.in;
          const A* row = inside ? x + ((n * s.h.in + y) * s.w.in + at) * s.c_in + column : zeros;
          if (++j == s.w.out) {
            j = 0;
            if (++i == s.h.out) i = 0, ++n;
          }
          return row;
        });
        for (int64_t r = 0; r < rows; r += kTileRows) {
          const A* row[kTileRows];
          const int64_t height = min_of(kTileRows, rows - r);
          for (int64_t q = 0; q < height; ++q)
            row[q] = workspace + (first + r) * pixels + k * kTileRows + q;
          multiply_tile<kTileRows>(height, row, panel, kPanel<A>, depth, sums + r * kPanel<A>,
                                   kPanel<A>, k > 0);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        A* to = found + ((first + r) * taps + tap) * s.c_in + column;
        for_vectors<A, 1, false>(width, [&](int64_t c, auto part, auto) {
          part.write(to + c, load(sums + r * kPanel<A> + c));
        });
      }
      begin += count;
    }
  });
  if (!converts) return;
  cpu::parallel_ranges(s.c_out, taps * s.c_in, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      const A* from = found + begin * taps * s.c_in;
      A* to = static_cast<A*>(p.dweight) + begin * taps * s.c_in;
      for (int64_t c = 0; c < s.c_in; ++c) {
        for (int64_t t = 0; t < taps; ++t) to[c * taps + t] = from[t * s.c_in + c];
      }
    }
  });
}

template <class A>
size_t forward_elements(const DenseConv2dShape& s) {
  return round_up(s.c_out, kPanel<A>) * s.taps() * s.c_in + s.c_in;
}

template <class A>
size_t backward_elements(const DenseConv2dBackward& p) {
  const DenseConv2dShape& s = p.shape;
  const int64_t of_dx = round_up(s.c_in, kPanel<A>) * s.taps() * s.c_out + s.c_out;
  const int64_t of_dweight =
      round_up(s.c_out, kTileRows) * s.n * s.h.out * s.w.out + s.c_in + s.c_out * s.taps() * s.c_in;
  return max_of(p.dx == nullptr ? 0 : of_dx, p.dweight == nullptr ? 0 : of_dweight);
}

size_t forward_workspace(const DenseConv2dForward& p) {
  const DenseConv2dShape& s = p.shape;
  return s.dtype == DType::f64 ? forward_elements<double>(s) * 8 : forward_elements<float>(s) * 4;
}
size_t backward_workspace(const DenseConv2dBackward& p) {
  return p.shape.dtype == DType::f64 ? backward_elements<double>(p) * 8
                                     : backward_elements<float>(p) * 4;
}

void run_forward(const DenseConv2dForward& p, void* workspace) {
  if (p.shape.dtype == DType::f64) return forward<double>(p, workspace);
  forward<float>(p, workspace);
}

template <class A>
void backward(const DenseConv2dBackward& p, void* workspace) {
  if (p.dx != nullptr) backward_input(p, static_cast<A*>(workspace));
  if (p.dweight != nullptr) backward_weight(p, static_cast<A*>(workspace));
}
void run_backward(const DenseConv2dBackward& p, void* workspace) {
  if (p.shape.dtype == DType::f64) return backward<double>(p, workspace);
  backward<float>(p, workspace);
}

}  // namespace

void add_dense_conv2d(cpu::KernelTable& table) {
  table.dense_conv2d_forward_workspace = forward_workspace;
  table.dense_conv2d_backward_workspace = backward_workspace;
  table.dense_conv2d_forward = run_forward;
  table.dense_conv2d_backward = run_backward;
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
