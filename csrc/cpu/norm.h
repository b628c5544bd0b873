// What the norms share on the CPU: moments of blocks and of columns, and the loops that apply a norm, an activation and
// their gradients to a run of contiguous elements.
#pragma once

#include "runs.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

constexpr int64_t kBlock = 4096;  // elements that one pass of the statistics covers: 16 KB of fp32
constexpr int64_t kActBlock =
    1024;  // elements whose pre-activation is buffered for a transcendental activation
constexpr int64_t kShortRun = 32;  // channels_first runs below this are read as rows of [N, C * S]
constexpr int64_t kLongRun =
    512;  // runs from here on are blocks of their own: rows side by side lose the prefetchers
constexpr int64_t kMaxChunks = 64;  // partial sums per channel
// Neighbouring channels of so many bytes in x take turns, block by block: their runs lie side by side, and a channel's own
// lie far apart, each on pages that the TLB does not hold.
constexpr int64_t kGroupBytes = 1 << 20;
// Columns that the channels_last sums hold on the stack. Whole rows up to there: parts of rows side by side lose the
// prefetchers.
constexpr int64_t kMaxColumns = 2048;
// Narrower rows are read side by side as one of up to so many columns. Not more: sums of 256 columns made the same reads from
// memory three times as slow (docs/performance.md).
constexpr int64_t kFoldedColumns = 64;
// Channels whose partial sums are merged together, chunk after chunk: one channel's lie a row of channels apart.
constexpr int64_t kMergedChannels = 64;
// Rows that a column adds up in its own precision, before double; of these, those that it adds up one after another for its
// moments.
constexpr int64_t kMaxRows = 64, kStripRows = 16;
constexpr int64_t kPad = 64;  // elements readable past the end of per-channel arrays
// Outputs of so many bytes and more are written past the caches: docs/performance.md. Less where the next read is far.
constexpr int64_t kStreamBytes = 24 << 20, kStreamStoredBytes = 8 << 20;

ADVDL_INLINE int64_t clamp(int64_t v, int64_t low, int64_t high) {
  return max_of(low, min_of(v, high));
}

// Count, mean and sum of squared deviations, merged pairwise (Chan, Golub & LeVeque 1979).
struct Moments {
  double count = 0, mean = 0, m2 = 0;
  void merge(double other_count, double other_mean, double other_m2) {
    if (other_count == 0) return;
    if (count == 0) {  // most sets have one block, and divisions are what a short one costs
      *this = {other_count, other_mean, other_m2};
      return;
    }
    const double total = count + other_count, delta = other_mean - mean;
    mean += delta * (other_count / total);
    m2 += other_m2 + delta * delta * (count * other_count / total);
    count = total;
  }
};

inline double read_scalar(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(p)[i];
    case DType::f64:
      return static_cast<const double*>(p)[i];
    case DType::f16:
      return to_float(static_cast<const Float16*>(p)[i]);
    default:
      return to_float(static_cast<const BFloat16*>(p)[i]);
  }
}

inline void write_scalar(void* p, DType dtype, int64_t i, double v) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(p)[i] = static_cast<float>(v);
      break;
    case DType::f64:
      static_cast<double*>(p)[i] = v;
      break;
    case DType::f16:
      static_cast<Float16*>(p)[i] = to_half(static_cast<float>(v));
      break;
    default: {
      BFloat16 lanes[Simd<float>::lanes];
      store(lanes, broadcast(static_cast<float>(v)));
      static_cast<BFloat16*>(p)[i] = lanes[0];
    }
  }
}

// scale = rstd * weight and shift = bias of one channel, in the arithmetic of the gradient too, so
// that backward recomputes the very pre-activation of forward.
template <class Acc>
void channel_affine(const void* weight, const void* bias, DType dtype, int64_t c, Acc rstd,
                    Acc* scale, Acc* shift) {
  *scale = weight == nullptr ? rstd : rstd * static_cast<Acc>(read_scalar(weight, dtype, c));
  *shift = bias == nullptr ? Acc(0) : static_cast<Acc>(read_scalar(bias, dtype, c));
}

