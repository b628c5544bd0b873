// Convolution by a 3x3 filter with stride 1 by Winograd's minimal filtering.
//
// A tile of MH x MW outputs is made of (MH + 2) x (MW + 2) inputs d: out = A^T [(G g G^T) * (B^T d B)] A, with one product per
// *point* (an element of the transformed tile) in place of nine per output: 4 for each output of 2x2, 3 of 2x4, 2.25 of 4x4. The products
// of all channels at one point are a matrix product: rows are tiles, the depth is C_in, columns are C_out.
//
// A block of tiles is transformed (into V), multiplied (into `products`) panel by panel and transformed back, with V and the products
// in the second-level cache. A dilated convolution is one on dilation x dilation sub-grids of the image.
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
      {1 / (kA2 * kB2), 0, 0},           {1 / kNa, kA / kNa, kA2 / kNa}, {1 / kNa, -kA / kNa, kA2 / kNa},
      {1 / kNb, kB / kNb, kB2 / kNb}, {1 / kNb, -kB / kNb, kB2 / kNb}, {0, 0, 1}};
  ADVDL_INLINE static void inputs(const Vec* from, int step, Vec* to) {
    constexpr float a = kA, b = kB, a2 = kA2, b2 = kB2, ab = kA2 * kB2, sum = kA2 + kB2;
    const Vec d0 = from[0], d1 = from[step], d2 = from[2 * step], d3 = from[3 * step];
    const Vec d4 = from[4 * step], d5 = from[5 * step];
    const Vec even_a = d4 - d2 * b2, odd_a = d3 - d1 * b2, even_b = d4 - d2 * a2, odd_b = d3 - d1 * a2;
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
    const Vec z0 = from[0], z1 = from[from_step], z2 = from[2 * from_step], z3 = from[3 * from_step];
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
        for (int i = 0; i < TH; ++i) row[j] += m[i * TW + j] * static_cast<float>(H::kWeights[i][a]);
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
void with_tile(WinogradTile tile, F&& f) {
  switch (tile) {
    case WinogradTile::two_by_two:
      return f(Tile<2, 2>{});
    case WinogradTile::two_by_four:
      return f(Tile<2, 4>{});
    case WinogradTile::four_by_four:
      return f(Tile<4, 4>{});
  }
}

// ---- weights ----

int64_t points_of(WinogradTile tile) {
  int64_t points = 0;
  with_tile(tile, [&](auto t) { points = decltype(t)::points; });
  return points;
}

int64_t packed_size(const WinogradWeight& w) {
  return points_of(w.tile) * round_up(w.c_out, kPanel<float>) * w.c_in;
}

// Input and output channels that are transformed at a time: their 9 numbers stay in the first-level cache.
constexpr int64_t kPackInputs = 8, kPackOutputs = 16;

// In fp64, as the points are no powers of two: each number of the result is rounded once.
template <class T>
void pack(const WinogradWeight& w) {
  constexpr int64_t panel = kPanel<float>, groups = (panel + kPackOutputs - 1) / kPackOutputs;
  const int64_t panels = ceil_div(w.c_out, panel), of_point = panels * w.c_in * panel;
  // Elements between output channels, input channels and taps of the weight.
  const int64_t first = w.turned ? w.c_out : w.c_in;  // channels of a row of the weight
  const bool is_last = w.layout == Layout::channels_last;
  const int64_t row = first * kTaps, column = is_last ? 1 : kTaps, tap = is_last ? first : 1;
  const int64_t of_out = w.turned ? column : row, of_in = w.turned ? row : column;
  const int64_t parts = ceil_div(w.c_in, kPackInputs);
  const int64_t work = kPackInputs * panel * T::points * 2;
  cpu::parallel_ranges(panels * parts, work, [&](int64_t begin, int64_t end) {
    double g[kPackInputs][kTaps][kPackOutputs];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t q = i / parts, c = i % parts * kPackInputs;
      const int64_t inputs = min_of(kPackInputs, w.c_in - c);
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t o = q * panel + group * kPackOutputs;
        for (int64_t lane = 0; lane < kPackOutputs; ++lane) {
          const bool exists = o + lane < w.c_out;
          const float* from = w.weight + (exists ? (o + lane) * of_out + c * of_in : 0);
          for (int64_t k = 0; k < inputs; ++k) {
            for (int t = 0; t < kTaps; ++t)
              g[k][w.turned ? kTaps - 1 - t : t][lane] = exists ? from[k * of_in + t * tap] : 0;
          }
        }
        const int64_t width = min_of(kPackOutputs, panel);
        for (int64_t k = 0; k < inputs; ++k) {
          float* to = w.packed + (q * w.c_in + c + k) * panel + group * kPackOutputs;
          for (int a = 0; a < T::TH; ++a) {
            double rows[3][kPackOutputs];
            for (int b = 0; b < 3; ++b) {
              for (int64_t lane = 0; lane < kPackOutputs; ++lane)
                rows[b][lane] = T::H::kWeights[a][0] * g[k][b][lane] +
                                T::H::kWeights[a][1] * g[k][3 + b][lane] +
                                T::H::kWeights[a][2] * g[k][6 + b][lane];
            }
            for (int b = 0; b < T::TW; ++b) {
              for (int64_t lane = 0; lane < width; ++lane)
                to[(a * T::TW + b) * of_point + lane] = static_cast<float>(
                    T::W::kWeights[b][0] * rows[0][lane] + T::W::kWeights[b][1] * rows[1][lane] +
                    T::W::kWeights[b][2] * rows[2][lane]);
            }
          }
        }
      }
    }
  });
}

