// How Winograd's convolution reads and writes images: the transforms of tiles on their way in, and the stage.
#pragma once

#include "winograd_conv2d_grid.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

// Sums are made of parts of so many channels (of dweight: tiles), each summed for itself: so 4x4 is as exact as a
// direct sum (docs/accuracy.md).
inline constexpr int64_t kPart = 16;
// Channels (tiles) whose panel stays in the first-level cache. A multiple of kPart.
inline constexpr int64_t kChunk = 64;

// f(slot) for each slot, in parallel if there are more than one: each has work for a thread.
template <class F>
void in_slots(int64_t slots, F&& f) {
  constexpr int64_t kWork = int64_t{1} << 20;
  cpu::parallel_ranges(slots, kWork, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) f(begin);
  });
}

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
  // If true, tiles are read and written where they are, else through a stage.
  bool is_last() const { return layout == Layout::channels_last; }
  int64_t at(int64_t n, int64_t y, int64_t x, int64_t c) const {
    return is_last() ? ((n * height + y) * width + x) * channels + c
                     : ((n * channels + c) * height + y) * width + x;
  }
  // Elements from one channel to the next.
  int64_t channel() const { return is_last() ? 1 : height * width; }
  bool has(int64_t y, int64_t x) const { return y >= 0 && y < height && x >= 0 && x < width; }
};

// ---- the stage: a vector of channels of rows of pixels in f32, [row][column][lanes] ----

constexpr int64_t kStagePixels = 768, kStageRows = 64;
// The inputs of one row of tiles, of six rows, fit into the stage, with a column of zeros on each side.
static_assert((kWinogradWidest + 2) * 6 <= kStagePixels);

// Columns [x, x + columns) of an image, of a list of its rows.
struct Rectangle {
  int64_t n, x, columns, rows;
  int64_t y[kStageRows];
};

// Tiles of neighbouring strips, from `first` on. Each row of strips but the first follows the one before.
template <class T>
struct TileRectangle {
  const Grid<T>& grid;
  int64_t first, rows, columns;
  typename Grid<T>::Place place;  // of the first

  const Strip<T::MH>& row(int64_t i) const { return *grid.rows.at(place.row + i); }
  const Strip<T::MW>& column(int64_t i) const { return *grid.columns.at(place.column + i); }
  int64_t tile(int64_t i, int64_t j) const { return first + i * grid.columns.count + j; }

  // Rows of a strip are kept once: the first row of strip i is at i * MH.
  Rectangle inputs() const {
    Rectangle r;
    r.n = place.n;
    r.x = grid.stages_rows() ? -1 : column(0).in[0];
    r.columns = grid.stages_rows() ? grid.s.w.in + 2 : column(columns - 1).in[T::MW + 1] + 1 - r.x;
    r.rows = 0;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = i == 0 ? 0 : 2; k < T::TH; ++k) r.y[r.rows++] = row(i).in[k];
    return r;
  }
  Rectangle outputs() const {
    Rectangle r;
    r.n = place.n;
    r.x = grid.stages_rows() ? 0 : column(0).out[0];
    r.columns = grid.stages_rows() ? grid.s.w.out + 1 : columns * T::MW;
    r.rows = 0;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < T::MH; ++k) r.y[r.rows++] = row(i).out[k];
    return r;
  }
};

// f(rectangle) for rectangles that together are `count` tiles from `first` on. Each fits into the stage. With a dilation
// of the columns, the stage holds whole rows of pixels. Those of outputs are then complete only if the tiles are.
template <class T, class F>
void for_rectangles(const Grid<T>& grid, int64_t first, int64_t count, F&& f) {
  constexpr int64_t kColumns = (kStagePixels / T::TH - 2) / T::MW;
  const int64_t end = first + count;
  while (first < end) {
    const auto place = grid.place(first);
    int64_t columns = min_of(end - first, grid.columns.count - place.column);
    const bool stages_rows = grid.stages_rows();
    if (!stages_rows) columns = min_of(columns, kColumns);
    TileRectangle<T> tiles{grid, first, 1, columns, place};
    if (columns == grid.columns.count) {
      const int64_t pixels =
          (stages_rows ? max_of(grid.s.w.in, grid.s.w.out) : columns * T::MW) + 2;
      const int64_t most = min_of(min_of((end - first) / columns, grid.rows.count - place.row),
                                  (min_of(kStageRows, kStagePixels / pixels) - 2) / T::MH);
      while (tiles.rows < most && tiles.row(tiles.rows).follows) ++tiles.rows;
    }
    f(tiles);
    first += tiles.rows * columns;
  }
}

// Pixels outside of the image are zeros.
template <class S>
void read_stage(const Images& images, const Rectangle& r, int64_t c, int64_t count, float* stage) {
  const S* data = static_cast<const S*>(images.data);
  for (int64_t i = 0; i < r.rows; ++i, stage += r.columns * kLanes) {
    const int64_t y = r.y[i];
    const int64_t within = y >= 0 && y < images.height ? r.columns : 0;
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

// Pixels outside of the image are not written. `epilogue`: of the group.
template <class S>
void write_stage(const Images& images, const Rectangle& r, int64_t c, int64_t count,
                 const Epilogue<S>& epilogue, const float* stage) {
  const Vec one = broadcast(1.0f), none{};
  const int64_t columns = min_of(r.columns, images.width - r.x);
  for (int64_t i = 0; i < r.rows; ++i, stage += r.columns * kLanes) {
    if (r.y[i] >= images.height) continue;
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
              images.at(r.n, r.y[i], r.x + j, o), 0, part);
        }
      });
    }
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

