// Convolution by a 3x3 filter with stride 1 by Winograd's minimal filtering.
//
// A tile of MH x MW outputs is made of (MH + 2) x (MW + 2) inputs d: out = A^T [(G g G^T) * (B^T d B)] A, with one product per
// *point* (an element of the transformed tile) in place of nine per output: 4 for each output of 2x2, 3 of 2x4, 2.25 of 4x4. The products
// of all channels at one point are a matrix product: rows are tiles, the depth is C_in, columns are C_out.
//
// A block of tiles is transformed (into V), multiplied (into `products`) panel by panel and transformed back, with V and the products
// in the second-level cache. A dilated convolution is one on each of dilation x dilation grids of pixels.
#include "../common/winograd_conv2d.h"

#include "depthwise_conv2d.h"
#include "dispatch.h"
#include "matmul.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

using Vec = Simd<float>::Vec;
constexpr int64_t kLanes = Simd<float>::lanes;
// Sums over channels are made of parts of so many, each summed for itself: so 4x4 is as exact as a direct sum (docs/accuracy.md).
constexpr int64_t kPart = 16;
// Tiles of a block, a multiple of kTileRows.
template <class T>
inline constexpr int64_t kBlock = T::points > 24 ? 24 : 36;
constexpr int64_t kTaps = 9;

// ---- one axis: M outputs, T = M + 2 points ----

template <int M>
struct Axis;

// Points 0, 1, -1 and infinity.
template <>
struct Axis<2> {
  static constexpr int T = 4;
  static constexpr double kWeights[T][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
  // to[i * step] = row i of B^T times from[j * step]
  ADVDL_INLINE static void inputs(const Vec* from, int step, Vec* to) {
    const Vec d0 = from[0], d1 = from[step], d2 = from[2 * step], d3 = from[3 * step];
    to[0] = d0 - d2;
    to[step] = d1 + d2;
    to[2 * step] = d2 - d1;
    to[3 * step] = d1 - d3;
  }
  // to[i * to_step] = row i of A^T times from[j * step]
  ADVDL_INLINE static void outputs(const Vec* from, int step, Vec* to, int to_step) {
    const Vec m1 = from[step], m2 = from[2 * step];
    to[0] = from[0] + m1 + m2;
    to[to_step] = m1 - m2 - from[3 * step];
  }
  // to[i * step] = row i of A times from[j * from_step]
  ADVDL_INLINE static void gradients(const Vec* from, int from_step, Vec* to, int step) {
    const Vec z0 = from[0], z1 = from[from_step];
    to[0] = z0;
    to[step] = z0 + z1;
    to[2 * step] = z0 - z1;
    to[3 * step] = -z1;
  }
};

// Points 0, +-a, +-b and infinity.
constexpr double kA = 0.625, kB = 1.5, kA2 = kA * kA, kB2 = kB * kB;
template <>
struct Axis<4> {
  static constexpr int T = 6;
  static constexpr double kNa = 2 * kA2 * (kA2 - kB2), kNb = 2 * kB2 * (kB2 - kA2);
  static constexpr double kWeights[T][3] = {
      {1 / (kA2 * kB2), 0, 0},         {1 / kNa, kA / kNa, kA2 / kNa},
      {1 / kNa, -kA / kNa, kA2 / kNa}, {1 / kNb, kB / kNb, kB2 / kNb},
      {1 / kNb, -kB / kNb, kB2 / kNb}, {0, 0, 1}};
  ADVDL_INLINE static void inputs(const Vec* from, int step, Vec* to) {
    constexpr float a = kA, b = kB, a2 = kA2, b2 = kB2, ab = kA2 * kB2, sum = kA2 + kB2;
    const Vec d0 = from[0], d1 = from[step], d2 = from[2 * step], d3 = from[3 * step];
    const Vec d4 = from[4 * step], d5 = from[5 * step];
    const Vec even_a = d4 - d2 * b2, odd_a = d3 - d1 * b2, even_b = d4 - d2 * a2,
              odd_b = d3 - d1 * a2;
    to[0] = d0 * ab + (d4 - d2 * sum);
    to[step] = even_a + odd_a * a;
    to[2 * step] = even_a - odd_a * a;
    to[3 * step] = even_b + odd_b * b;
    to[4 * step] = even_b - odd_b * b;
    to[5 * step] = d1 * ab + (d5 - d3 * sum);
  }
  ADVDL_INLINE static void outputs(const Vec* from, int step, Vec* to, int to_step) {
    constexpr float a = kA, b = kB, a2 = kA2, b2 = kB2, a3 = kA2 * kA, b3 = kB2 * kB;
    const Vec m1 = from[step], m2 = from[2 * step], m3 = from[3 * step], m4 = from[4 * step];
    const Vec sum_a = m1 + m2, sum_b = m3 + m4, odd_a = m1 - m2, odd_b = m3 - m4;
    to[0] = from[0] + sum_a + sum_b;
    to[to_step] = odd_a * a + odd_b * b;
    to[2 * to_step] = sum_a * a2 + sum_b * b2;
    to[3 * to_step] = odd_a * a3 + odd_b * b3 + from[5 * step];
  }
  ADVDL_INLINE static void gradients(const Vec* from, int from_step, Vec* to, int step) {
    constexpr float a = kA, b = kB, a2 = kA2, b2 = kB2, a3 = kA2 * kA, b3 = kB2 * kB;
    const Vec z0 = from[0], z1 = from[from_step], z2 = from[2 * from_step],
              z3 = from[3 * from_step];
    const Vec even_a = z0 + z2 * a2, odd_a = z1 * a + z3 * a3;
    const Vec even_b = z0 + z2 * b2, odd_b = z1 * b + z3 * b3;
    to[0] = z0;
    to[step] = even_a + odd_a;
    to[2 * step] = even_a - odd_a;
    to[3 * step] = even_b + odd_b;
    to[4 * step] = even_b - odd_b;
    to[5 * step] = z3;
  }
};

template <int MH_, int MW_>
struct Tile {
  static constexpr int MH = MH_, MW = MW_;
  using H = Axis<MH>;
  using W = Axis<MW>;
  static constexpr int TH = H::T, TW = W::T, points = TH * TW;

