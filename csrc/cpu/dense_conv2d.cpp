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

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

constexpr int64_t kMaxTaps = 64;  // of a filter
// Rows of weights that are packed at a time, of all taps, which stay in the second-level cache; of one tap at most kTapRows,
// which stay in the first-level one.
constexpr int64_t kPackedRows = 576, kTapRows = 128;
// Pixels whose sums one thread keeps in the second-level cache meanwhile.
constexpr int64_t kBlockTiles = 44, kBlockPixels = kBlockTiles * kTileRows;
// Fewer zeros than this between two pixels of an image are multiplied by a gradient of weights.
constexpr int64_t kZerosInPanel = 8;
// Rows of a gradient of weights, times taps, that it keeps there.
constexpr int64_t kGradientRows = 864;

// A tap of the filter as the pixel that it reads, relative to the one that is written, and its place in the weight.
struct Tap {
  int64_t h, w, index;
};

// Along one axis the pixels first, first + step, ... of the output, `count` of them, of which the j-th reads at j * stride + the
// offset of a tap.
struct GridAxis {
  int64_t first, step, count, stride;
};

// `count` in equal parts of at most `most`: a short last one would cost as much to pack, or to load and store, as a long one.
ADVDL_INLINE int64_t even_part(int64_t count, int64_t most) {
  return ceil_div(count, max_of(1, ceil_div(count, most)));
}

template <class A>
void clear(A* sums, int64_t rows) {
  for (int64_t i = 0; i < rows * kPanel<A>; ++i) sums[i] = 0;
}

// ---- out[p] = sum over taps of from[p * stride + offset] times the matrix of the tap ----

template <class A>
struct PixelProduct {
  const A* from;  // [N, height, width, depth]
  int64_t n, height, width, depth;
  GridAxis h, w;    // of out
  int64_t columns;  // of out
  const A* zeros;   // [depth]
  int64_t tap_count = 0;
  Tap taps[kMaxTaps] = {};

  int64_t pixels() const { return n * h.count * w.count; }

  // Of the taps tap_h x tap_w, which the first pixels read at from_h, from_w, those by which any pixel reads inside of the image.
  void add_taps(const int64_t* tap_h, const int64_t* from_h, int64_t count_h, const int64_t* tap_w,
                const int64_t* from_w, int64_t count_w, int64_t filter_width) {
    const auto reaches = [](const GridAxis& grid, int64_t offset, int64_t size) {
      return offset < size && offset + (grid.count - 1) * grid.stride >= 0;
    };
    for (int64_t a = 0; a < count_h; ++a) {
      for (int64_t b = 0; b < count_w; ++b) {
        if (reaches(h, from_h[a], height) && reaches(w, from_w[b], width))
          taps[tap_count++] = {from_h[a], from_w[b], tap_h[a] * filter_width + tap_w[b]};
      }
    }
  }
};

// Pixels in the order row, column, image: what a tap reads at the border is then outside of the image for all images together.
struct Pixel {
  int64_t images, width;
  int64_t n = 0, y = 0, x = 0;

  static Pixel at(int64_t index, int64_t images, int64_t width) {
    return {images, width, index % images, index / images / width, index / images % width};
  }
  void next() {
    if (++n < images) return;
    n = 0;
    if (++x < width) return;
    x = 0, ++y;
  }
};

// The pixels of one block: where they read of `from`.
template <class A>
class Block {
 public:
  Block(const PixelProduct<A>& p, int64_t first, int64_t rows) : p_(p), rows_(rows) {
    Pixel pixel = Pixel::at(first, p.n, p.w.count);
    for (int64_t i = 0; i < rows; ++i, pixel.next()) {
      y_[i] = pixel.y * p.h.stride;
      x_[i] = pixel.x * p.w.stride;
      at_[i] = ((pixel.n * p.height + y_[i]) * p.width + x_[i]) * p.depth;
    }
  }