// Whether an output of at least `bytes` streams, and whether this run of it is aligned for that.
template <class T>
bool streams(int64_t elements, int64_t bytes) {
  return elements * static_cast<int64_t>(sizeof(T)) >= bytes;
}
ADVDL_INLINE bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % ADVDL_VECTOR_BYTES == 0;
}

// What a run of elements is normalized by, z = (x - mean) * scale + shift: one value for the run, or one for each element
// (arrays that are readable kPad elements past the end).
template <class Acc>
struct Constants {
  Acc *mean, *scale, *shift, *slope, *offset;
  Acc* rstd = nullptr;  // a factor of `scale`, where statistics and weights do not vary alike
};

// Which of them vary along a run: mean, rstd, slope and offset; scale (then without rstd) and shift.
template <bool kStatistics, bool kAffine>
struct Vary {
  static constexpr bool statistics = kStatistics, affine = kAffine;
};
using PerRun = Vary<false, false>;
using PerElement = Vary<true, true>;
using AffinePerElement = Vary<false, true>;
using StatisticsPerElement = Vary<true, false>;

// The constants from index c on, as vectors.
template <class Acc, class V>
struct Normalizer {
  static constexpr bool kRstd = V::statistics != V::affine;
  ChannelValue<Acc, V::statistics> mean, rstd;
  ChannelValue<Acc, V::affine> scale, shift;
  ADVDL_INLINE Normalizer(const Constants<Acc>& k, int64_t c)
      : mean(k.mean + c),
        rstd(kRstd ? k.rstd + c : k.mean + c),
        scale(k.scale + c),
        shift(k.shift + c) {}
  ADVDL_INLINE auto scale_at(int64_t i) const {
    if constexpr (kRstd)
      return rstd.at(i) * scale.at(i);
    else
      return scale.at(i);
  }
  template <class Vec>
  ADVDL_INLINE Vec z(Vec centred, int64_t i) const {
    return centred * scale_at(i) + shift.at(i);
  }
};

// Those with loops of their own; silu's arithmetic then overlaps with the accesses to memory. The others are applied to blocks
// that lie in L1, by one loop for each activation in place of one for each norm and activation.
enum class ForwardAct { identity, relu, leaky_relu, silu, other };

// out = act((x - mean) * scale + shift + residual) on a run.
template <class T, ForwardAct kAct, class V, bool kResidual>
void apply_run(const T* x, const T* residual, T* out, int64_t n, const Constants<acc_t<T>>& k,
               int64_t c, Activation act, acc_t<T> param, bool streams) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  const Normalizer<Acc, V> norm(k, c);
  const Vec act_param = broadcast(param);
  streams = streams && is_aligned(out);
  const auto pre_activation = [&](int64_t i, const auto& lanes) __attribute__((always_inline)) {
    Vec z = norm.z(lanes.read(x + i) - norm.mean.at(i), i);
    if constexpr (kResidual) z = z + lanes.read(residual + i);
    return z;
  };
  if constexpr (kAct != ForwardAct::other) {
    for_vectors<Acc, 1>(n, [&](int64_t i, const auto& lanes, auto) __attribute__((always_inline)) {
      Vec z = pre_activation(i, lanes);
      if constexpr (kAct == ForwardAct::relu) z = activate(Activation::relu, z, Vec{});
      if constexpr (kAct == ForwardAct::leaky_relu)
        z = activate(Activation::leaky_relu, z, act_param);
      if constexpr (kAct == ForwardAct::silu) z = activate(Activation::silu, z, Vec{});
      lanes.write_out(out + i, z, streams);
    });
  } else {
    for (int64_t begin = 0; begin < n; begin += kActBlock) {
      const int64_t count = min_of(kActBlock, n - begin);
      constexpr int64_t lanes_per = Simd<Acc>::lanes;
      alignas(64) Acc buffer[kActBlock];
      Acc* z = buffer;
      // What is written in the type of the arithmetic is activated where it lies. The buffer has whole vectors.
      if constexpr (sizeof(T) == sizeof(Acc)) {
        if (count % lanes_per == 0) z = out + begin;
      }
      // From the front without overlap.
      int64_t i = 0;
      for (; i + lanes_per <= count; i += lanes_per)
        store(z + i, pre_activation(begin + i, FullLanes{}));
      if (i < count)
        store(z + i, pre_activation(begin + i, PartialLanes{static_cast<int32_t>(count - i)}));
      activate_block<false>(act, param, z, ceil_div(count, lanes_per) * lanes_per);
      if (z != buffer) continue;
      for (i = 0; i + lanes_per <= count; i += lanes_per) store(out + begin + i, load(z + i));
      if (i < count) store_partial(out + begin + i, load(z + i), count - i);
    }
  }
}