  // In place: B^T d B.
  ADVDL_INLINE static void inputs(Vec* d) {
    for (int j = 0; j < TW; ++j) H::inputs(d + j, TW, d + j);
    for (int i = 0; i < TH; ++i) W::inputs(d + i * TW, 1, d + i * TW);
  }
  // out [MH][MW] = A^T m A
  ADVDL_INLINE static void outputs(const Vec* m, Vec* out) {
    Vec rows[MH * TW];
    for (int j = 0; j < TW; ++j) H::outputs(m + j, TW, rows + j, TW);
    for (int i = 0; i < MH; ++i) W::outputs(rows + i * TW, 1, out + i * MW, 1);
  }
  // m = A dz A^T of dz [MH][MW]
  ADVDL_INLINE static void gradients(const Vec* dz, Vec* m) {
    Vec rows[MH * TW];
    for (int i = 0; i < MH; ++i) W::gradients(dz + i * MW, 1, rows + i * TW, 1);
    for (int j = 0; j < TW; ++j) H::gradients(rows + j, TW, m + j, TW);
  }
  // g [3][3] = G^T m G
  ADVDL_INLINE static void filters(const Vec* m, Vec* g) {
    for (int a = 0; a < 3; ++a) {
      Vec row[TW];
      for (int j = 0; j < TW; ++j) {
        row[j] = Vec{};
        for (int i = 0; i < TH; ++i)
          row[j] += m[i * TW + j] * static_cast<float>(H::kWeights[i][a]);
      }
      for (int b = 0; b < 3; ++b) {
        g[a * 3 + b] = Vec{};
        for (int j = 0; j < TW; ++j) g[a * 3 + b] += row[j] * static_cast<float>(W::kWeights[j][b]);
      }
    }
  }
};

// f(Tile<..>{})
template <class F>
auto with_tile(WinogradTile tile, F&& f) {
  switch (tile) {
    case WinogradTile::two_by_two:
      return f(Tile<2, 2>{});
    case WinogradTile::two_by_four:
      return f(Tile<2, 4>{});
    default:
      return f(Tile<4, 4>{});
  }
}

// ---- weights ----

// Elements of one panel at one point. A row more, as distances of a power of two would share few sets of a cache.
int64_t packed_of_point(const WinogradWeight& w) { return (w.c_in + 1) * kPanel<float>; }
template <class T>
int64_t packed_size_of(const WinogradWeight& w) {
  return T::points * ceil_div(w.c_out, kPanel<float>) * packed_of_point(w);
}
int64_t packed_size(const WinogradWeight& w) {
  return with_tile(w.tile, [&](auto tile) { return packed_size_of<decltype(tile)>(w); });
}

// Where the taps of a weight are, for sums over its input channels; turned: over its output channels.
struct Taps {
  // Elements from one output channel, input channel and tap to the next.
  int64_t of_out, of_in, tap;
  explicit Taps(const WinogradWeight& w) {
    const bool is_last = w.layout == Layout::channels_last;
    const int64_t first = w.turned ? w.c_out : w.c_in;  // channels of a row of the weight
    const int64_t row = first * kTaps, column = is_last ? 1 : kTaps;
    of_out = w.turned ? column : row;
    of_in = w.turned ? row : column;
    tap = is_last ? first : 1;
  }
};

// Input channels that are transformed at a time: their numbers stay in the first-level cache. Output channels: a vector.
constexpr int64_t kPackInputs = 8;

// to[input * kTaps + tap][output] of up to kPackInputs and kLanes channels; zeros for outputs that do not exist.
void read_taps(const Taps& taps, const float* from, int64_t inputs, int64_t outputs,
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
        const float* start = from + run * runs.distance + first;
        for (int64_t lane = 0; lane < outputs; ++lane)
          block[lane] = part.read(start + lane * taps.of_out);
      });
      transpose<decltype(block[0] < block[0])>(block);
      for (int64_t i = 0; i < count; ++i)
        store(to[run * runs.next_run + (first + i) * runs.next], block[i]);
    }
  }
}

