// What batch norm and group norm share on the CPU if channels are innermost: a tensor is read as rows, and each column
// belongs to one channel (or group). Moments and gradient sums are taken for each column, one chunk of rows after
// another.
#pragma once

#include "norm_runs.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

// Columns whose sums are on the stack. Rows of up to this width are read whole: to read parts of several rows defeats
// the prefetchers.
constexpr int64_t kMaxColumns = 2048;
// Several narrower rows are read as one of up to this many columns. With 256 columns the same reads from memory took
// three times as long (docs/performance.md).
constexpr int64_t kFoldedColumns = 64;
// Rows that are added to one partial sum of a column's moments. kMaxRows rows consist of such strips.
constexpr int64_t kStripRows = 16;
// The guess of a mean uses at least this many rows (see kSampled).
constexpr int64_t kMinSampledRows = 8;

// How a tensor [positions, channels * inner] is read as rows: each channel (for group norm: each group) has `inner`
// adjacent columns. A row consists of `fold` consecutive positions, so that it is wide enough even for 3 columns. Rows
// are cut into chunks, which depend on the shape only.
struct RowChunks {
  int64_t channels, inner, fold = 1, width, rows, chunks;
  RowChunks(int64_t positions, int64_t channels, int64_t inner) : channels(channels), inner(inner) {
    while (fold * 2 * channels * inner <= kFoldedColumns && positions % (fold * 2) == 0) fold *= 2;
    width = fold * channels * inner;
    rows = positions / fold;
    chunks = clamp(rows * width / (4 * kBlock), 1, min_of(kMaxChunks, max_of(1, rows / 32)));
  }
  int64_t first_row(int64_t chunk) const { return chunk * rows / chunks; }
  int64_t columns_per_channel() const { return fold * inner; }
  int64_t elements_per_chunk() const { return rows * width / chunks; }
  // The sum of f(column) over the columns of a channel, in parts, as a channel may have thousands.
  template <class F>
  ADVDL_INLINE double sum_columns(int64_t c, F&& f) const {
    constexpr int64_t kPart = 64;
    double total = 0;
    for (int64_t part = 0; part < fold; ++part) {
      const int64_t first = (part * channels + c) * inner;
      for (int64_t begin = first; begin < first + inner; begin += kPart) {
        double sum = 0;
        for (int64_t i = begin; i < min_of(begin + kPart, first + inner); ++i) sum += f(i);
        total += sum;
      }
    }
    return total;
  }
  // Calls f(column) for each column of a channel.
  template <class F>
  ADVDL_INLINE void for_columns(int64_t c, F&& f) const {
    for (int64_t part = 0; part < fold; ++part) {
      const int64_t first = (part * channels + c) * inner;
      for (int64_t i = first; i < first + inner; ++i) f(i);
    }
  }
};

// Replaces values[0 .. channels) by the value of each column's channel, in place. It starts at the end, because the
// columns of a channel are at or after its own index.
template <class Acc>
void repeat(const RowChunks& cut, Acc* values) {
  if (cut.columns_per_channel() == 1) return;
  Acc* end = values + cut.width;
  for (int64_t part = cut.fold - 1; part >= 0; --part) {
    for (int64_t c = cut.channels - 1; c >= 0; --c) {
      const Acc value = values[c];
      for (int64_t i = 0; i < cut.inner; ++i) *--end = value;
    }
  }
}

