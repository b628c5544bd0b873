// Transposes in square tiles. Elements of 4 and 8 bytes: a vector's lanes on each side, transposed in registers.
// Elements of 2 bytes: 32 on each side, moved one by one.
#include "../common/convert_layout.h"

#include "dispatch.h"
#include "simd.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

template <class T>
struct TileOf;
template <>
struct TileOf<float> {
  using Vec = FloatVec;
  using Mask = IntVec;
};
template <>
struct TileOf<double> {
  using Vec = DoubleVec;
  using Mask = LongVec;
};

// to[j, i] = from[i, j] for one tile, i < height, j < width.
template <class T>
void transpose_part(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t height,
                    int64_t width) {
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t i = 0; i < height; ++i) to[j * to_step + i] = from[i * from_step + j];
  }
}

template <class T>
ADVDL_INLINE void transpose_tile(const T* from, int64_t from_step, T* to, int64_t to_step) {
  using Vec = typename TileOf<T>::Vec;
  constexpr int64_t lanes = Simd<T>::lanes;
  Vec rows[lanes];
  for (int64_t i = 0; i < lanes; ++i) rows[i] = load(from + i * from_step);
  transpose<typename TileOf<T>::Mask>(rows);
  for (int64_t i = 0; i < lanes; ++i) store(to + i * to_step, rows[i]);
}

// Rows [begin, end) of `to`, which are columns of `from`.
template <class T>
void transpose_columns(const T* from, T* to, int64_t rows, int64_t columns, int64_t begin,
                       int64_t end) {
  constexpr int64_t side = sizeof(T) == 2 ? 32 : ADVDL_VECTOR_BYTES / sizeof(T);
  for (int64_t j = begin; j < end; j += side) {
    const int64_t width = end - j < side ? end - j : side;
    for (int64_t i = 0; i < rows; i += side) {
      const int64_t height = rows - i < side ? rows - i : side;
      const T* source = from + i * columns + j;
      T* target = to + j * rows + i;
      if constexpr (sizeof(T) > 2) {
        if (width == side && height == side) {
          transpose_tile(source, columns, target, rows);
          continue;
        }
      }
      transpose_part(source, columns, target, rows, height, width);
    }
  }
}

template <class T>
void convert(const ConvertLayout& p) {
  // Output rows of a task: few enough that the input lines that they share stay in cache.
  constexpr int64_t kBlock = 64;
  const int64_t blocks = (p.columns + kBlock - 1) / kBlock;
  cpu::parallel_ranges(p.n * blocks, p.rows * kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks * p.rows * p.columns, first = task % blocks * kBlock;
      const int64_t last = first + kBlock < p.columns ? first + kBlock : p.columns;
      transpose_columns(static_cast<const T*>(p.from) + image, static_cast<T*>(p.to) + image,
                        p.rows, p.columns, first, last);
    }
  });
}

void run(const ConvertLayout& p) {
  if (p.element_bytes == 2) return convert<uint16_t>(p);
  if (p.element_bytes == 4) return convert<float>(p);
  convert<double>(p);
}

}  // namespace

void add_convert_layout(cpu::KernelTable& table) { table.convert_layout = run; }

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