// kept: `dout` is dz, where dx will be written.
enum class BackwardAct { identity, relu_of_z, relu_of_output, leaky_relu, silu, other, kept };

constexpr bool is_transcendental(BackwardAct act) {
  return act == BackwardAct::silu || act == BackwardAct::other;
}

// use(position, lanes, Index, dz, x - mean) on a run.
template <class T, BackwardAct kAct, class V, int kChains, class F>
ADVDL_INLINE void for_gradients(const T* dout, const T* x, const T* saved, int64_t n,
                                const Constants<acc_t<T>>& k, int64_t c, Activation act,
                                acc_t<T> param, F&& use) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  const Normalizer<Acc, V> norm(k, c);
  const Vec act_param = broadcast(param);
  if constexpr (kAct != BackwardAct::other) {
    for_vectors<Acc, kChains, kAct != BackwardAct::kept>(
        n, [&](int64_t i, const auto& lanes, auto index) __attribute__((always_inline)) {
          const Vec centred = lanes.read(x + i) - norm.mean.at(i);
          Vec dz = lanes.read(dout + i);
          // As torch: where z is NaN the gradient passes.
          if constexpr (kAct == BackwardAct::relu_of_z || kAct == BackwardAct::leaky_relu ||
                        kAct == BackwardAct::silu) {
            Vec z = norm.z(centred, i);
            if (saved != nullptr) z = z + lanes.read(saved + i);
            if constexpr (kAct == BackwardAct::silu) {
              dz = dz * activate_grad(Activation::silu, z, Vec{});
            } else if constexpr (kAct == BackwardAct::leaky_relu) {
              dz = dz * activate_grad(Activation::leaky_relu, z, act_param);
            } else {
              dz = math::select(z <= Vec{}, Vec{}, dz);
            }
          } else if constexpr (kAct == BackwardAct::relu_of_output) {
            dz = math::select(lanes.read(saved + i) <= Vec{}, Vec{}, dz);
          }
          use(i, lanes, index, dz, centred);
        });
  } else {
    for (int64_t begin = 0; begin < n; begin += kActBlock) {
      const int64_t count = min_of(kActBlock, n - begin);
      alignas(64) Acc grad[kActBlock];
      constexpr int64_t lanes_per = Simd<Acc>::lanes;
      const auto z_at = [&](int64_t i, const auto& lanes) __attribute__((always_inline)) {
        Vec z = norm.z(lanes.read(x + i) - norm.mean.at(i), i);
        if (saved != nullptr) z = z + lanes.read(saved + i);
        return z;
      };
      int64_t i = 0;
      for (; i + lanes_per <= count; i += lanes_per) store(grad + i, z_at(begin + i, FullLanes{}));
      if (i < count)
        store(grad + i, z_at(begin + i, PartialLanes{static_cast<int32_t>(count - i)}));
      activate_block<true>(act, param, grad, ceil_div(count, lanes_per) * lanes_per);
      const auto use_at = [&](int64_t j, const auto& lanes) __attribute__((always_inline)) {
        const Vec centred = lanes.read(x + begin + j) - norm.mean.at(begin + j);
        use(begin + j, lanes, Index<0>{}, lanes.read(dout + begin + j) * load(grad + j), centred);
      };
      for (i = 0; i + lanes_per <= count; i += lanes_per) use_at(i, FullLanes{});
      if (i < count) use_at(i, PartialLanes{static_cast<int32_t>(count - i)});
    }
  }
}

// Whether dz as stored in dresidual is dz itself. Rounded to half precision it is not, but for relu and identity, where it
// is dout or 0; dx must be made of the same dz as the sums.
template <class T>
bool stored_dz_is_exact(Activation act) {
  return sizeof(T) >= 4 || act == Activation::identity || act == Activation::relu;
}