  // rows[i] = what tap t reads from depth k on
  void find(const Tap& t, int64_t k, const A** rows) const {
    const int64_t offset = (t.h * p_.width + t.w) * p_.depth + k;
    for (int64_t i = 0; i < rows_; ++i) {
      const uint64_t y = y_[i] + t.h, x = x_[i] + t.w;
      const bool inside =
          (y < static_cast<uint64_t>(p_.height)) & (x < static_cast<uint64_t>(p_.width));
      rows[i] = inside ? p_.from + (at_[i] + offset) : p_.zeros;
    }
  }

 private:
  const PixelProduct<A>& p_;
  int64_t rows_;
  int64_t y_[kBlockPixels], x_[kBlockPixels], at_[kBlockPixels];
};

// Up to so many rows of zeros between two rows of an image are multiplied, so that the rows make one tile.
constexpr int64_t kZerosInTile = 1;

// sums[count][panel] = rows[count][depth] times panel[depth][panel], or += it. Rows outside of the image are not multiplied.
template <class A>
void multiply_block(const A* const* rows, int64_t count, const A* zeros, const A* panel,
                    int64_t depth, A* sums, bool adds) {
  for (int64_t i = 0; i < count;) {
    if (rows[i] == zeros) {
      if (!adds) clear(sums + i * kPanel<A>, 1);
      ++i;
      continue;
    }
    int64_t end = i + 1;
    for (int64_t j = end; j < count && j - end <= kZerosInTile; ++j) {
      if (rows[j] != zeros) end = j + 1;
    }
    const int64_t most = even_part(end - i, kTileRows);
    for (int64_t height; i < end; i += height) {
      height = min_of(most, end - i);
      multiply_tile<1>(height, rows + i, panel, kPanel<A>, depth, sums + i * kPanel<A>, kPanel<A>,
                       adds);
    }
  }
}

// pack(first column, k, depth, target): rows [k, k + depth) of every tap's matrix as [taps][depth][panel]; and
// finish(image, row and column of out, first column of the panel, sums[panel]).
template <class A, class Pack, class Finish>
void multiply_image(const PixelProduct<A>& p, Pack&& pack, Finish&& finish) {
  const int64_t panels = ceil_div(p.columns, kPanel<A>);
  const int64_t tiles = ceil_div(p.pixels(), kTileRows);
  const int64_t most = max_of(1, min_of(kTapRows, kPackedRows / max_of(1, p.tap_count)));
  const int64_t part = even_part(p.depth, most);
  const int64_t work = kTileRows * kPanel<A> * (p.tap_count * p.depth / 16 + 1);
  cpu::parallel_ranges(panels * tiles, work, [&](int64_t begin, int64_t end) {
    alignas(64) A sums[kBlockPixels * kPanel<A>];
    alignas(64) A packed[kPackedRows * kPanel<A>];
    const A* rows[kBlockPixels];
    while (begin < end) {
      const int64_t column = begin / tiles * kPanel<A>, tile = begin % tiles;
      const int64_t count = even_part(min_of(end - begin, tiles - tile), kBlockTiles);
      const int64_t first = tile * kTileRows;
      const int64_t pixels = min_of(count * kTileRows, p.pixels() - first);
      const Block<A> block(p, first, pixels);
      if (p.tap_count * p.depth == 0) clear(sums, pixels);
      for (int64_t k = 0; k < p.depth; k += part) {
        const int64_t depth = min_of(part, p.depth - k);
        if (p.tap_count > 0) pack(column, k, depth, packed);
        for (int64_t t = 0; t < p.tap_count; ++t) {
          block.find(p.taps[t], k, rows);
          multiply_block(rows, pixels, p.zeros, packed + t * depth * kPanel<A>, depth, sums,
                         t > 0 || k > 0);
        }
      }
      Pixel pixel = Pixel::at(first, p.n, p.w.count);
      for (int64_t i = 0; i < pixels; ++i, pixel.next())
        finish(pixel.n, p.h.first + pixel.y * p.h.step, p.w.first + pixel.x * p.w.step, column,
               sums + i * kPanel<A>);
      begin += count;
    }
  });
}

// ---- forward ----

// block[i] = a vector of row i < rows, the rows `stride` apart.
template <class A, class Part>
ADVDL_INLINE void load_block(const A* from, int64_t stride, int64_t rows, const Part& part,
                             typename Simd<A>::Vec (&block)[Simd<A>::lanes]) {
  if (rows == Simd<A>::lanes) {
    for (int64_t i = 0; i < Simd<A>::lanes; ++i) block[i] = part.read(from + i * stride);
  } else {
    for (int64_t i = 0; i < rows; ++i) block[i] = part.read(from + i * stride);
  }
}