// to[point][channel][panel]: the input channels [begin, end) of panel q, points `of_point` apart. In fp64, as the points are no powers
// of two: each number of the result is rounded once.
template <class T>
void pack_panel(const WinogradWeight& w, int64_t q, int64_t begin, int64_t end, float* to,
                int64_t of_point) {
  constexpr int64_t panel = kPanel<float>;
  const Taps taps(w);
  alignas(64) float read[kPackInputs * kTaps][kLanes] = {};
  for (int64_t c = begin; c < end; c += kPackInputs) {
    const int64_t inputs = min_of(kPackInputs, end - c);
    for (int64_t first = 0; first < panel; first += kLanes) {
      const int64_t o = q * panel + first, outputs = max_of(0, min_of(kLanes, w.c_out - o));
      if (outputs > 0)
        read_taps(taps, w.weight + o * taps.of_out + c * taps.of_in, inputs, outputs, read);
      for (int64_t k = 0; k < inputs; ++k) {
        double g[kTaps][kLanes];
        for (int64_t t = 0; t < kTaps; ++t) {
          const float* of_tap = read[k * kTaps + (w.turned ? kTaps - 1 - t : t)];
          for (int64_t lane = 0; lane < kLanes; ++lane) g[t][lane] = outputs > 0 ? of_tap[lane] : 0;
        }
        float* at = to + (c - begin + k) * panel + first;
        for (int a = 0; a < T::TH; ++a) {
          double rows[3][kLanes];
          for (int b = 0; b < 3; ++b) {
            for (int64_t lane = 0; lane < kLanes; ++lane)
              rows[b][lane] = T::H::kWeights[a][0] * g[b][lane] +
                              T::H::kWeights[a][1] * g[3 + b][lane] +
                              T::H::kWeights[a][2] * g[6 + b][lane];
          }
          for (int b = 0; b < T::TW; ++b) {
            for (int64_t lane = 0; lane < kLanes; ++lane)
              at[(a * T::TW + b) * of_point + lane] = static_cast<float>(
                  T::W::kWeights[b][0] * rows[0][lane] + T::W::kWeights[b][1] * rows[1][lane] +
                  T::W::kWeights[b][2] * rows[2][lane]);
          }
        }
      }
    }
  }
}

template <class T>
void pack(const WinogradWeight& w, float* packed) {
  constexpr int64_t panel = kPanel<float>;
  const int64_t panels = ceil_div(w.c_out, panel), parts = ceil_div(w.c_in, kPackInputs);
  cpu::parallel_ranges(panels * parts, kPackInputs * panel * T::points * 2,
                       [&](int64_t begin, int64_t end) {
                         for (int64_t i = begin; i < end; ++i) {
                           const int64_t q = i / parts, c = i % parts * kPackInputs;
                           pack_panel<T>(w, q, c, min_of(c + kPackInputs, w.c_in),
                                         packed + q * T::points * packed_of_point(w) + c * panel,
                                         packed_of_point(w));
                         }
                       });
}

void run_pack(const WinogradWeight& w, float* packed) {
  with_tile(w.tile, [&](auto tile) { pack<decltype(tile)>(w, packed); });
}

// ---- the grid of tiles ----

// Tiles by image, grid of the dilation, row and column. A dilated convolution is one without dilation on each of the grids of every
// dilation-th pixel.
template <class T>
struct Grid {
  const WinogradConv2dShape& s;
  int64_t grids_h, grids_w;  // that have an output
  int64_t rows, columns;     // tiles of a grid: as many as the largest one has

  explicit Grid(const WinogradConv2dShape& shape)
      : s(shape),
        grids_h(min_of(shape.h.dilation, shape.h.out)),
        grids_w(min_of(shape.w.dilation, shape.w.out)),
        rows(ceil_div(ceil_div(shape.h.out, shape.h.dilation), T::MH)),
        columns(ceil_div(ceil_div(shape.w.out, shape.w.dilation), T::MW)) {}
  int64_t tiles() const { return s.n * grids_h * grids_w * rows * columns; }

  struct Place {
    int64_t n, y, x;        // of the first output; may lie outside where a grid has fewer tiles
    int64_t height, width;  // outputs inside the image, not above 0 if there are none
  };
  Place place(int64_t tile) const {
    const int64_t column = tile % columns, row = tile / columns % rows;
    const int64_t image = tile / (columns * rows), grid = image % (grids_h * grids_w);
    const int64_t y = grid / grids_w + row * T::MH * s.h.dilation;
    const int64_t x = grid % grids_w + column * T::MW * s.w.dilation;
    return {image / (grids_h * grids_w), y, x, inside(T::MH, s.h, y), inside(T::MW, s.w, x)};
  }

 private:
  static int64_t inside(int64_t outputs, const Conv2dAxis& axis, int64_t first) {
    return first < axis.out ? min_of(outputs, ceil_div(axis.out - first, axis.dilation)) : 0;
  }
};

// ---- tiles in and out ----

template <int64_t kCount>
ADVDL_INLINE bool is_finite(const Vec (&v)[kCount]) {
  Vec sum{};  // 0, or NaN
#pragma GCC unroll 16
  for (int64_t i = 0; i < kCount; ++i) sum += v[i] * 0.0f;
  return !has_nan(sum);
}

