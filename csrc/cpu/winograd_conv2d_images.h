// How Winograd's convolution reads and writes images: the grid of tiles, and the transforms of tiles on their way in
// and out.
#pragma once

#include "winograd_conv2d_weight.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

// Sums are made of parts of so many channels (of dweight: tiles), each summed for itself: so 4x4 is as exact as a
// direct sum (docs/accuracy.md).
inline constexpr int64_t kPart = 16;
// Channels (tiles) whose panel stays in the first-level cache. A multiple of kPart.
inline constexpr int64_t kChunk = 64;
inline constexpr int64_t kLine = 16;  // floats of a line of a cache

// f(slot) for each slot, in parallel if there are more than one: each has work for a thread.
template <class F>
void in_slots(int64_t slots, F&& f) {
  constexpr int64_t kWork = int64_t{1} << 20;
  cpu::parallel_ranges(slots, kWork, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) f(begin);
  });
}

// ---- the grid of tiles ----

// Tiles by image, grid of the dilation, row and column. A dilated convolution is one without dilation on each of the
// grids of every dilation-th pixel.
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

// ---- images ----

// The channels of one group of a batch of images.
struct Images {
  DType dtype;
  Layout layout;
  const void* data;
  int64_t height, width, channels;  // of all groups

  Images(const WinogradConv2dShape& s, const void* all, int64_t height_, int64_t width_,
         int64_t of_group, int64_t group)
      : dtype(s.dtype),
        layout(s.layout),
        data(all),
        height(height_),
        width(width_),
        channels(of_group * s.groups) {
    data = moved(dtype, all, at(0, 0, 0, group * of_group));
  }
  bool is_last() const { return layout == Layout::channels_last; }
  // Tiles are read and written where they are. Those of other images go through a stage.
  bool is_direct() const { return dtype == DType::f32 && is_last(); }
  int64_t at(int64_t n, int64_t y, int64_t x, int64_t c) const {
    return is_last() ? ((n * height + y) * width + x) * channels + c
                     : ((n * channels + c) * height + y) * width + x;
  }
  // Elements from one channel to the next.
  int64_t channel() const { return is_last() ? 1 : height * width; }
  bool has_row(int64_t y) const { return y >= 0 && y < height; }
  bool has_column(int64_t x) const { return x >= 0 && x < width; }
  bool has(int64_t y, int64_t x) const { return has_row(y) && has_column(x); }
};

// ---- the stage: a vector of channels of a rectangle of pixels in f32, [row][column][lanes] ----

struct Rectangle {
  int64_t n, y, x, rows, columns;
  int64_t step_y, step_x;  // the dilation
};
inline constexpr int64_t kStagePixels = 768;

// Pixels outside of the image are zeros.
template <class S>
void read_stage(const Images& images, const Rectangle& r, int64_t c, int64_t count, float* stage) {
  const S* data = static_cast<const S*>(images.data);
  for (int64_t i = 0; i < r.rows; ++i, stage += r.columns * kLanes) {
    const int64_t y = r.y + i * r.step_y;
    const bool has_row = images.has_row(y);
    if (images.is_last()) {
      with_lanes<float>(count, [&](auto part) {
        for (int64_t j = 0; j < r.columns; ++j) {
          const int64_t x = r.x + j * r.step_x;
          const bool inside = has_row && images.has_column(x);
          store(stage + j * kLanes, inside ? part.read(data + images.at(r.n, y, x, c)) : Vec{});
        }
      });
      continue;
    }
    // Rows are runs of pixels, which are transposed. There is no dilation.
    const int64_t within = has_row ? r.columns : 0;
    const int64_t begin = max_of(0, min_of(within, -r.x));
    const int64_t end = max_of(begin, min_of(within, images.width - r.x));
    for (int64_t j = 0; j < begin; ++j) store(stage + j * kLanes, Vec{});
    for (int64_t j = end; j < r.columns; ++j) store(stage + j * kLanes, Vec{});
    for (int64_t j = begin; j < end; j += kLanes) {
      const S* from = data + images.at(r.n, y, r.x + j, c);
      Vec block[kLanes] = {};
      with_lanes<float>(end - j, [&](auto part) {
        for (int64_t lane = 0; lane < count; ++lane)
          block[lane] = part.read(from + lane * images.channel());
      });
      transpose<decltype(block[0] < block[0])>(block);
      for (int64_t k = 0; k < min_of(kLanes, end - j); ++k)
        store(stage + (j + k) * kLanes, block[k]);
    }
  }
}
inline void read_stage(const Images& images, const Rectangle& r, int64_t c, int64_t count,
                       float* stage) {
  with_stored(images.dtype, [&]<class S>() { read_stage<S>(images, r, c, count, stage); });
}