// from[row][column]: the pixels at these coordinates, zeros outside of the image.
template <class T, class S, size_t kRows, size_t kColumns>
ADVDL_INLINE void gather(const Grid<T>& grid, const Images& images, int64_t n,
                         const int64_t (&y)[kRows], const int64_t (&x)[kColumns], const S** from) {
  const S* data = static_cast<const S*>(images.data);
  const S* zeros = grid.template zeros<S>();
  int64_t columns[kColumns];
  for (size_t j = 0; j < kColumns; ++j) columns[j] = images.at(0, 0, x[j], 0);
#pragma GCC unroll 6
  for (size_t i = 0; i < kRows; ++i) {
    const S* row = data + images.at(n, y[i], 0, 0);
    const bool has_row = images.has(y[i], 0);
#pragma GCC unroll 6
    for (size_t j = 0; j < kColumns; ++j)
      from[i * kColumns + j] = has_row & images.has(0, x[j]) ? row + columns[j] : zeros;
  }
}

// Tiles [begin, end) of those that `to` holds, which are `first` and the following ones.
template <class T, class S, class To>
void transform_inputs_directly(const Grid<T>& grid, const Images& images, int64_t first,
                               int64_t begin, int64_t end, const To& to) {
  const WinogradConv2dShape& s = grid.s;
  const int64_t row = s.h.dilation * images.width * images.channels;
  const int64_t column = s.w.dilation * images.channels;
  const S* data = static_cast<const S*>(images.data);
  for (int64_t t = begin; t < end; ++t) {
    const auto place = grid.place(first + t);
    const auto& rows = *grid.rows.at(place.row);
    const auto& columns = *grid.columns.at(place.column);
    if (rows.is_inside && columns.is_inside) {
      const S* pixel = data + images.at(place.n, rows.in[0], columns.in[0], 0);
      for_vectors<float, 1, false>(s.c_in, [&](int64_t c, auto part, auto) {
        transform_input<T>(
            [&](int i, int j) { return part.read(pixel + i * row + j * column + c); }, to.at(t, c),
            to.of_point);
      });
      continue;
    }
    const S* from[T::points];
    gather(grid, images, place.n, rows.in, columns.in, from);
    for_vectors<float, 1, false>(s.c_in, [&](int64_t c, auto part, auto) {
      transform_input<T>([&](int i, int j) { return part.read(from[i * T::TW + j] + c); },
                         to.at(t, c), to.of_point);
    });
  }
}

// As transform_inputs_directly, of the gradients of outputs.
template <class T, class S, class To>
void transform_gradients_directly(const Grid<T>& grid, const Images& images, int64_t first,
                                  int64_t begin, int64_t end, const To& to) {
  for (int64_t t = begin; t < end; ++t) {
    const auto place = grid.place(first + t);
    const S* from[T::MH * T::MW];
    gather(grid, images, place.n, grid.rows.at(place.row)->out, grid.columns.at(place.column)->out,
           from);
    for_vectors<float, 1, false>(grid.s.c_out, [&](int64_t c, auto part, auto) {
      transform_gradient<T>([&](int i, int j) { return part.read(from[i * T::MW + j] + c); },
                            to.at(t, c), to.of_point);
    });
  }
}

// kGradients: dz in place of x.
template <class T, bool kGradients, class To>
void transform_staged(const Grid<T>& grid, const Images& images, int64_t first, int64_t begin,
                      int64_t end, const To& to) {
  const int64_t channels = kGradients ? grid.s.c_out : grid.s.c_in;
  alignas(64) float stage[kStagePixels * kLanes];
  const auto transform = [&](const TileRectangle<T>& tiles) {
    const Rectangle r = kGradients ? tiles.outputs() : tiles.inputs();
    for (int64_t c = 0; c < channels; c += kLanes) {
      with_stored(images.dtype, [&]<class S>() {
        read_stage<S>(images, r, c, min_of(kLanes, channels - c), stage);
      });
      for (int64_t y = 0; y < tiles.rows; ++y) {
        const float* row = stage + y * T::MH * r.columns * kLanes;
        for (int64_t x = 0; x < tiles.columns; ++x) {
          const auto& columns = tiles.column(x);
          const auto input = [&](int i, int j) {
            const int64_t at = (kGradients ? columns.out[j] : columns.in[j]) - r.x;
            return load(row + (i * r.columns + at) * kLanes);
          };
          float* transformed = to.at(tiles.tile(y, x) - first, c);
          if constexpr (kGradients)
            transform_gradient<T>(input, transformed, to.of_point);
          else
            transform_input<T>(input, transformed, to.of_point);
        }
      }
    }
  };
  for_rectangles<T>(grid, first + begin, end - begin, transform);
}

template <class T, class To>
void transform_inputs(const Grid<T>& grid, const Images& images, int64_t first, int64_t begin,
                      int64_t end, const To& to) {
  if (!images.is_last()) return transform_staged<T, false>(grid, images, first, begin, end, to);
  with_stored(images.dtype, [&]<class S>() {
    transform_inputs_directly<T, S>(grid, images, first, begin, end, to);
  });
}

// As transform_inputs, of the gradients of outputs.
template <class T, class To>
void transform_gradients(const Grid<T>& grid, const Images& images, int64_t first, int64_t begin,
                         int64_t end, const To& to) {
  if (!images.is_last()) return transform_staged<T, true>(grid, images, first, begin, end, to);
  with_stored(images.dtype, [&]<class S>() {
    transform_gradients_directly<T, S>(grid, images, first, begin, end, to);
  });
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