// v[point][chunk][tile][channel of the chunk] of one tile.
template <class T>
void transform_inputs(const WinogradConv2dShape& s, const float* image,
                      const typename Grid<T>::Place& at, float* v, int64_t of_point, int64_t chunk,
                      int64_t of_chunk) {
  const int64_t y = at.y - s.h.padding, x = at.x - s.w.padding;
  const int64_t row = s.h.dilation * s.w.in * s.c_in, column = s.w.dilation * s.c_in;
  const float* first = image + ((at.n * s.h.in + y) * s.w.in + x) * s.c_in;
  const auto transform = [&](auto&& input) {
    for_vectors<float, 1, false>(s.c_in, [&](int64_t c, auto part, auto) {
      Vec d[T::points];
#pragma GCC unroll 6
      for (int i = 0; i < T::TH; ++i) {
#pragma GCC unroll 6
        for (int j = 0; j < T::TW; ++j) d[i * T::TW + j] = part.read(input(i, j, c));
      }
      T::inputs(d);
      float* to = v + c / chunk * of_chunk + c % chunk;
#pragma GCC unroll 36
      for (int q = 0; q < T::points; ++q) store(to + q * of_point, d[q]);
    });
  };
  const auto is_inside = [](const Conv2dAxis& axis, int64_t begin, int points) {
    return begin >= 0 && begin + (points - 1) * axis.dilation < axis.in;
  };
  if (is_inside(s.h, y, T::TH) && is_inside(s.w, x, T::TW))
    return transform([&](int i, int j, int64_t c) { return first + i * row + j * column + c; });
  // Outside of the image zeros are read.
  alignas(64) static const float zeros[kLanes] = {};
  const float* from[T::points];
  int64_t steps[T::points];
  for (int i = 0; i < T::TH; ++i) {
    for (int j = 0; j < T::TW; ++j) {
      const int64_t yy = y + i * s.h.dilation, xx = x + j * s.w.dilation;
      const bool inside = yy >= 0 && yy < s.h.in && xx >= 0 && xx < s.w.in;
      from[i * T::TW + j] = inside ? first + i * row + j * column : zeros;
      steps[i * T::TW + j] = inside;
    }
  }
  transform(
      [&](int i, int j, int64_t c) { return from[i * T::TW + j] + c * steps[i * T::TW + j]; });
}

// sum += from[i] * weight[i * step] for i < count. NaN does not leave a sum, so nothing is added to it.
void add_products(double& sum, const float* from, const float* weight, int64_t step,
                  int64_t count) {
  for (int64_t i = 0; i < count && sum == sum; ++i) sum += double(from[i]) * weight[i * step];
}

// out[y][x] of one tile directly, for `count` output channels from o on: where the sums of the transformed tile are not finite. Inf
// and NaN then reach the outputs that they reach in a direct convolution, and no others.
template <class T>
void compute_directly(const WinogradConv2dForward& p, const typename Grid<T>::Place& at, int64_t o,
                      int64_t count, Vec* out) {
  const WinogradConv2dShape& s = p.shape;
  const Taps taps(p.weight);
  for (int64_t i = 0; i < at.height; ++i) {
    for (int64_t j = 0; j < at.width; ++j) {
      alignas(64) float sums[kLanes] = {};
      for (int64_t lane = 0; lane < count; ++lane) {
        double sum = 0;
        for (int64_t t = 0; t < kTaps; ++t) {
          const int64_t y = at.y + (i + t / 3) * s.h.dilation - s.h.padding;
          const int64_t x = at.x + (j + t % 3) * s.w.dilation - s.w.padding;
          if (y < 0 || y >= s.h.in || x < 0 || x >= s.w.in) continue;
          const int64_t tap = p.weight.turned ? kTaps - 1 - t : t;
          add_products(sum, p.x + ((at.n * s.h.in + y) * s.w.in + x) * s.c_in,
                       p.weight.weight + (o + lane) * taps.of_out + tap * taps.tap, taps.of_in,
                       s.c_in);
        }
        sums[lane] = static_cast<float>(sum);
      }
      out[i * T::MW + j] = load(sums);
    }
  }
}

// Outputs of one tile from products[point][tile][panel], for one panel.
template <class T>
void transform_outputs(const WinogradConv2dForward& p, const Epilogue<float>& epilogue,
                       const typename Grid<T>::Place& at, const float* products, int64_t of_point,
                       int64_t column) {
  const WinogradConv2dShape& s = p.shape;
  const int64_t step_h = s.h.dilation * s.w.out * s.c_out, step_w = s.w.dilation * s.c_out;
  if (at.height <= 0 || at.width <= 0) return;
  const int64_t first = ((at.n * s.h.out + at.y) * s.w.out + at.x) * s.c_out + column;
  const Vec one = broadcast(1.0f), none{};
  for_vectors<float, 1, false>(
      min_of(kPanel<float>, s.c_out - column), [&](int64_t c, auto part, auto) {
        Vec m[T::points], out[T::MH * T::MW];
#pragma GCC unroll 36
        for (int q = 0; q < T::points; ++q) m[q] = load(products + q * of_point + c);
        T::outputs(m, out);
        if (!is_finite(out)) compute_directly<T>(p, at, column + c, part.count(kLanes), out);
        const Vec scale = epilogue.scale == nullptr ? one : part.read(epilogue.scale + column + c);
        const Vec shift = epilogue.shift == nullptr ? none : part.read(epilogue.shift + column + c);
        for (int i = 0; i < at.height; ++i) {
          const int64_t to = first + i * step_h + c;
          if (at.width == T::MW) {
            epilogue.finish<T::MW>(*reinterpret_cast<Vec(*)[T::MW]>(out + i * T::MW), scale, shift,
                                   to, step_w, part);
          } else {
            for (int j = 0; j < at.width; ++j) {
              Vec sum[1] = {out[i * T::MW + j]};
              epilogue.finish<1>(sum, scale, shift, to + j * step_w, 0, part);
            }
          }
        }
      });
}