// Where the first pass keeps dz for the second one, or null: computed again. Without a residual only a transcendental
// derivative is worth a store, where dx will lie.
template <class T, BackwardAct kAct, class Params>
T* kept_dz(const Params& p) {
  if (!stored_dz_is_exact<T>(p.act)) return nullptr;
  if (p.dresidual != nullptr) return static_cast<T*>(p.dresidual);
  return is_transcendental(kAct) ? static_cast<T*>(p.dx) : nullptr;
}

// Whether dx streams. Not where dz of a few sets waits in its place: those lines are in the caches already.
template <class T>
bool streams_dx(int64_t elements, const T* kept, const T* dx) {
  return streams<T>(elements, kStreamBytes) && kept != dx;
}

// dx on a run. kTraining is no run-time choice: the compiler must contract the same products in every instantiation.
template <class T, BackwardAct kAct, class V, bool kTraining>
void gradient_run_as(const T* dout, const T* x, const T* saved, T* dx, int64_t n,
                     const Constants<acc_t<T>>& k, int64_t c, Activation act, acc_t<T> param,
                     bool streams) {
  using Acc = acc_t<T>;
  streams = streams && is_aligned(dx);
  const Normalizer<Acc, V> norm(k, c);
  const ChannelValue<Acc, V::statistics> slope(k.slope + c), offset(k.offset + c);
  for_gradients<T, kAct, V, 1>(dout, x, saved, n, k, c, act, param,
                               [&](int64_t i, const auto& lanes, auto, auto dz,
                                   auto centred) __attribute__((always_inline)) {
                                 if constexpr (kTraining) {
                                   const auto rest = slope.at(i) * centred + offset.at(i);
                                   lanes.write_out(dx + i, norm.scale_at(i) * dz + rest, streams);
                                 } else {
                                   // Not by zero slopes: under frozen statistics NaN or Inf in x stays out of dx.
                                   lanes.write_out(dx + i, norm.scale_at(i) * dz, streams);
                                 }
                               });
}

template <class T, BackwardAct kAct, class V>
void gradient_run(const T* dout, const T* x, const T* saved, T* dx, int64_t n,
                  const Constants<acc_t<T>>& k, int64_t c, Activation act, acc_t<T> param,
                  bool training, bool streams) {
  const auto run =
      training ? gradient_run_as<T, kAct, V, true> : gradient_run_as<T, kAct, V, false>;
  run(dout, x, saved, dx, n, k, c, act, param, streams);
}

// Carves aligned arrays out of the workspace; with a null base it only counts.
struct Arena {
  char* base;
  size_t used = 0;
  template <class U>
  U* take(int64_t count) {
    U* p = base == nullptr ? nullptr : reinterpret_cast<U*>(base + used);
    used += (static_cast<size_t>(count) * sizeof(U) + 63) / 64 * 64;
    return p;
  }
  template <class Acc>
  Constants<Acc> take_constants(int64_t channels) {
    Constants<Acc> k;
    k.mean = take<Acc>(channels + kPad);
    k.scale = take<Acc>(channels + kPad);
    k.shift = take<Acc>(channels + kPad);
    k.slope = take<Acc>(channels + kPad);
    k.offset = take<Acc>(channels + kPad);
    return k;
  }
};

// One part in so many of a block, the first, is looked at for a guess of its mean. A fraction f of a set has a mean within
// sqrt((1 - f) / f) deviations of the set's, whatever is in it: the sum of squares about the guess is at most 8 times that
// about the mean, and loses no more than that of its precision.
constexpr int64_t kSampled = 8;
// But so many elements (rows) at least, where a block has them: few would guess worse than a rounding or two.
constexpr int64_t kMinSampled = 64, kMinSampledRows = 8;