// The mean and the sum of squared deviations of each column of x [rows, width], with rows `stride` apart.
template <class T>
void column_moments(const T* x, int64_t stride, int64_t rows, int64_t width, double* mean,
                    double* m2) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  alignas(64) Acc centre[kMaxColumns + kPad], first[kMaxColumns + kPad], second[kMaxColumns + kPad];
  alignas(64) Acc strip_first[kMaxColumns + kPad], strip_second[kMaxColumns + kPad];
  const size_t bytes = width * sizeof(Acc);
  double done = 0;
  for (int64_t begin = 0; begin < rows; begin += kMaxRows) {
    const int64_t count = min_of(kMaxRows, rows - begin);
    const T* block = x + begin * stride;
    std::memset(centre, 0, bytes);
    std::memset(first, 0, bytes);
    std::memset(second, 0, bytes);
    const int64_t sampled = min_of(count, max_of(kMinSampledRows, ceil_div(count, kSampled)));
    for (int64_t r = 0; r < sampled; ++r) {
      for_vectors<Acc, 1>(width,
                          [&](int64_t i, const auto& lanes, auto) __attribute__((always_inline)) {
                            const Vec v = lanes.counted(lanes.read(block + r * stride + i));
                            store(centre + i, load(centre + i) + v);
                          });
    }
    for (int64_t i = 0; i < width; ++i) centre[i] /= static_cast<Acc>(sampled);
    // Adds `group` rows, from row r on, to a pair of sums.
    const auto add_rows = [&](int64_t r, auto group, Acc* sum_to,
                              Acc* squares_to) __attribute__((always_inline)) {
      for_vectors<Acc, 1>(width,
                          [&](int64_t i, const auto& lanes, auto) __attribute__((always_inline)) {
                            const Vec middle = load(centre + i);
                            Vec sum{}, squares{};
                            for (int g = 0; g < group.value; ++g) {
                              const Vec d = lanes.read(block + (r + g) * stride + i) - middle;
                              sum += d;
                              squares += d * d;
                            }
                            store(sum_to + i, load(sum_to + i) + lanes.counted(sum));
                            store(squares_to + i, load(squares_to + i) + lanes.counted(squares));
                          });
    };
    int64_t r = 0;
    if (stride > width) {
      // Rows with a gap between them are separate streams for the prefetchers anyway. Four at a time load and store the
      // sums once.
      for (; r + 4 <= count; r += 4) add_rows(r, Index<4>{}, first, second);
      for (; r < count; ++r) add_rows(r, Index<1>{}, first, second);
    }
    // Contiguous rows are read in memory order. They are added in strips, as the rounding errors of 64 equal terms add
    // up.
    while (r < count) {
      std::memset(strip_first, 0, bytes);
      std::memset(strip_second, 0, bytes);
      const int64_t end = min_of(r + kStripRows, count);
      for (; r < end; ++r) add_rows(r, Index<1>{}, strip_first, strip_second);
      for (int64_t i = 0; i < width; ++i) {
        first[i] += strip_first[i];
        second[i] += strip_second[i];
      }
    }
    const double block_count = static_cast<double>(count), total = done + block_count;
    const double share = block_count / total, weight = done * block_count / total;
    for (int64_t i = 0; i < width; ++i) {
      const double correction = first[i] / block_count;
      const double block_mean = centre[i] + correction;
      const double block_m2 = second[i] - correction * first[i];
      const double delta = done == 0 ? 0 : block_mean - mean[i];
      mean[i] = done == 0 ? block_mean : mean[i] + delta * share;
      m2[i] = done == 0 ? block_m2 : m2[i] + block_m2 + delta * delta * weight;
    }
    done = total;
  }
}

// --- the columns of one chunk of rows, and their merge over the chunks -----------------------------

// Writes partial_mean and partial_m2 [chunks, width]: the moments of the columns of x [rows, width] over the rows of
// `chunk`.
template <class T>
void collect_moments(const T* x, const RowChunks& cut, int64_t chunk, double* partial_mean,
                     double* partial_m2) {
  const int64_t row = cut.first_row(chunk), rows = cut.first_row(chunk + 1) - row;
  for (int64_t c = 0; c < cut.width; c += kMaxColumns) {
    const int64_t at = chunk * cut.width + c;
    column_moments(x + row * cut.width + c, cut.width, rows, min_of(kMaxColumns, cut.width - c),
                   partial_mean + at, partial_m2 + at);
  }
}

// The moments of the channels [first, first + channels), at most kMergedChannels.
inline void merge_moments(const RowChunks& cut, const double* partial_mean,
                          const double* partial_m2, int64_t first, int64_t channels,
                          Moments<double>* moments) {
  double done = 0;
  for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
    const double* means = partial_mean + chunk * cut.width;
    const double* squares = partial_m2 + chunk * cut.width;
    // All columns of a chunk have the same count, so one division serves all.
    const double rows = static_cast<double>(cut.first_row(chunk + 1) - cut.first_row(chunk));
    const double columns = static_cast<double>(cut.columns_per_channel());
    const double total = done + rows * columns, share = rows * columns / total;
    for (int64_t c = 0; c < channels; ++c) {
      const double chunk_mean =
          cut.sum_columns(first + c, [&](int64_t i) { return means[i]; }) / columns;
      const double chunk_m2 = cut.sum_columns(first + c, [&](int64_t i) {
        return squares[i] + rows * (means[i] - chunk_mean) * (means[i] - chunk_mean);
      });
      const double delta = chunk_mean - moments[c].mean;
      moments[c].mean += delta * share;
      moments[c].m2 += chunk_m2 + delta * delta * done * share;
      moments[c].count = total;
    }
    done = total;
  }
}