void run_pack(const WinogradWeight& w) {
  with_tile(w.tile, [&](auto tile) { pack<decltype(tile)>(w); });
}

// ---- the grid of tiles ----

// Tiles by image, phase of the dilation, row and column.
template <class T>
struct Grid {
  const WinogradConv2dShape& s;
  int64_t rows, columns;  // tiles of a phase: as many as the largest one has

  explicit Grid(const WinogradConv2dShape& shape)
      : s(shape),
        rows(ceil_div(ceil_div(shape.h.out, shape.h.dilation), T::MH)),
        columns(ceil_div(ceil_div(shape.w.out, shape.w.dilation), T::MW)) {}
  int64_t phases() const { return s.h.dilation * s.w.dilation; }
  int64_t tiles() const { return s.n * phases() * rows * columns; }

  struct Place {
    int64_t n, y, x;  // of the first output; may lie outside where a phase has fewer tiles
  };
  Place place(int64_t tile) const {
    const int64_t column = tile % columns, row = tile / columns % rows;
    const int64_t phase = tile / (columns * rows) % phases();
    return {tile / (columns * rows * phases()),
            phase / s.w.dilation + row * T::MH * s.h.dilation,
            phase % s.w.dilation + column * T::MW * s.w.dilation};
  }
};

// ---- channels_last ----

// v[point][tile][depth] of one tile.
template <class T>
void transform_inputs(const WinogradConv2dShape& s, const float* image, const typename Grid<T>::Place& at,
                      float* v, int64_t of_point) {
  const int64_t y = at.y - s.h.padding, x = at.x - s.w.padding;
  const int64_t row = s.h.dilation * s.w.in * s.c_in, column = s.w.dilation * s.c_in;
  const float* from = image + ((at.n * s.h.in + y) * s.w.in + x) * s.c_in;
  bool inside[T::points];
  for (int i = 0; i < T::TH; ++i) {
    for (int j = 0; j < T::TW; ++j) {
      const int64_t yy = y + i * s.h.dilation, xx = x + j * s.w.dilation;
      inside[i * T::TW + j] = yy >= 0 && yy < s.h.in && xx >= 0 && xx < s.w.in;
    }
  }
  const bool all = inside[0] && inside[T::points - 1];
  for_vectors<float, 1, false>(s.c_in, [&](int64_t c, auto part, auto) {
    Vec d[T::points];
    if (all) {
#pragma GCC unroll 6
      for (int i = 0; i < T::TH; ++i) {
#pragma GCC unroll 6
        for (int j = 0; j < T::TW; ++j) d[i * T::TW + j] = part.read(from + i * row + j * column + c);
      }
    } else {
#pragma GCC unroll 6
      for (int i = 0; i < T::TH; ++i) {
#pragma GCC unroll 6
        for (int j = 0; j < T::TW; ++j)
          d[i * T::TW + j] =
              inside[i * T::TW + j] ? part.read(from + i * row + j * column + c) : Vec{};
      }
    }
    T::inputs(d);
#pragma GCC unroll 36
    for (int q = 0; q < T::points; ++q) store(v + q * of_point + c, d[q]);
  });
}