// Pixels outside of the image are not written. `epilogue`: of the group.
template <class S>
void write_stage(const Images& images, const Rectangle& r, int64_t c, int64_t count,
                 const Epilogue<S>& epilogue, const float* stage) {
  const Vec one = broadcast(1.0f), none{};
  for (int64_t i = 0; i < r.rows; ++i, stage += r.columns * kLanes) {
    const int64_t y = r.y + i * r.step_y;
    if (y >= images.height) return;
    const int64_t columns = min_of(r.columns, ceil_div(images.width - r.x, r.step_x));
    if (images.is_last()) {
      with_lanes<float>(count, [&](auto part) {
        const Vec scale = epilogue.scale == nullptr ? one : part.read(epilogue.scale + c);
        const Vec shift = epilogue.shift == nullptr ? none : part.read(epilogue.shift + c);
        for (int64_t j = 0; j < columns; ++j) {
          Vec v[1] = {load(stage + j * kLanes)};
          epilogue.template finish<1>(v, scale, shift, images.at(r.n, y, r.x + j * r.step_x, c), 0,
                                      part);
        }
      });
      continue;
    }
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec block[kLanes] = {};
      for (int64_t k = 0; k < min_of(kLanes, columns - j); ++k)
        block[k] = load(stage + (j + k) * kLanes);
      transpose<decltype(block[0] < block[0])>(block);
      with_lanes<float>(columns - j, [&](auto part) {
        for (int64_t lane = 0; lane < count; ++lane) {
          const int64_t o = c + lane;
          Vec v[1] = {block[lane]};
          epilogue.template finish<1>(
              v, epilogue.scale == nullptr ? one : broadcast(epilogue.scale[o]),
              epilogue.shift == nullptr ? none : broadcast(epilogue.shift[o]),
              images.at(r.n, y, r.x + j, o), 0, part);
        }
      });
    }
  }
}

// f(first, rows, columns) for rectangles of tiles that together are `count` from `first` on. The inputs of each fit
// into the stage.
template <class T, class F>
void for_rectangles(const Grid<T>& grid, int64_t first, int64_t count, F&& f) {
  constexpr int64_t kColumns = (kStagePixels / T::TH - 2) / T::MW;
  const int64_t end = first + count;
  while (first < end) {
    const int64_t column = first % grid.columns;
    const int64_t columns = min_of(kColumns, min_of(end - first, grid.columns - column));
    int64_t rows = 1;
    if (columns == grid.columns) {
      rows = min_of((end - first) / columns, grid.rows - first / columns % grid.rows);
      rows = min_of(rows, (kStagePixels / (columns * T::MW + 2) - 2) / T::MH);
    }
    f(first, rows, columns);
    first += rows * columns;
  }
}

// ---- tiles in and out ----

template <int64_t kCount>
ADVDL_INLINE bool is_finite(const Vec (&v)[kCount]) {
  Vec sum{};  // 0, or NaN
#pragma GCC unroll 16
  for (int64_t i = 0; i < kCount; ++i) sum += v[i] * 0.0f;
  return !has_nan(sum);
}

// V of one tile and a vector of channels: points of_point apart. input(i, j): the pixel in row i and column j.
template <class T, class Input>
ADVDL_INLINE void transform_input(const Input& input, float* v, int64_t of_point) {
  Vec d[T::points];
#pragma GCC unroll 6
  for (int i = 0; i < T::TH; ++i) {
#pragma GCC unroll 6
    for (int j = 0; j < T::TW; ++j) d[i * T::TW + j] = input(i, j);
  }
  T::inputs(d);
#pragma GCC unroll 36
  for (int q = 0; q < T::points; ++q) store(v + q * of_point, d[q]);
}

// Z of one tile and a vector of channels, of its outputs' gradients.
template <class T, class Input>
ADVDL_INLINE void transform_gradient(const Input& input, float* z, int64_t of_point) {
  Vec d[T::MH * T::MW], m[T::points];
#pragma GCC unroll 4
  for (int i = 0; i < T::MH; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < T::MW; ++j) d[i * T::MW + j] = input(i, j);
  }
  T::gradients(d, m);
#pragma GCC unroll 36
  for (int q = 0; q < T::points; ++q) store(z + q * of_point, m[q]);
}

// Where transformed tiles are: elements from one point, tile and chunk of kChannels channels to the next.
template <int64_t kChannels>
struct Transformed {
  float* data;
  int64_t of_point, of_tile, of_chunk;
  ADVDL_INLINE float* at(int64_t tile, int64_t c) const {
    return data + tile * of_tile + c / kChannels * of_chunk + c % kChannels;
  }
};