// Where the taps of a product are among the all of the filter; -1: nowhere.
struct Slots {
  int64_t of_tap[kMaxTaps];
  Slots(const Tap* taps, int64_t count, int64_t all) {
    for (int64_t tap = 0; tap < all; ++tap) of_tap[tap] = -1;
    for (int64_t t = 0; t < count; ++t) of_tap[taps[t].index] = t;
  }
};

// weight[o][k][tap] of the channels [k, k + depth) and the columns, which are outputs, from `column` on, as [taps][depth][panel].
template <class A>
void pack_forward(const DenseConv2dShape& s, const A* weight, const Tap* taps, int64_t count,
                  int64_t column, int64_t k, int64_t depth, A* packed) {
  constexpr int64_t lanes = Simd<A>::lanes;
  const int64_t all = s.taps(), of_output = all * s.c_in;
  const Slots slots(taps, count, all);
  // Runs of memory: the channels of a tap, or all taps of all these channels.
  const bool is_last = s.weight_layout == Layout::channels_last;
  const int64_t runs = is_last ? count : 1, length = is_last ? depth : all * depth;
  for (int64_t v = 0; v < kPanelVectors; ++v) {
    const int64_t outputs = max_of(0, min_of(lanes, s.c_out - column - v * lanes));
    for (int64_t run = 0; run < runs; ++run) {
      const A* source = weight + (column + v * lanes) * of_output +
                        (is_last ? taps[run].index * s.c_in + k : k * all);
      int64_t tap = 0, channel = 0;
      for_vectors<A, 1, false>(length, [&](int64_t i, auto part, auto) {
        typename Simd<A>::Vec block[lanes] = {};
        load_block<A>(source + i, of_output, outputs, part, block);
        transpose<decltype(block[0] < block[0])>(block);
        for (int64_t j = 0; j < part.count(lanes); ++j) {
          const int64_t t = is_last ? run : slots.of_tap[tap];
          if (t >= 0) store(packed + (t * depth + channel) * kPanel<A> + v * lanes, block[j]);
          if (is_last || ++tap == all) tap = 0, ++channel;
        }
      });
    }
  }
}

template <class A>
void forward(const DenseConv2dForward& p, void* workspace) {
  const DenseConv2dShape& s = p.shape;
  A* zeros = static_cast<A*>(workspace);
  for (int64_t i = 0; i < s.c_in; ++i) zeros[i] = 0;
  int64_t tap_h[kMaxTaps], tap_w[kMaxTaps], from_h[kMaxTaps], from_w[kMaxTaps];
  for (int64_t a = 0; a < s.h.kernel; ++a) tap_h[a] = a, from_h[a] = a * s.h.dilation - s.h.padding;
  for (int64_t b = 0; b < s.w.kernel; ++b) tap_w[b] = b, from_w[b] = b * s.w.dilation - s.w.padding;
  PixelProduct<A> product{
      static_cast<const A*>(p.x),  s.n,     s.h.in, s.w.in, s.c_in, {0, 1, s.h.out, s.h.stride},
      {0, 1, s.w.out, s.w.stride}, s.c_out, zeros};
  product.add_taps(tap_h, from_h, s.h.kernel, tap_w, from_w, s.w.kernel, s.w.kernel);
  const A* shift = static_cast<const A*>(p.shift);
  const Epilogue<A> epilogue{nullptr,
                             shift,
                             static_cast<const A*>(p.residual),
                             static_cast<A*>(p.out),
                             p.act,
                             static_cast<A>(p.act_param),
                             shift != nullptr};
  const typename Simd<A>::Vec one = broadcast(A{1}), none{};
  multiply_image(
      product,
      [&](int64_t column, int64_t k, int64_t depth, A* packed) {
        pack_forward(s, static_cast<const A*>(p.weight), product.taps, product.tap_count, column, k,
                     depth, packed);
      },
      [&](int64_t n, int64_t y, int64_t x, int64_t column, const A* sums) {
        const int64_t at = ((n * s.h.out + y) * s.w.out + x) * s.c_out + column;
        for_vectors<A, 1, false>(
            min_of(kPanel<A>, s.c_out - column), [&](int64_t j, auto part, auto) {
              typename Simd<A>::Vec sum[1] = {load(sums + j)};
              epilogue.finish(sum, one, shift == nullptr ? none : part.read(shift + column + j),
                              at + j, 1, part);
            });
      });
}