// Writes out for the rows of `chunk`. k has a value for each column.
template <class T, ForwardAct kAct, bool kResidual, class Params>
void apply_chunk(const Params& p, const RowChunks& cut, int64_t chunk, const T* x,
                 const T* residual, T* out, const Constants<acc_t<T>>& k, bool streams) {
  for (int64_t row = cut.first_row(chunk); row < cut.first_row(chunk + 1); ++row) {
    const int64_t at = row * cut.width;
    apply_run<T, kAct, PerElement, kResidual>(x + at, residual + (kResidual ? at : 0), out + at,
                                              cut.width, k, 0, p.act,
                                              static_cast<acc_t<T>>(p.act_param), streams);
  }
}

// Writes partial_dz and partial_dz_x [chunks, width]: the sums of dz and of dz * (x - mean) over the rows of `chunk`.
// Also writes dz to stores_dz (as x), if that is not null.
template <class T, BackwardAct kAct, class Params>
void collect_gradients(const Params& p, const RowChunks& cut, int64_t chunk, const T* dout,
                       const T* x, const T* saved, T* stores_dz, const Constants<acc_t<T>>& k,
                       bool streams_dz, double* partial_dz, double* partial_dz_x) {
  using Acc = acc_t<T>;
  alignas(64) Acc sum[kMaxColumns + kPad], centred_sum[kMaxColumns + kPad];
  for (int64_t c = 0; c < cut.width; c += kMaxColumns) {
    const int64_t width = min_of(kMaxColumns, cut.width - c);
    double* dz_total = partial_dz + chunk * cut.width + c;
    double* dz_x_total = partial_dz_x + chunk * cut.width + c;
    std::memset(dz_total, 0, width * sizeof(double));
    std::memset(dz_x_total, 0, width * sizeof(double));
    const int64_t last = cut.first_row(chunk + 1);
    for (int64_t first = cut.first_row(chunk); first < last; first += kMaxRows) {
      std::memset(sum, 0, width * sizeof(Acc));
      std::memset(centred_sum, 0, width * sizeof(Acc));
      for (int64_t row = first; row < min_of(last, first + kMaxRows); ++row) {
        const int64_t offset = row * cut.width + c;
        const bool streams_row = streams_dz && is_aligned(stores_dz + offset);
        for_gradients<T, kAct, PerElement, 1>(
            dout + offset, x + offset, saved == nullptr ? nullptr : saved + offset, width, k, c,
            p.act, static_cast<Acc>(p.act_param),
            [&](int64_t i, const auto& lanes, auto, auto dz, auto centred)
                __attribute__((always_inline)) {
                  if (stores_dz != nullptr)
                    lanes.write_out(stores_dz + offset + i, dz, streams_row);
                  store(sum + i, load(sum + i) + lanes.counted(dz));
                  store(centred_sum + i, load(centred_sum + i) + lanes.counted(dz * centred));
                });
      }
      for (int64_t i = 0; i < width; ++i) {
        dz_total[i] += sum[i];
        dz_x_total[i] += centred_sum[i];
      }
    }
  }
}

// Writes dx for the rows of `chunk`. dz is what collect_gradients stored in `kept`, or is computed again if that is
// null.
template <class T, BackwardAct kAct, bool kTraining = true, class Params>
void gradient_chunk(const Params& p, const RowChunks& cut, int64_t chunk, const T* dout, const T* x,
                    const T* saved, const T* kept, T* dx, const Constants<acc_t<T>>& k,
                    bool streams) {
  const auto param = static_cast<acc_t<T>>(p.act_param);
  for (int64_t row = cut.first_row(chunk); row < cut.first_row(chunk + 1); ++row) {
    const int64_t at = row * cut.width;
    if (kept != nullptr) {
      gradient_run<T, BackwardAct::kept, PerElement, kTraining>(
          kept + at, x + at, nullptr, dx + at, cut.width, k, 0, p.act, param, streams);
    } else {
      gradient_run<T, kAct, PerElement, kTraining>(dout + at, x + at,
                                                   saved == nullptr ? nullptr : saved + at, dx + at,
                                                   cut.width, k, 0, p.act, param, streams);
    }
  }
}

// Adds up the sums of the channels [first, first + channels).
inline void merge_gradients(const RowChunks& cut, const double* partial_dz,
                            const double* partial_dz_x, int64_t first, int64_t channels,
                            GradientSums<double>* sums) {
  for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
    for (int64_t c = 0; c < channels; ++c) {
      cut.for_columns(first + c, [&](int64_t i) {
        sums[c].dz += partial_dz[chunk * cut.width + i];
        sums[c].dz_x += partial_dz_x[chunk * cut.width + i];
      });
    }
  }
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