// Tiles [begin, end) of those that `to` holds, which are `first` and the following ones.
template <class T, class To>
void transform_inputs_directly(const Grid<T>& grid, const Images& images, int64_t first,
                               int64_t begin, int64_t end, const To& to) {
  const WinogradConv2dShape& s = grid.s;
  const int64_t row = s.h.dilation * images.width * images.channels;
  const int64_t column = s.w.dilation * images.channels;
  const auto is_inside = [](const Conv2dAxis& axis, int64_t begin, int points) {
    return begin >= 0 && begin + (points - 1) * axis.dilation < axis.in;
  };
  for (int64_t t = begin; t < end; ++t) {
    const auto place = grid.place(first + t);
    const int64_t y = place.y - s.h.padding, x = place.x - s.w.padding;
    const float* pixel = static_cast<const float*>(images.data) + images.at(place.n, y, x, 0);
    if (is_inside(s.h, y, T::TH) && is_inside(s.w, x, T::TW)) {
      for_vectors<float, 1, false>(s.c_in, [&](int64_t c, auto part, auto) {
        transform_input<T>(
            [&](int i, int j) { return part.read(pixel + i * row + j * column + c); }, to.at(t, c),
            to.of_point);
      });
      continue;
    }
    // Outside of the image zeros are read.
    alignas(64) static const float zeros[kLanes] = {};
    bool has_row[T::TH], has_column[T::TW];
    for (int i = 0; i < T::TH; ++i) has_row[i] = images.has_row(y + i * s.h.dilation);
    for (int j = 0; j < T::TW; ++j) has_column[j] = images.has_column(x + j * s.w.dilation);
    const float* from[T::points];
    int64_t steps[T::points];
#pragma GCC unroll 6
    for (int i = 0; i < T::TH; ++i) {
#pragma GCC unroll 6
      for (int j = 0; j < T::TW; ++j) {
        const bool inside = has_row[i] & has_column[j];
        from[i * T::TW + j] = inside ? pixel + i * row + j * column : zeros;
        steps[i * T::TW + j] = inside;
      }
    }
    for_vectors<float, 1, false>(s.c_in, [&](int64_t c, auto part, auto) {
      transform_input<T>(
          [&](int i, int j) { return part.read(from[i * T::TW + j] + c * steps[i * T::TW + j]); },
          to.at(t, c), to.of_point);
    });
  }
}

// kGradients: dz in place of x.
template <class T, bool kGradients, class To>
void transform_staged(const Grid<T>& grid, const Images& images, int64_t first, int64_t begin,
                      int64_t end, const To& to) {
  constexpr int kEdge = kGradients ? 0 : 2;
  const WinogradConv2dShape& s = grid.s;
  const int64_t channels = kGradients ? s.c_out : s.c_in;
  alignas(64) float stage[kStagePixels * kLanes];
  const auto transform = [&](int64_t tile, int64_t rows, int64_t columns) {
    const auto place = grid.place(tile);
    const Rectangle r{place.n,
                      place.y - (kGradients ? 0 : s.h.padding),
                      place.x - (kGradients ? 0 : s.w.padding),
                      rows * T::MH + kEdge,
                      columns * T::MW + kEdge,
                      s.h.dilation,
                      s.w.dilation};
    for (int64_t c = 0; c < channels; c += kLanes) {
      read_stage(images, r, c, min_of(kLanes, channels - c), stage);
      int64_t t = tile - first;
      for (int64_t y = 0; y < rows; ++y) {
        const float* pixel = stage + y * T::MH * r.columns * kLanes;
        for (int64_t x = 0; x < columns; ++x, ++t, pixel += T::MW * kLanes) {
          const auto input = [&](int i, int j) {
            return load(pixel + (i * r.columns + j) * kLanes);
          };
          if constexpr (kGradients)
            transform_gradient<T>(input, to.at(t, c), to.of_point);
          else
            transform_input<T>(input, to.at(t, c), to.of_point);
        }
      }
    }
  };
  for_rectangles<T>(grid, first + begin, end - begin, transform);
}

template <class T, class To>
void transform_inputs(const Grid<T>& grid, const Images& images, int64_t first, int64_t begin,
                      int64_t end, const To& to) {
  if (images.is_direct())
    transform_inputs_directly<T>(grid, images, first, begin, end, to);
  else
    transform_staged<T, false>(grid, images, first, begin, end, to);
}

// As transform_inputs, of the gradients of outputs.
template <class T, class To>
void transform_gradients(const Grid<T>& grid, const Images& images, int64_t first, int64_t begin,
                         int64_t end, const To& to) {
  const WinogradConv2dShape& s = grid.s;
  if (!images.is_direct()) return transform_staged<T, true>(grid, images, first, begin, end, to);
  const int64_t row = s.h.dilation * images.width * images.channels;
  const int64_t column = s.w.dilation * images.channels;
  for (int64_t t = begin; t < end; ++t) {
    const auto place = grid.place(first + t);
    const float* pixel =
        static_cast<const float*>(images.data) + images.at(place.n, place.y, place.x, 0);
    for_vectors<float, 1, false>(s.c_out, [&](int64_t c, auto part, auto) {
      transform_gradient<T>(
          [&](int i, int j) {
            return i < place.height && j < place.width ? part.read(pixel + i * row + j * column + c)
                                                       : Vec{};
          },
          to.at(t, c), to.of_point);
    });
  }
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