constexpr int64_t kLine = 16;  // elements of a line of a cache
// Channels of V that lie together: a panel of the weight for them stays in the first-level cache. A multiple of kPart.
constexpr int64_t kChunk = 64;

// f(slot) for each slot, in parallel if there are more than one: each has work for a thread.
template <class F>
void in_slots(int64_t slots, F&& f) {
  constexpr int64_t kWork = int64_t{1} << 20;
  cpu::parallel_ranges(slots, kWork, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) f(begin);
  });
}

// How a forward is divided among threads, and its memory. There are two ways:
// - by tiles: a thread transforms a block of tiles, multiplies it with all panels of the weight and transforms the outputs;
// - by panels, for few tiles or a weight larger than the caches: the threads transform many tiles together. Then each takes panels of
//   the weight for itself, packs them chunk by chunk if they are not kept, and multiplies all tiles with them.
// Each thread has a slot of memory. The sums do not depend on any of this.
template <class T>
struct ForwardSpace {
  static constexpr int64_t kManyTiles = 128;  // of the second way
  static constexpr int64_t of_packed_chunk =
      (kChunk + 1) * kPanel<float>;                 // elements of a point, no power of two
  static constexpr int64_t kLargeWeight = 4 << 20;  // bytes
  Grid<T> grid;
  int64_t tiles, panels;
  bool by_panels, packs;
  int64_t stride, of_chunk, of_v;  // elements from one tile, chunk and point of V to the next
  int64_t most;                    // tiles that V holds
  int64_t splits;                  // parts of the tiles of V that are different units of work
  int64_t slots;
  int64_t v_size, of_products, products_size, packed_size, slot_size;  // elements

  explicit ForwardSpace(const WinogradConv2dForward& p)
      : grid(p.shape),
        tiles(grid.tiles()),
        panels(ceil_div(p.shape.c_out, kPanel<float>)),
        packs(p.packed == nullptr),
        stride(min_of(kChunk, round_up(p.shape.c_in, kLanes))) {
    const int64_t threads = max_of(1, p.threads), all_packed = packed_size_of<T>(p.weight);
    by_panels = all_packed * int64_t{4} > kLargeWeight || tiles < 2 * threads * kBlock<T>;
    most = by_panels ? round_up(min_of(tiles, kManyTiles), kTileRows) : kBlock<T>;
    splits = by_panels
                 ? max_of(1, min_of(threads / common_divisor(threads, panels), most / kTileRows))
                 : 1;
    slots = min_of(threads, by_panels ? panels * splits : ceil_div(tiles, kBlock<T>));
    of_chunk = most * stride;
    of_v = ceil_div(p.shape.c_in, kChunk) * of_chunk + kChunk;  // no power of two
    v_size = T::points * of_v;
    of_products = most * kPanel<float>;
    products_size = T::points * of_products;
    packed_size = !packs ? 0 : by_panels ? T::points * of_packed_chunk : all_packed;
    slot_size = products_size + (by_panels ? packed_size : v_size);
  }
  // What all threads share comes first: V, or the packed weight.
  int64_t shared_size() const { return by_panels ? v_size : packed_size; }
  size_t bytes() const { return (shared_size() + slots * slot_size) * sizeof(float); }

  static int64_t common_divisor(int64_t a, int64_t b) {
    while (b != 0) {
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    return max_of(1, a);
  }
};

template <class T>
class Forward {
 public:
  Forward(const WinogradConv2dForward& p, void* memory)
      : p_(p),
        s_(p.shape),
        space_(p),
        shared_(static_cast<float*>(memory)),
        epilogue_{p.scale,
                  p.shift,
                  p.residual,
                  p.out,
                  p.act,
                  static_cast<float>(p.act_param),
                  p.scale != nullptr || p.shift != nullptr} {}

  void run() {
    if (space_.by_panels)
      by_panels();
    else
      by_tiles();
  }

 private:
  void transform(int64_t first, int64_t begin, int64_t end, float* v) const {
    for (int64_t t = begin; t < end; ++t)
      transform_inputs<T>(s_, p_.x, space_.grid.place(first + t), v + t * space_.stride,
                          space_.of_v, kChunk, space_.of_chunk);
  }

  int64_t panel_size() const { return T::points * packed_of_point(p_.weight); }
  float* slot(int64_t index) const {
    return shared_ + space_.shared_size() + index * space_.slot_size;
  }

  void by_tiles() const {
    float* own = shared_;
    if (space_.packs) pack<T>(p_.weight, own);
    const float* packed = space_.packs ? own : p_.packed;
    const int64_t groups = ceil_div(space_.tiles, kTileRows);
    in_slots(space_.slots, [&](int64_t index) {
      const int64_t begin = index * groups / space_.slots * kTileRows;
      const int64_t end = min_of(space_.tiles, (index + 1) * groups / space_.slots * kTileRows);
      const int64_t blocks = max_of(1, ceil_div(end - begin, kBlock<T>));
      const int64_t block = round_up(ceil_div(end - begin, blocks), kTileRows);
      float *v = slot(index), *products = v + space_.v_size;
      for (int64_t first = begin; first < end; first += block) {
        const int64_t count = min_of(block, end - first);
        transform(first, 0, count, v);
        for (int64_t q = 0; q < space_.panels; ++q)
          finish(first, count, v, q, packed + q * panel_size(), nullptr, products);
      }
    });
  }