// out[y][x][column...] of one tile directly, for the columns of one vector: where the sums of the transformed tile are not finite. Inf and
// NaN then reach the outputs that they reach in a direct convolution, and no others.
template <class T>
void compute_directly(const WinogradConv2dForward& p, const typename Grid<T>::Place& at, int64_t o,
                      int64_t count, Vec* out) {
  const WinogradConv2dShape& s = p.shape;
  const WinogradWeight& w = p.weight;
  const int64_t first = w.turned ? w.c_out : w.c_in;
  const bool is_last = w.layout == Layout::channels_last;
  const int64_t row = first * kTaps, column = is_last ? 1 : kTaps, tap = is_last ? first : 1;
  const int64_t of_out = w.turned ? column : row, of_in = w.turned ? row : column;
  for (int i = 0; i < T::MH; ++i) {
    for (int j = 0; j < T::MW; ++j) {
      alignas(64) float sums[kLanes] = {};
      for (int64_t lane = 0; lane < count; ++lane) {
        double sum = 0;
        for (int64_t t = 0; t < kTaps; ++t) {
          const int64_t y = at.y + (i + t / 3) * s.h.dilation - s.h.padding;
          const int64_t x = at.x + (j + t % 3) * s.w.dilation - s.w.padding;
          if (y < 0 || y >= s.h.in || x < 0 || x >= s.w.in) continue;
          const float* from = p.x + (at.n * s.h.in * s.w.in + y * s.w.in + x) * s.c_in;
          const float* weight = w.weight + (o + lane) * of_out + (w.turned ? kTaps - 1 - t : t) * tap;
          for (int64_t c = 0; c < s.c_in; ++c) sum += double(from[c]) * weight[c * of_in];
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
  const int64_t height = min_of(T::MH, ceil_div(s.h.out - at.y, s.h.dilation));
  const int64_t width = min_of(T::MW, ceil_div(s.w.out - at.x, s.w.dilation));
  if (height <= 0 || width <= 0) return;
  const int64_t first = ((at.n * s.h.out + at.y) * s.w.out + at.x) * s.c_out + column;
  const Vec one = broadcast(1.0f), none{};
  for_vectors<float, 1, false>(
      min_of(kPanel<float>, s.c_out - column), [&](int64_t c, auto part, auto) {
        Vec m[T::points], out[T::MH * T::MW];
#pragma GCC unroll 36
        for (int q = 0; q < T::points; ++q) m[q] = load(products + q * of_point + c);
        T::outputs(m, out);
        Vec finite{};  // 0, or NaN
#pragma GCC unroll 16
        for (int i = 0; i < T::MH * T::MW; ++i) finite += out[i] * 0.0f;
        if (lane_sum(finite) != 0.0) compute_directly<T>(p, at, column + c, part.count(kLanes), out);
        const Vec scale = epilogue.scale == nullptr ? one : part.read(epilogue.scale + column + c);
        const Vec shift = epilogue.shift == nullptr ? none : part.read(epilogue.shift + column + c);
        for (int i = 0; i < height; ++i) {
          const int64_t to = first + i * step_h + c;
          if (width == T::MW) {
            epilogue.finish<T::MW>(*reinterpret_cast<Vec(*)[T::MW]>(out + i * T::MW), scale, shift, to,
                                   step_w, part);
          } else {
            for (int j = 0; j < width; ++j) {
              Vec sum[1] = {out[i * T::MW + j]};
              epilogue.finish<1>(sum, scale, shift, to + j * step_w, 0, part);
            }
          }
        }
      });
}

// products[point][tile][panel] of `count` tiles and one panel.
template <class T>
void multiply(const float* v, int64_t depth, int64_t stride, int64_t of_point, int64_t count, const float* packed,
              int64_t packed_of_point, float* products) {
  for (int q = 0; q < T::points; ++q) {
    const float* panel = packed + q * packed_of_point;
    for (int64_t t = 0; t < count; t += kTileRows) {
      const int64_t rows = min_of(kTileRows, count - t);
      const float* row[kTileRows];
      for (int64_t i = 0; i < rows; ++i) row[i] = v + q * of_point + (t + i) * stride;
      multiply_tile<kPart>(rows, row, 1, panel, kPanel<float>, depth,
                              products + (q * kBlock<T> + t) * kPanel<float>, kPanel<float>, false);
    }
  }
}

// V of as many blocks of tiles as are computed together.
struct Workspace {
  int64_t stride, blocks;  // elements of a row of V; blocks
  float* v;
  template <class T>
  Workspace(const Grid<T>& grid, void* memory)
      : stride(round_up(grid.s.c_in, kLanes)), v(static_cast<float*>(memory)) {
    // Blocks of one panel cannot be shared by threads, so they have V to themselves; V of more stays in the last-level cache.
    const int64_t block_bytes = T::points * kBlock<T> * stride * int64_t{4};
    blocks = max_of(1, min_of(ceil_div(grid.tiles(), kBlock<T>), (int64_t{8} << 20) / block_bytes));
  }
  template <class T>
  size_t bytes() const {
    return blocks * T::points * kBlock<T> * stride * sizeof(float);
  }
};

template <class T>
void forward(const WinogradConv2dForward& p, void* memory) {
  const WinogradConv2dShape& s = p.shape;
  const Grid<T> grid(s);
  const Workspace space(grid, memory);
  const int64_t panels = ceil_div(s.c_out, kPanel<float>), tiles = grid.tiles();
  const Epilogue<float> epilogue{p.scale, p.shift,       p.residual,
                                 p.out,   p.act,         static_cast<float>(p.act_param),
                                 p.scale != nullptr || p.shift != nullptr};
  const int64_t of_point = kBlock<T> * space.stride, of_block = T::points * of_point;
  const int64_t panel_size = s.c_in * kPanel<float>, packed_of_point = panels * panel_size;
  const auto transform = [&](int64_t first, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      transform_inputs<T>(s, p.x, grid.place(first + t),
                          space.v + t / kBlock<T> * of_block + t % kBlock<T> * space.stride, of_point);
  };
  // One block of tiles, one panel.
  const auto finish = [&](int64_t first, int64_t block, int64_t q) {
    alignas(64) float products[T::points * kBlock<T> * kPanel<float>];
    const int64_t count = min_of(kBlock<T>, tiles - first - block * kBlock<T>);
    multiply<T>(space.v + block * of_block, s.c_in, space.stride, of_point, count,
                p.weight.packed + q * panel_size, packed_of_point, products);
    for (int64_t t = 0; t < count; ++t)
      transform_outputs<T>(p, epilogue, grid.place(first + block * kBlock<T> + t),
                           products + t * kPanel<float>, kBlock<T> * kPanel<float>, q * kPanel<float>);
  };
  for (int64_t first = 0; first < tiles; first += space.blocks * kBlock<T>) {
    const int64_t count = min_of(space.blocks * kBlock<T>, tiles - first), blocks = ceil_div(count, kBlock<T>);
    cpu::parallel_ranges(count, T::points * s.c_in * 4,
                         [&](int64_t begin, int64_t end) { transform(first, begin, end); });
    cpu::parallel_ranges(blocks * panels, T::points * kBlock<T> * panel_size / 16,
                         [&](int64_t begin, int64_t end) {
                           for (; begin < end; ++begin) finish(first, begin / panels, begin % panels);
                         });
  }
}

void run_forward(const WinogradConv2dForward& p, void* workspace) {
  with_tile(p.shape.tile, [&](auto tile) { forward<decltype(tile)>(p, workspace); });
}
size_t forward_workspace(const WinogradConv2dForward& p) {
  size_t bytes = 0;
  with_tile(p.shape.tile, [&](auto tile) {
    using T = decltype(tile);
    bytes = Workspace(Grid<T>(p.shape), nullptr).template bytes<T>();
  });
  return bytes;
}

// ---- gradient of the weight ----
//
// By the same tiles, transposed: dweight = G^T [sum over tiles of (B^T d B) * (A dz A^T)] G. At each point the sum over tiles is a
// matrix product: rows are output channels, the depth is tiles, columns are input channels.

template <class T>
struct WeightSpace {
  int64_t in_stride, out_stride;  // elements of a row of V, of Z
  int64_t tiles;                  // that are transformed together: V and Z stay in the last-level cache
  float *v, *z, *sums;            // [points][tiles][in_stride], [points][tiles][out_stride], [points][out_stride][in_stride]
  size_t bytes;

  WeightSpace(const Grid<T>& grid, void* memory) {
    in_stride = round_up(grid.s.c_in, kPanel<float>);
    out_stride = round_up(round_up(grid.s.c_out, kTileRows), kLanes);
    const int64_t of_tile = T::points * (in_stride + out_stride) * int64_t{4};
    const int64_t most = (int64_t{12} << 20) / of_tile / kPart * kPart;
    tiles = max_of(kPart, min_of(round_up(grid.tiles(), kPart), most));
    v = static_cast<float*>(memory);
    z = v + T::points * tiles * in_stride;
    sums = z + T::points * tiles * out_stride;
    bytes = (T::points * (tiles * (in_stride + out_stride) + in_stride * out_stride)) * sizeof(float);
  }
};

// z[point][tile][channel] of one tile of dz.
template <class T>
void transform_gradients(const WinogradConv2dShape& s, const float* dz,
                         const typename Grid<T>::Place& at, float* z, int64_t of_point) {
  const int64_t height = min_of(T::MH, ceil_div(s.h.out - at.y, s.h.dilation));
  const int64_t width = min_of(T::MW, ceil_div(s.w.out - at.x, s.w.dilation));
  const int64_t row = s.h.dilation * s.w.out * s.c_out, column = s.w.dilation * s.c_out;
  const float* from = dz + ((at.n * s.h.out + at.y) * s.w.out + at.x) * s.c_out;
  for_vectors<float, 1, false>(s.c_out, [&](int64_t c, auto part, auto) {
    Vec d[T::MH * T::MW], m[T::points];
#pragma GCC unroll 4
    for (int i = 0; i < T::MH; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < T::MW; ++j)
        d[i * T::MW + j] =
            i < height && j < width ? part.read(from + i * row + j * column + c) : Vec{};
    }
    T::gradients(d, m);
#pragma GCC unroll 36
    for (int q = 0; q < T::points; ++q) store(z + q * of_point + c, m[q]);
  });
}

template <class T>
void backward(const WinogradConv2dBackward& p, void* memory) {
  const WinogradConv2dShape& s = p.shape;
  const Grid<T> grid(s);
  const WeightSpace<T> space(grid, memory);
  const int64_t all = grid.tiles(), bands = ceil_div(s.c_out, kTileRows);
  const int64_t panels = space.in_stride / kPanel<float>;
  const int64_t of_v = space.tiles * space.in_stride, of_z = space.tiles * space.out_stride;
  const int64_t of_sums = space.out_stride * space.in_stride;
  if (all == 0) {
    for (int64_t i = 0; i < s.c_out * s.c_in * kTaps; ++i) p.dweight[i] = 0;
    return;
  }
  for (int64_t first = 0; first < all; first += space.tiles) {
    const int64_t count = min_of(space.tiles, all - first);
    cpu::parallel_ranges(
        count, T::points * (s.c_in + s.c_out) * 4, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) {
            const auto at = grid.place(first + t);
            transform_inputs<T>(s, p.x, at, space.v + t * space.in_stride, of_v);
            transform_gradients<T>(s, p.dz, at, space.z + t * space.out_stride, of_z);
          }
        });
    // A panel of V [tiles][panel] stays in the second-level cache for all bands of output channels.
    cpu::parallel_ranges(
        T::points * panels * bands, kTileRows * kPanel<float> * count / 16,
        [&](int64_t begin, int64_t end) {
          for (; begin < end; ++begin) {
            const int64_t q = begin / (panels * bands), panel = begin / bands % panels;
            const int64_t o = begin % bands * kTileRows;
            const float* row[kTileRows];
            for (int64_t i = 0; i < kTileRows; ++i) row[i] = space.z + q * of_z + o + i;
            float* to = space.sums + q * of_sums + o * space.in_stride + panel * kPanel<float>;
            multiply_tile<kPart>(kTileRows, row, space.out_stride,
                                 space.v + q * of_v + panel * kPanel<float>, space.in_stride, count,
                                 to, space.in_stride, first > 0);
          }
        });
  }
  cpu::parallel_ranges(s.c_out, s.c_in * T::points * 2, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      float* to = p.dweight + o * s.c_in * kTaps;
      for_vectors<float, 1, false>(s.c_in, [&](int64_t c, auto part, auto) {
        Vec m[T::points], g[kTaps];
        for (int q = 0; q < T::points; ++q)
          m[q] = load(space.sums + q * of_sums + o * space.in_stride + c);
        T::filters(m, g);
        if (p.weight_layout == Layout::channels_last) {
          for (int t = 0; t < kTaps; ++t) part.write(to + t * s.c_in + c, g[t]);
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

void run_backward(const WinogradConv2dBackward& p, void* workspace) {
  with_tile(p.shape.tile, [&](auto tile) { backward<decltype(tile)>(p, workspace); });
}
size_t backward_workspace(const WinogradConv2dBackward& p) {
  size_t bytes = 0;
  with_tile(p.shape.tile, [&](auto tile) {
    using T = decltype(tile);
    bytes = WeightSpace<T>(Grid<T>(p.shape), nullptr).bytes;
  });
  return bytes;
}

}  // namespace

void add_winograd_conv2d(cpu::KernelTable& table) {
  table.winograd_packed_size = packed_size;
  table.winograd_pack = run_pack;
  table.winograd_conv2d = {forward_workspace, backward_workspace, run_forward, run_backward};
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