// ---- backward ----

// weight[k][c][tap] of the outputs [k, k + depth) and the columns, which are channels, from `column` on, as [taps][depth][panel].
template <class A>
void pack_backward(const DenseConv2dShape& s, const A* weight, const Tap* taps, int64_t count,
                   int64_t column, int64_t k, int64_t depth, A* packed) {
  const int64_t all = s.taps(), width = min_of(kPanel<A>, s.c_in - column);
  if (s.weight_layout == Layout::channels_last || all == 1) {
    for (int64_t t = 0; t < count; ++t)
      pack_columns(width, depth, packed + t * depth * kPanel<A>, [&](int64_t i) {
        return weight + ((k + i) * all + taps[t].index) * s.c_in + column;
      });
    return;
  }
  if (2 * count < all) {  // a phase of a stride: few of the taps that lie together
    for (int64_t i = 0; i < depth; ++i) {
      const A* source = weight + ((k + i) * s.c_in + column) * all;
      for (int64_t t = 0; t < count; ++t) {
        A* target = packed + (t * depth + i) * kPanel<A>;
        for (int64_t c = 0; c < width; ++c) target[c] = source[c * all + taps[t].index];
        for (int64_t c = width; c < kPanel<A>; ++c) target[c] = 0;
      }
    }
    return;
  }
  constexpr int64_t lanes = Simd<A>::lanes;
  const Slots slots(taps, count, all);
  for (int64_t i = 0; i < depth; ++i) {
    for (int64_t v = 0; v < kPanelVectors; ++v) {
      const int64_t channels = max_of(0, min_of(lanes, width - v * lanes));
      const A* source = weight + ((k + i) * s.c_in + column + v * lanes) * all;
      for_vectors<A, 1, false>(all, [&](int64_t tap, auto part, auto) {
        typename Simd<A>::Vec block[lanes] = {};
        load_block<A>(source + tap, all, channels, part, block);
        transpose<decltype(block[0] < block[0])>(block);
        for (int64_t j = 0; j < part.count(lanes); ++j) {
          const int64_t t = slots.of_tap[tap + j];
          if (t >= 0) store(packed + (t * depth + i) * kPanel<A> + v * lanes, block[j]);
        }
      });
    }
  }
}

// Along one axis the taps [0, kernel) that reach the pixels first, first + stride ... of dx, and what the first one of these reads
// of dz by them; the next ones read the next.
int64_t taps_of_phase(const Conv2dAxis& a, int64_t first, int64_t* taps, int64_t* from) {
  int64_t count = 0;
  for (int64_t k = 0; k < a.kernel; ++k) {
    const int64_t at = first + a.padding - k * a.dilation;
    if (floor_div(at, a.stride) * a.stride != at) continue;
    from[count] = floor_div(at, a.stride);
    taps[count++] = k;
  }
  return count;
}