// Adds a block to the moments of its chunk: squares about a guess of its own mean, whose error their sum mends. About
// the mean of the blocks before they would be cheaper, and off where the first block lies far from the rest.
template <class T>
void add_block(const T* x, int64_t length, int64_t runs, int64_t stride, Moments* moments) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  const double count = static_cast<double>(length) * static_cast<double>(runs);
  Vec sum{};
  const int64_t sampled = min_of(length, max_of(kMinSampled, ceil_div(length, kSampled)));
  for (int64_t r = 0; r < runs; ++r) {
    for_vectors<Acc, 1>(sampled,
                        [&](int64_t i, const auto& lanes, auto) __attribute__((always_inline)) {
                          sum += lanes.counted(lanes.read(x + r * stride + i));
                        });
  }
  const Acc guess = static_cast<Acc>(lane_sum(sum) / static_cast<double>(sampled * runs));
  const Vec centre = broadcast(guess);
  Vec first[4] = {}, second[4] = {};
  for (int64_t r = 0; r < runs; ++r) {
    const T* run = x + r * stride;
    for_vectors<Acc, 4>(
        length, [&](int64_t i, const auto& lanes, auto index) __attribute__((always_inline)) {
          const Vec d = lanes.counted(lanes.read(run + i) - centre);
          first[index.value] += d;
          second[index.value] += d * d;
        });
  }
  const double shift = lane_sum((first[0] + first[1]) + (first[2] + first[3]));
  const double squares = lane_sum((second[0] + second[1]) + (second[2] + second[3]));
  const double correction = shift / count;
  moments->merge(count, guess + correction, squares - shift * correction);
}

struct GradientSums {
  double dz = 0, dz_centred = 0;
};

// A tensor read as rows of columns, of which each belongs to one channel (of batch norm; a group's are columns too):
// [positions, channels * inner], `inner` neighbouring columns for each. `fold` positions side by side make a row wide enough,
// also where there are 3 columns. Rows are cut into chunks, by the shape alone.
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
  // The sum of f(column) over the columns of a channel, in parts: a channel may have thousands.
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
  // f(column) for each column of a channel.
  template <class F>
  ADVDL_INLINE void for_columns(int64_t c, F&& f) const {
    for (int64_t part = 0; part < fold; ++part) {
      const int64_t first = (part * channels + c) * inner;
      for (int64_t i = first; i < first + inner; ++i) f(i);
    }
  }
};

// Gives every column the value of its channel, values[0 .. channels), in place: from the end, as a channel's columns
// lie at or behind its own index.
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

// Per column of x [rows, width], rows `stride` apart: mean and squared deviations.
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
    // Adds `group` rows from r on to a pair of sums.
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
      // Rows that lie apart are streams of their own anyway: of four at a time the sums are loaded and stored once.
      for (; r + 4 <= count; r += 4) add_rows(r, Index<4>{}, first, second);
      for (; r < count; ++r) add_rows(r, Index<1>{}, first, second);
    }
    // Neighbours are read in the order of memory, one by one; in strips, as 64 equal terms one after another would drift.
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

// partial_mean, partial_m2 [chunks, width]: the moments of the columns of x [rows, width] over the rows of `chunk`.
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
                          Moments* moments) {
  double done = 0;
  for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
    const double* means = partial_mean + chunk * cut.width;
    const double* squares = partial_m2 + chunk * cut.width;
    // All columns of a chunk count alike: no division for each.
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

// out of the rows of `chunk`; k holds a value for each column.
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

// partial_dz, partial_dz_centred [chunks, width]: the sums of dz and of dz * (x - mean) down the columns of `chunk`. dz is
// stored in stores_dz (as x, or null) on the way.
template <class T, BackwardAct kAct, class Params>
void collect_gradients(const Params& p, const RowChunks& cut, int64_t chunk, const T* dout,
                       const T* x, const T* saved, T* stores_dz, const Constants<acc_t<T>>& k,
                       bool streams_dz, double* partial_dz, double* partial_dz_centred) {
  using Acc = acc_t<T>;
  alignas(64) Acc sum[kMaxColumns + kPad], centred_sum[kMaxColumns + kPad];
  for (int64_t c = 0; c < cut.width; c += kMaxColumns) {
    const int64_t width = min_of(kMaxColumns, cut.width - c);
    double* dz_total = partial_dz + chunk * cut.width + c;
    double* dz_centred_total = partial_dz_centred + chunk * cut.width + c;
    std::memset(dz_total, 0, width * sizeof(double));
    std::memset(dz_centred_total, 0, width * sizeof(double));
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
        dz_centred_total[i] += centred_sum[i];
      }
    }
  }
}