  void by_panels() const {
    float* v = shared_;
    for (int64_t first = 0; first < space_.tiles; first += space_.most) {
      const int64_t count = min_of(space_.most, space_.tiles - first);
      const int64_t part = round_up(ceil_div(count, space_.splits), kTileRows);
      cpu::parallel_ranges(count, T::points * s_.c_in * 4,
                           [&](int64_t begin, int64_t end) { transform(first, begin, end, v); });
      const int64_t units = space_.panels * space_.splits;
      in_slots(space_.slots, [&](int64_t index) {
        float* products = slot(index);
        const int64_t end = (index + 1) * units / space_.slots;
        for (int64_t unit = index * units / space_.slots, next; unit < end; unit = next) {
          // All parts of a panel that are this thread's, so that it packs the panel once.
          const int64_t q = unit / space_.splits;
          next = min_of(end, (q + 1) * space_.splits);
          const int64_t t = unit % space_.splits * part;
          const int64_t after = min_of(count, t + (next - unit) * part);
          if (t < after)
            finish(first + t, after - t, v + t * space_.stride, q,
                   space_.packs ? nullptr : p_.packed + q * panel_size(),
                   products + space_.products_size, products);
        }
      });
    }
  }

  // Weights and rows of V come from the last-level cache, in pieces too short for its own prefetches.
  static void fetch(const float* from, int64_t count) {
    for (int64_t i = 0; i < count; i += kLine) prefetch(from + i);
  }

  // products[tile][panel] (+)= the products of `count` tiles at one point with the channels of a chunk, whose first is c.
  void multiply(int64_t point, int64_t c, int64_t count, const float* v, const float* weights,
                float* products) const {
    constexpr int64_t panel = kPanel<float>;
    const float* from = v + point * space_.of_v + c / kChunk * space_.of_chunk;
    const int64_t depth = min_of(kChunk, s_.c_in - c);
    const int64_t share = round_up(ceil_div(depth * panel, ceil_div(count, kTileRows)), kLine);
    for (int64_t t = 0; t < count; t += kTileRows) {
      const int64_t rows = min_of(kTileRows, count - t);
      const float* row[kTileRows];
      for (int64_t i = 0; i < rows; ++i) row[i] = from + (t + i) * space_.stride;
      if (space_.by_panels) {
        if (!space_.packs) fetch(weights + depth * panel + t / kTileRows * share, share);
        fetch(from + space_.of_chunk + t * space_.stride, kTileRows * space_.stride);
      }
      multiply_in_parts<kPart>(rows, row, 1, weights, panel, depth,
                               products + point * space_.of_products + t * panel, panel, c > 0);
    }
  }

  // The outputs of `count` tiles from `first` on in panel q. packed: of the panel; if null, it is packed into `chunk`.
  void finish(int64_t first, int64_t count, const float* v, int64_t q, const float* packed,
              float* chunk, float* products) const {
    constexpr int64_t panel = kPanel<float>;
    if (packed != nullptr) {
      for (int64_t point = 0; point < T::points; ++point) {
        for (int64_t c = 0; c < s_.c_in; c += kChunk)
          multiply(point, c, count, v, packed + point * packed_of_point(p_.weight) + c * panel,
                   products);
      }
    } else {
      // A chunk of all points stays in the second-level cache.
      for (int64_t c = 0; c < s_.c_in; c += kChunk) {
        pack_panel<T>(p_.weight, q, c, min_of(c + kChunk, s_.c_in), chunk, space_.of_packed_chunk);
        for (int64_t point = 0; point < T::points; ++point)
          multiply(point, c, count, v, chunk + point * space_.of_packed_chunk, products);
      }
    }
    for (int64_t t = 0; t < count; ++t)
      transform_outputs<T>(p_, epilogue_, space_.grid.place(first + t), products + t * panel,
                           space_.of_products, q * panel);
  }

  const WinogradConv2dForward& p_;
  const WinogradConv2dShape& s_;
  const ForwardSpace<T> space_;
  float* const shared_;
  const Epilogue<float> epilogue_;
};

void run_forward(const WinogradConv2dForward& p, void* workspace) {
  if (p.shape.n == 0) return;
  with_tile(p.shape.tile, [&](auto tile) { Forward<decltype(tile)>(p, workspace).run(); });
}
size_t forward_workspace(const WinogradConv2dForward& p) {
  return with_tile(p.shape.tile,
                   [&](auto tile) { return ForwardSpace<decltype(tile)>(p).bytes(); });
}

// ---- gradient of the weight ----
//
// By the same tiles, transposed: dweight = G^T [sum over tiles of (B^T d B) * (A dz A^T)] G. At each point the sum over tiles is a
// matrix product: rows are output channels, the depth is tiles, columns are input channels.

// How it is divided among threads, and its memory. There are two ways:
// - by ranges of tiles, for sums that fit in a cache: a thread transforms blocks of a range and adds their products to the sums of the
//   range. The ranges depend on the shape alone;
// - by panels of input channels: the threads transform many tiles together, and each adds the products of its points and panels.
template <class T>
struct WeightSpace {
  static constexpr int64_t kBlockTiles = 48;  // of a range
  static constexpr int64_t kRangeTiles = 96, kMostRanges = 16;
  static constexpr int64_t kSmallSums = 3 << 19, kStaged = 12 << 20;  // bytes
  Grid<T> grid;
  int64_t tiles, panels;
  bool by_ranges;
  int64_t ranges, slots;
  int64_t most;        // tiles that V and Z hold
  int64_t of_v, of_z;  // elements of a point
  int64_t v_size,
      slot_size;  // V [points][panels][most][panel], and Z [points][vectors][most][lanes]
  int64_t of_sums, sums_size;  // [ranges][points][panels][C_out][panel]