template <class A>
void backward_input(const DenseConv2dBackward& p, A* zeros) {
  const DenseConv2dShape& s = p.shape;
  for (int64_t i = 0; i < s.c_out; ++i) zeros[i] = 0;
  A* dx = static_cast<A*>(p.dx);
  for (int64_t y = 0; y < min_of(s.h.stride, s.h.in); ++y) {
    for (int64_t x = 0; x < min_of(s.w.stride, s.w.in); ++x) {
      int64_t tap_h[kMaxTaps], tap_w[kMaxTaps], from_h[kMaxTaps], from_w[kMaxTaps];
      const int64_t height = taps_of_phase(s.h, y, tap_h, from_h);
      const int64_t width = taps_of_phase(s.w, x, tap_w, from_w);
      PixelProduct<A> product{static_cast<const A*>(p.dz),
                              s.n,
                              s.h.out,
                              s.w.out,
                              s.c_out,
                              {y, s.h.stride, ceil_div(s.h.in - y, s.h.stride), 1},
                              {x, s.w.stride, ceil_div(s.w.in - x, s.w.stride), 1},
                              s.c_in,
                              zeros};
      product.add_taps(tap_h, from_h, height, tap_w, from_w, width, s.w.kernel);
      multiply_image(
          product,
          [&](int64_t column, int64_t k, int64_t depth, A* packed) {
            pack_backward(s, static_cast<const A*>(p.weight), product.taps, product.tap_count,
                          column, k, depth, packed);
          },
          [&](int64_t n, int64_t i, int64_t j, int64_t column, const A* sums) {
            A* to = dx + ((n * s.h.in + i) * s.w.in + j) * s.c_in + column;
            for_vectors<A, 1, false>(
                min_of(kPanel<A>, s.c_in - column),
                [&](int64_t k, auto part, auto) { part.write(to + k, load(sums + k)); });
          });
    }
  }
}

// dz [N, H_out, W_out, C_out] as [tiles][pixels][tile]: what one tile multiplies with lies together.
template <class A>
void pack_gradient(const DenseConv2dShape& s, const A* dz, A* to) {
  constexpr int64_t kPixels = 64;
  const int64_t image = s.h.out * s.w.out, pixels = s.n * image, channels = s.c_out;
  cpu::parallel_ranges(
      ceil_div(pixels, kPixels), kPixels * channels, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin) {
          const int64_t first = begin * kPixels, last = min_of(first + kPixels, pixels);
          const A* sources[kPixels];
          Pixel pixel = Pixel::at(first, s.n, s.w.out);
          for (int64_t i = first; i < last; ++i, pixel.next())
            sources[i - first] = dz + (pixel.n * image + pixel.y * s.w.out + pixel.x) * channels;
          for (int64_t c = 0; c < channels; c += kTileRows) {
            const int64_t count = min_of(kTileRows, channels - c);
            A* target = to + c * pixels;
            for (int64_t i = first; i < last; ++i) {
              const A* source = sources[i - first] + c;
              for (int64_t j = 0; j < count; ++j) target[i * kTileRows + j] = source[j];
            }
          }
        }
      });
}

// Rows of x that the pixels of the output, in their order, read at one tap.
template <class A>
class TapReader {
 public:
  TapReader(const DenseConv2dShape& s, const A* x, const A* zeros, int64_t tap)
      : s_(s),
        x_(x),
        zeros_(zeros),
        offset_h_(tap / s.w.kernel * s.h.dilation - s.h.padding),
        offset_w_(tap % s.w.kernel * s.w.dilation - s.w.padding),
        pixel_{s.n, s.w.out} {}

  const A* next() {
    const int64_t y = pixel_.y * s_.h.stride + offset_h_, x = pixel_.x * s_.w.stride + offset_w_;
    const bool inside = y >= 0 && y < s_.h.in && x >= 0 && x < s_.w.in;
    const A* row = inside ? x_ + ((pixel_.n * s_.h.in + y) * s_.w.in + x) * s_.c_in : zeros_;
    pixel_.next();
    return row;
  }

 private:
  const DenseConv2dShape& s_;
  const A *x_, *zeros_;
  int64_t offset_h_, offset_w_;
  Pixel pixel_;
};

