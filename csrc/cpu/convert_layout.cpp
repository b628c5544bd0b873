// Transposes in square tiles: a vector's lanes on each side, transposed in registers.
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
template <>
struct TileOf<uint16_t> {
  typedef int16_t Mask __attribute__((vector_size(ADVDL_VECTOR_BYTES / 2)));
  using Vec = HalfBits;
};
// A vector of 16 bytes of 2-byte lanes takes longer to transpose than its elements take to move without SSSE3's shuffles.
template <class T>
inline constexpr bool kInRegisters = sizeof(T) > 2 || ADVDL_VECTOR_BYTES > 16;

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
  constexpr int64_t lanes = sizeof(Vec) / sizeof(T);
  Vec rows[lanes];
  // By way of a variable: the address of an element would keep all of them in memory.
  for (int64_t i = 0; i < lanes; ++i) {
    Vec row;
    std::memcpy(&row, from + i * from_step, sizeof(row));
    rows[i] = row;
  }
  transpose<typename TileOf<T>::Mask>(rows);
  for (int64_t i = 0; i < lanes; ++i) {
    const Vec row = rows[i];
    std::memcpy(to + i * to_step, &row, sizeof(row));
  }
}

// Rows [begin, end) of `to`, which are columns of `from`.
template <class T>
void transpose_columns(const T* from, T* to, int64_t rows, int64_t columns, int64_t begin,
                       int64_t end, bool along_columns) {
  constexpr int64_t side = kInRegisters<T> ? sizeof(typename TileOf<T>::Vec) / sizeof(T) : 32;
  const auto transpose_at = [&](int64_t i, int64_t j) {
    const int64_t height = rows - i < side ? rows - i : side;
    const int64_t width = end - j < side ? end - j : side;
    const T* source = from + i * columns + j;
    T* target = to + j * rows + i;
    if (kInRegisters<T> && width == side && height == side)
      transpose_tile(source, columns, target, rows);
    else
      transpose_part(source, columns, target, rows, height, width);
  };
  if (along_columns) {
    for (int64_t i = 0; i < rows; i += side) {
      for (int64_t j = begin; j < end; j += side) transpose_at(i, j);
    }
  } else {
    for (int64_t j = begin; j < end; j += side) {
      for (int64_t i = 0; i < rows; i += side) transpose_at(i, j);
    }
  }
}

template <class T>
void convert(const ConvertLayout& p) {
  // Output rows of a task: few enough that the input lines that they share stay in cache, and that there is a task for
  // each thread.
  constexpr int64_t kBlock = 256, kLeast = 64;
  const int64_t block = p.n * ceil_div(p.columns, kBlock) >= cpu::thread_count() ? kBlock : kLeast;
  // Along many pixels, so that each of the few channels at hand is a long run; along channels otherwise.
  const int64_t channels = p.to_last ? p.rows : p.columns;
  const bool has_many_pixels = (p.to_last ? p.columns : p.rows) >= 8 * channels;
  const int64_t blocks = ceil_div(p.columns, block);
  cpu::parallel_ranges(p.n * blocks, p.rows * block, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks * p.rows * p.columns, first = task % blocks * block;
      const int64_t last = min_of(first + block, p.columns);
      transpose_columns(static_cast<const T*>(p.from) + image, static_cast<T*>(p.to) + image,
                        p.rows, p.columns, first, last, has_many_pixels == p.to_last);
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