  explicit WeightSpace(const WinogradConv2dBackward& p)
      : grid(p.shape), tiles(grid.tiles()), panels(ceil_div(p.shape.c_in, kPanel<float>)) {
    const int64_t in = panels * kPanel<float>, out = round_up(p.shape.c_out, kLanes);
    of_sums = round_up(p.shape.c_out, kTileRows) * kPanel<float>;
    sums_size = T::points * panels * of_sums;
    const int64_t bytes = sums_size * int64_t{4};
    ranges = max_of(1, min_of(tiles / kRangeTiles, min_of(kMostRanges, kStaged / bytes)));
    by_ranges = bytes <= kSmallSums && ranges > 1;
    if (!by_ranges) ranges = 1;
    slots = by_ranges ? min_of(max_of(1, p.threads), ranges) : 1;
    const int64_t of_tile = T::points * (in + out) * int64_t{4};
    most =
        by_ranges ? kBlockTiles : max_of(kPart, min_of(tiles, kStaged / of_tile) / kPart * kPart);
    of_v = most * in + kLine;
    of_z = most * out + kLine;
    v_size = T::points * of_v;
    slot_size = v_size + T::points * of_z;
  }
  size_t bytes() const { return (ranges * sums_size + slots * slot_size) * sizeof(float); }
};

// z[point][vector][tile][lanes] of one tile of dz.
template <class T>
void transform_gradients(const WinogradConv2dShape& s, const float* dz,
                         const typename Grid<T>::Place& at, float* z, int64_t of_point,
                         int64_t of_vector) {
  const int64_t row = s.h.dilation * s.w.out * s.c_out, column = s.w.dilation * s.c_out;
  const float* from = dz + ((at.n * s.h.out + at.y) * s.w.out + at.x) * s.c_out;
  for_vectors<float, 1, false>(s.c_out, [&](int64_t c, auto part, auto) {
    Vec d[T::MH * T::MW], m[T::points];
#pragma GCC unroll 4
    for (int i = 0; i < T::MH; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < T::MW; ++j)
        d[i * T::MW + j] =
            i < at.height && j < at.width ? part.read(from + i * row + j * column + c) : Vec{};
    }
    T::gradients(d, m);
    float* to = z + c / kLanes * of_vector;
#pragma GCC unroll 36
    for (int q = 0; q < T::points; ++q) store(to + q * of_point, m[q]);
  });
}

template <class T>
class Backward {
 public:
  Backward(const WinogradConv2dBackward& p, void* memory)
      : p_(p), s_(p.shape), space_(p), sums_(static_cast<float*>(memory)) {}

  void run() {
    if (space_.by_ranges)
      by_ranges();
    else
      by_panels();
    finish();
  }

 private:
  float* slot(int64_t index) const {
    return sums_ + space_.ranges * space_.sums_size + index * space_.slot_size;
  }

  // Tiles [begin, end) of those that V and Z hold, which are `first` and the following ones.
  void transform(int64_t first, int64_t begin, int64_t end, float* v) const {
    for (int64_t t = begin; t < end; ++t) {
      const auto at = space_.grid.place(first + t);
      transform_inputs<T>(s_, p_.x, at, v + t * kPanel<float>, space_.of_v, kPanel<float>,
                          space_.most * kPanel<float>);
      transform_gradients<T>(s_, p_.dz, at, v + space_.v_size + t * kLanes, space_.of_z,
                             space_.most * kLanes);
    }
  }

  // sums[C_out][panel] (+)= the products of `count` tiles at one point, for one panel.
  void multiply(const float* v, int64_t count, int64_t point, int64_t panel, float* sums,
                bool adds) const {
    const float* columns = v + point * space_.of_v + panel * space_.most * kPanel<float>;
    const float* z = v + space_.v_size + point * space_.of_z;
    sums += (point * space_.panels + panel) * space_.of_sums;
    for (int64_t t = 0; t < count; t += kChunk) {
      for (int64_t o = 0; o < s_.c_out; o += kTileRows) {
        const int64_t rows = min_of(kTileRows, s_.c_out - o);
        const float* row[kTileRows];
        for (int64_t i = 0; i < rows; ++i)
          row[i] = z + ((o + i) / kLanes * space_.most + t) * kLanes + (o + i) % kLanes;
        multiply_in_parts<kPart>(rows, row, kLanes, columns + t * kPanel<float>, kPanel<float>,
                                 min_of(kChunk, count - t), sums + o * kPanel<float>, kPanel<float>,
                                 adds || t > 0);
      }
    }
  }