template <class A>
void backward_weight(const DenseConv2dBackward& p, A* workspace) {
  const DenseConv2dShape& s = p.shape;
  const int64_t pixels = s.n * s.h.out * s.w.out, taps = s.taps();
  const A* x = static_cast<const A*>(p.x);
  A* zeros = workspace + round_up(s.c_out, kTileRows) * pixels;
  for (int64_t i = 0; i < s.c_in; ++i) zeros[i] = 0;
  pack_gradient(s, static_cast<const A*>(p.dz), workspace);
  const int64_t panels = ceil_div(s.c_in, kPanel<A>), tiles = ceil_div(s.c_out, kTileRows);
  const int64_t most = max_of(1, min_of(16, kGradientRows / taps / kTileRows));
  const int64_t work = kTileRows * kPanel<A> * taps * (pixels / 16 + 1);
  cpu::parallel_ranges(panels * tiles, work, [&](int64_t begin, int64_t end) {
    alignas(64) A sums[kGradientRows * kPanel<A>];  // [taps][rows][panel]
    alignas(64) A panel[kTapRows * kPanel<A>];
    while (begin < end) {
      const int64_t column = begin / tiles * kPanel<A>, tile = begin % tiles;
      const int64_t count = even_part(min_of(end - begin, tiles - tile), most);
      const int64_t first = tile * kTileRows, rows = min_of(count * kTileRows, s.c_out - first);
      const int64_t width = min_of(kPanel<A>, s.c_in - column);
      for (int64_t tap = 0; tap < taps; ++tap) {
        A* const of_tap = sums + tap * rows * kPanel<A>;
        TapReader<A> reader(s, x + column, zeros, tap);
        bool adds = false;
        for (int64_t k = 0; k < pixels;) {
          // From one pixel that reads inside of the image to the last such one in reach.
          const A* from[kTapRows];
          from[0] = reader.next();
          if (from[0] == zeros) {
            ++k;
            continue;
          }
          const int64_t most_pixels = min_of(kTapRows, pixels - k);
          int64_t depth = 1, read = 1;
          for (; read < most_pixels && read - depth < kZerosInPanel; ++read) {
            from[read] = reader.next();
            if (from[read] != zeros) depth = read + 1;
          }
          pack_columns(width, depth, panel, [&](int64_t i) { return from[i]; });
          for (int64_t r = 0; r < rows; r += kTileRows) {
            const A* row[kTileRows];
            for (int64_t q = 0; q < kTileRows; ++q)
              row[q] = workspace + (first + r) * pixels + k * kTileRows + q;
            multiply_tile<kTileRows>(min_of(kTileRows, rows - r), row, panel, kPanel<A>, depth,
                                     of_tap + r * kPanel<A>, kPanel<A>, adds);
          }
          adds = true;
          k += read;
        }
        if (!adds) clear(of_tap, rows);
      }
      for (int64_t r = 0; r < rows; ++r) {
        A* to = static_cast<A*>(p.dweight) + (first + r) * taps * s.c_in;
        for (int64_t tap = 0; tap < taps; ++tap) {
          const A* found = sums + (tap * rows + r) * kPanel<A>;
          if (s.weight_layout == Layout::channels_last) {
            for_vectors<A, 1, false>(width, [&](int64_t c, auto part, auto) {
              part.write(to + tap * s.c_in + column + c, load(found + c));
            });
          } else {
            for (int64_t c = 0; c < width; ++c) to[(column + c) * taps + tap] = found[c];
          }
        }
      }
      begin += count;
    }
  });
}

size_t element_bytes(const DenseConv2dShape& s) { return s.dtype == DType::f64 ? 8 : 4; }

size_t forward_workspace(const DenseConv2dForward& p) {
  return p.shape.c_in * element_bytes(p.shape);
}
size_t backward_workspace(const DenseConv2dBackward& p) {
  const DenseConv2dShape& s = p.shape;
  const int64_t packed = round_up(s.c_out, kTileRows) * s.n * s.h.out * s.w.out;
  return (p.dweight == nullptr ? s.c_out : max_of(s.c_out, packed + s.c_in)) * element_bytes(s);
}

template <class A>
void backward(const DenseConv2dBackward& p, void* workspace) {
  if (p.dx != nullptr) backward_input(p, static_cast<A*>(workspace));
  if (p.dweight != nullptr) backward_weight(p, static_cast<A*>(workspace));
}

void run_forward(const DenseConv2dForward& p, void* workspace) {
  if (p.shape.dtype == DType::f64) return forward<double>(p, workspace);
  forward<float>(p, workspace);
}
void run_backward(const DenseConv2dBackward& p, void* workspace) {
  if (p.shape.dtype == DType::f64) return backward<double>(p, workspace);
  backward<float>(p, workspace);
}

}  // namespace

void add_dense_conv2d(cpu::KernelTable& table) {
  table.dense_conv2d = {forward_workspace, backward_workspace, run_forward, run_backward};
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