// dx of the rows of `chunk`, made of what collect_gradients stored in `kept`, or where that is null computed again.
template <class T, BackwardAct kAct, class Params>
void gradient_chunk(const Params& p, const RowChunks& cut, int64_t chunk, const T* dout, const T* x,
                    const T* saved, const T* kept, T* dx, const Constants<acc_t<T>>& k,
                    bool training, bool streams) {
  const auto param = static_cast<acc_t<T>>(p.act_param);
  for (int64_t row = cut.first_row(chunk); row < cut.first_row(chunk + 1); ++row) {
    const int64_t at = row * cut.width;
    if (kept != nullptr) {
      gradient_run<T, BackwardAct::kept, PerElement>(kept + at, x + at, nullptr, dx + at, cut.width,
                                                     k, 0, p.act, param, training, streams);
    } else {
      gradient_run<T, kAct, PerElement>(dout + at, x + at, saved == nullptr ? nullptr : saved + at,
                                        dx + at, cut.width, k, 0, p.act, param, training, streams);
    }
  }
}

// The sums of the channels [first, first + channels).
inline void merge_gradients(const RowChunks& cut, const double* partial_dz,
                            const double* partial_dz_centred, int64_t first, int64_t channels,
                            GradientSums* sums) {
  for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
    for (int64_t c = 0; c < channels; ++c) {
      cut.for_columns(first + c, [&](int64_t i) {
        sums[c].dz += partial_dz[chunk * cut.width + i];
        sums[c].dz_centred += partial_dz_centred[chunk * cut.width + i];
      });
    }
  }
}

// --- choice of the instantiation -----------------------------------------------------------------

// Activations with loops of their own, for an element type. fp64 serves tests and the baseline of x86 old CPUs: there one
// loop for every activation keeps the build short. So it does for silu and leaky relu in half precision, where the conversions
// cost as much.
template <class T>
constexpr bool kSpecialized = sizeof(T) < 8 && ADVDL_VECTOR_BYTES > 16;
template <class T>
constexpr bool kSpecializedForFloat = kSpecialized<T> && sizeof(T) == 4;

// f<T, kAct, kResidual>() for a forward call.
template <class Params, class F>
void dispatch_forward(const Params& p, F f) {
  with_type(p.shape.dtype, [&]<class T>() {
    const auto with_residual = [&]<ForwardAct kAct>() {
      if (p.residual == nullptr) return f.template operator()<T, kAct, false>();
      f.template operator()<T, kAct, true>();
    };
    if constexpr (kSpecialized<T>) {
      if (p.act == Activation::identity)
        return with_residual.template operator()<ForwardAct::identity>();
      if (p.act == Activation::relu) return with_residual.template operator()<ForwardAct::relu>();
    }
    if constexpr (kSpecializedForFloat<T>) {
      if (p.act == Activation::leaky_relu)
        return with_residual.template operator()<ForwardAct::leaky_relu>();
      if (p.act == Activation::silu) return with_residual.template operator()<ForwardAct::silu>();
    }
    with_residual.template operator()<ForwardAct::other>();
  });
}

// f<T, kAct>() for a backward call.
template <class Params, class F>
void dispatch_backward(const Params& p, F f) {
  with_type(p.shape.dtype, [&]<class T>() {
    if (p.z_source == ZSource::output)
      return f.template operator()<T, BackwardAct::relu_of_output>();
    if constexpr (kSpecialized<T>) {
      if (p.act == Activation::identity) return f.template operator()<T, BackwardAct::identity>();
      if (p.act == Activation::relu) return f.template operator()<T, BackwardAct::relu_of_z>();
    }
    if constexpr (kSpecializedForFloat<T>) {
      if (p.act == Activation::leaky_relu)
        return f.template operator()<T, BackwardAct::leaky_relu>();
      if (p.act == Activation::silu) return f.template operator()<T, BackwardAct::silu>();
    }
    f.template operator()<T, BackwardAct::other>();
  });
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