  void by_ranges() const {
    in_slots(space_.slots, [&](int64_t index) {
      float* v = slot(index);
      for (int64_t r = index * space_.ranges / space_.slots;
           r < (index + 1) * space_.ranges / space_.slots; ++r) {
        const int64_t begin = r * space_.tiles / space_.ranges;
        const int64_t after = (r + 1) * space_.tiles / space_.ranges;
        for (int64_t first = begin; first < after; first += space_.most) {
          const int64_t count = min_of(space_.most, after - first);
          transform(first, 0, count, v);
          for (int64_t point = 0; point < T::points; ++point) {
            for (int64_t panel = 0; panel < space_.panels; ++panel)
              multiply(v, count, point, panel, sums_ + r * space_.sums_size, first > begin);
          }
        }
      }
    });
  }

  void by_panels() const {
    float* v = slot(0);
    for (int64_t first = 0; first < space_.tiles; first += space_.most) {
      const int64_t count = min_of(space_.most, space_.tiles - first);
      cpu::parallel_ranges(count, T::points * (s_.c_in + s_.c_out) * 4,
                           [&](int64_t begin, int64_t end) { transform(first, begin, end, v); });
      cpu::parallel_ranges(T::points * space_.panels, s_.c_out * kPanel<float> * count / 16,
                           [&](int64_t begin, int64_t end) {
                             for (; begin < end; ++begin)
                               multiply(v, count, begin / space_.panels, begin % space_.panels,
                                        sums_, first > 0);
                           });
    }
  }

  // The taps of `count` input channels from c on, directly, as the forward does where its sums are not finite.
  void compute_directly(int64_t o, int64_t c, int64_t count, Vec* g) const {
    for (int64_t t = 0; t < kTaps; ++t) {
      alignas(64) float sums[kLanes] = {};
      for (int64_t lane = 0; lane < count; ++lane) {
        double sum = 0;
        for (int64_t row = 0; row < s_.n * s_.h.out && sum == sum; ++row) {
          const int64_t y = row % s_.h.out + t / 3 * s_.h.dilation - s_.h.padding;
          if (y < 0 || y >= s_.h.in) continue;
          const int64_t from = (row / s_.h.out * s_.h.in + y) * s_.w.in;
          for (int64_t j = 0; j < s_.w.out && sum == sum; ++j) {
            const int64_t x = j + t % 3 * s_.w.dilation - s_.w.padding;
            if (x >= 0 && x < s_.w.in)
              sum += double(p_.x[(from + x) * s_.c_in + c + lane]) *
                     p_.dz[(row * s_.w.out + j) * s_.c_out + o];
          }
        }
        sums[lane] = static_cast<float>(sum);
      }
      g[t] = load(sums);
    }
  }

  // dweight of the sums.
  void finish() const {
    cpu::parallel_ranges(s_.c_out, s_.c_in * T::points * 2, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        float* to = p_.dweight + o * s_.c_in * kTaps;
        for_vectors<float, 1, false>(s_.c_in, [&](int64_t c, auto part, auto) {
          const float* from =
              sums_ + c / kPanel<float> * space_.of_sums + o * kPanel<float> + c % kPanel<float>;
          Vec m[T::points], g[kTaps];
          for (int q = 0; q < T::points; ++q) {
            const float* of_point = from + q * space_.panels * space_.of_sums;
            m[q] = load(of_point);
            for (int64_t r = 1; r < space_.ranges; ++r)
              m[q] += load(of_point + r * space_.sums_size);
          }
          T::filters(m, g);
          if (!is_finite(g)) compute_directly(o, c, part.count(kLanes), g);
          if (p_.weight_layout == Layout::channels_last) {
            for (int t = 0; t < kTaps; ++t) part.write(to + t * s_.c_in + c, g[t]);
          } else {
            alignas(64) float taps[kTaps][kLanes];
            for (int t = 0; t < kTaps; ++t) store(taps[t], g[t]);
            for (int64_t lane = 0; lane < part.count(kLanes); ++lane) {
              for (int t = 0; t < kTaps; ++t) to[(c + lane) * kTaps + t] = taps[t][lane];
            }
          }
        });
      }
    });
  }

  const WinogradConv2dBackward& p_;
  const WinogradConv2dShape& s_;
  const WeightSpace<T> space_;
  float* const sums_;
};

void run_backward(const WinogradConv2dBackward& p, void* workspace) {
  if (p.shape.n == 0) {
    for (int64_t i = 0; i < p.shape.c_out * p.shape.c_in * kTaps; ++i) p.dweight[i] = 0;
    return;
  }
  with_tile(p.shape.tile, [&](auto tile) { Backward<decltype(tile)>(p, workspace).run(); });
}
size_t backward_workspace(const WinogradConv2dBackward& p) {
  return with_tile(p.shape.tile, [&](auto tile) { return WeightSpace<decltype(tile)>(p).bytes(); });
}

}  // namespace

void add_winograd_conv2d(cpu::KernelTable& table) {
  table.winograd_packed_size = packed_size;
  table.winograd_pack = run_pack;
  table.winograd_conv2d = {forward_workspace, backward_workspace, run_forward, run_backward};
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
