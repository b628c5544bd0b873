// Batch norm, residual addition and activation on the CPU; what is computed stands in ../common/batch_norm_act.h.
//
// channels_first: a channel is N runs of S elements. They are cut into blocks of up to kBlock elements, which stay in
// L1 for two passes (mean, squares about it), and blocks are grouped into chunks. With channels enough for all threads, one
// thread does a few neighbouring channels from statistics to output while they lie in L2: x is read from memory once.
// channels_last, and short runs: rows cut into chunks; statistics of all chunks, then the apply over the same chunks in
// reverse, so that what was read last, and is still in cache, is used first.
//
// Chunks depend on the shape only, and partial sums are merged in chunk order in double: the result does
// not depend on the number of threads.
#include "../common/batch_norm_act.h"

#include "dispatch.h"
#include "parallel.h"
#include "runs.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

using cpu::parallel_ranges;

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
constexpr int64_t kMaxColumns = 512;  // columns that the channels_last sums hold on the stack
// Channels whose partial sums are merged together, chunk after chunk: one channel's lie a row of channels apart.
constexpr int64_t kMergedChannels = 64;
constexpr int64_t kMaxRows = 64;  // rows that a column adds up in its own precision, before double
constexpr int64_t kPad = 64;      // elements readable past the end of per-channel arrays
// Outputs of so many bytes and more are written past the caches: docs/performance.md. Less where the next read is far.
constexpr int64_t kStreamBytes = 24 << 20, kStreamStoredBytes = 8 << 20;

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t clamp(int64_t v, int64_t low, int64_t high) { return max_of(low, min_of(v, high)); }

// --- parts that both layouts share ---------------------------------------------------------------

// Count, mean and sum of squared deviations, merged pairwise (Chan, Golub & LeVeque 1979).
struct Moments {
  double count = 0, mean = 0, m2 = 0;
  void merge(double other_count, double other_mean, double other_m2) {
    if (other_count == 0) return;
    const double total = count + other_count, delta = other_mean - mean;
    mean += delta * (other_count / total);
    m2 += other_m2 + delta * delta * (count * other_count / total);
    count = total;
  }
};

double read_scalar(const void* p, DType dtype, int64_t i) {
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

void write_scalar(void* p, DType dtype, int64_t i, double v) {
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
bool streams(const BatchNormActShape& shape, int64_t bytes) {
  return shape.n * shape.c * shape.s * static_cast<int64_t>(sizeof(T)) >= bytes;
}
ADVDL_INLINE bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % ADVDL_VECTOR_BYTES == 0;
}

// From the moments of channel c: everything that forward stores or applies.
template <class Acc>
void finish_statistics(const BatchNormActForward& p, int64_t c, const Moments& m, Acc* scale,
                       Acc* shift) {
  const double m2 = m.m2 < 0 ? 0 : m.m2;  // rounding may leave a trace below zero; NaN stays
  const double var = m2 / m.count;
  const Acc rstd = static_cast<Acc>(1.0 / __builtin_sqrt(var + p.eps));
  static_cast<Acc*>(p.mean)[c] = static_cast<Acc>(m.mean);
  static_cast<Acc*>(p.rstd)[c] = rstd;
  if (p.running_mean_out != nullptr) {
    const DType dtype = p.shape.running_dtype;
    const double old_mean = read_scalar(p.running_mean, dtype, c);
    const double old_var = read_scalar(p.running_var, dtype, c);
    const double unbiased = m2 / (m.count - 1);
    write_scalar(p.running_mean_out, dtype, c, (1 - p.momentum) * old_mean + p.momentum * m.mean);
    write_scalar(p.running_var_out, dtype, c, (1 - p.momentum) * old_var + p.momentum * unbiased);
  }
  channel_affine(p.weight, p.bias, p.shape.weight_dtype, c, rstd, scale, shift);
}

// The running statistics as mean and rstd, for evaluation.
template <class Acc>
void use_running_statistics(const BatchNormActForward& p, int64_t c, Acc* scale, Acc* shift) {
  const double var = read_scalar(p.running_var, p.shape.running_dtype, c);
  const Acc rstd = static_cast<Acc>(1.0 / __builtin_sqrt(var + p.eps));
  static_cast<Acc*>(p.mean)[c] =
      static_cast<Acc>(read_scalar(p.running_mean, p.shape.running_dtype, c));
  static_cast<Acc*>(p.rstd)[c] = rstd;
  channel_affine(p.weight, p.bias, p.shape.weight_dtype, c, rstd, scale, shift);
}

// dx = scale * dz + slope * (x - mean) + offset.
template <class Acc>
void finish_gradients(const BatchNormActBackward& p, int64_t c, double sum_dz,
                      double sum_dz_centred, Acc* slope, Acc* offset) {
  const Acc rstd = static_cast<const Acc*>(p.rstd)[c];
  static_cast<Acc*>(p.dbias)[c] = static_cast<Acc>(sum_dz);
  static_cast<Acc*>(p.dweight)[c] = static_cast<Acc>(sum_dz_centred * rstd);
  *slope = *offset = Acc(0);
  if (!p.training) return;
  const double count = static_cast<double>(p.shape.n) * static_cast<double>(p.shape.s);
  const double weight = p.weight == nullptr ? 1.0 : read_scalar(p.weight, p.shape.weight_dtype, c);
  const double scale = weight * rstd;
  *slope = static_cast<Acc>(-scale * rstd * rstd * sum_dz_centred / count);
  *offset = static_cast<Acc>(-scale * sum_dz / count);
}

// The constants of the channels, [channels + kPad] each; channels_last repeats them over a wide row.
template <class Acc>
struct Constants {
  Acc *mean, *scale, *shift, *slope, *offset;
};

enum class ForwardAct { identity, relu, other };

// out = act((x - mean) * scale + shift + residual) on a run.
template <class T, ForwardAct kAct, bool kVary, bool kResidual>
void apply_run(const T* x, const T* residual, T* out, int64_t n, const Constants<acc_t<T>>& k,
               int64_t c, Activation act, acc_t<T> param, bool streams) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  const ChannelValue<Acc, kVary> mean(k.mean + c), scale(k.scale + c), shift(k.shift + c);
  streams = streams && is_aligned(out);
  const auto pre_activation = [&](int64_t i, const auto& lanes) __attribute__((always_inline)) {
    Vec z = (lanes.read(x + i) - mean.at(i)) * scale.at(i) + shift.at(i);
    if constexpr (kResidual) z = z + lanes.read(residual + i);
    return z;
  };
  if constexpr (kAct != ForwardAct::other) {
    for_vectors<Acc, 1>(n, [&](int64_t i, const auto& lanes, auto) __attribute__((always_inline)) {
      Vec z = pre_activation(i, lanes);
      if constexpr (kAct == ForwardAct::relu) z = activate(Activation::relu, z, Vec{});
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

enum class BackwardAct { identity, relu_of_z, relu_of_output, other };

// use(position, lanes, Index, dz, x - mean) on a run.
template <class T, BackwardAct kAct, bool kVary, int kChains, class F>
ADVDL_INLINE void for_gradients(const T* dout, const T* x, const T* saved, int64_t n,
                                const Constants<acc_t<T>>& k, int64_t c, Activation act,
                                acc_t<T> param, F&& use) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  const ChannelValue<Acc, kVary> mean(k.mean + c), scale(k.scale + c), shift(k.shift + c);
  if constexpr (kAct != BackwardAct::other) {
    for_vectors<Acc, kChains>(
        n, [&](int64_t i, const auto& lanes, auto index) __attribute__((always_inline)) {
          const Vec centred = lanes.read(x + i) - mean.at(i);
          Vec dz = lanes.read(dout + i);
          // As torch: where z is NaN the gradient passes.
          if constexpr (kAct == BackwardAct::relu_of_z) {
            Vec z = centred * scale.at(i) + shift.at(i);
            if (saved != nullptr) z = z + lanes.read(saved + i);
            dz = math::select(z <= Vec{}, Vec{}, dz);
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
        Vec z = (lanes.read(x + i) - mean.at(i)) * scale.at(i) + shift.at(i);
        if (saved != nullptr) z = z + lanes.read(saved + i);
        return z;
      };
      int64_t i = 0;
      for (; i + lanes_per <= count; i += lanes_per) store(grad + i, z_at(begin + i, FullLanes{}));
      if (i < count)
        store(grad + i, z_at(begin + i, PartialLanes{static_cast<int32_t>(count - i)}));
      activate_block<true>(act, param, grad, ceil_div(count, lanes_per) * lanes_per);
      const auto use_at = [&](int64_t j, const auto& lanes) __attribute__((always_inline)) {
        const Vec centred = lanes.read(x + begin + j) - mean.at(begin + j);
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
// derivative is worth a store, where dx will lie; in place only without vectors that overlap.
template <class T, BackwardAct kAct>
T* kept_dz(const BatchNormActBackward& p, int64_t run) {
  if (!stored_dz_is_exact<T>(p.act)) return nullptr;
  if (p.dresidual != nullptr) return static_cast<T*>(p.dresidual);
  const bool parks = kAct == BackwardAct::other && run % Simd<acc_t<T>>::lanes == 0;
  return parks ? static_cast<T*>(p.dx) : nullptr;
}

// dx on a run. kTraining is no run-time choice: the compiler must contract the same products in every instantiation.
template <class T, BackwardAct kAct, bool kVary, bool kTraining>
void gradient_run_as(const T* dout, const T* x, const T* saved, T* dx, int64_t n,
                     const Constants<acc_t<T>>& k, int64_t c, Activation act, acc_t<T> param,
                     bool streams) {
  using Acc = acc_t<T>;
  streams = streams && is_aligned(dx);
  const ChannelValue<Acc, kVary> scale(k.scale + c), slope(k.slope + c), offset(k.offset + c);
  for_gradients<T, kAct, kVary, 1>(dout, x, saved, n, k, c, act, param,
                                   [&](int64_t i, const auto& lanes, auto, auto dz,
                                       auto centred) __attribute__((always_inline)) {
                                     if constexpr (kTraining) {
                                       const auto rest = slope.at(i) * centred + offset.at(i);
                                       lanes.write_out(dx + i, scale.at(i) * dz + rest, streams);
                                     } else {
                                       // Not by zero slopes: under frozen statistics NaN or Inf in x stays out of dx.
                                       lanes.write_out(dx + i, scale.at(i) * dz, streams);
                                     }
                                   });
}

template <class T, BackwardAct kAct, bool kVary>
void gradient_run(const T* dout, const T* x, const T* saved, T* dx, int64_t n,
                  const Constants<acc_t<T>>& k, int64_t c, Activation act, acc_t<T> param,
                  bool training, bool streams) {
  const auto run =
      training ? gradient_run_as<T, kAct, kVary, true> : gradient_run_as<T, kAct, kVary, false>;
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

// --- channels_first ------------------------------------------------------------------------------

// How a channel's N runs of S elements are cut; by the shape alone.
struct ChannelBlocks {
  int64_t n, c, s, rows_per_block, blocks, chunks, group;
  ChannelBlocks(const BatchNormActShape& shape, int64_t element_bytes)
      : n(shape.n), c(shape.c), s(shape.s) {
    rows_per_block = s < kLongRun ? max_of(1, kBlock / max_of(1, s)) : 1;
    blocks = s <= kBlock ? ceil_div(n, rows_per_block) : n * ceil_div(s, kBlock);
    chunks = clamp(blocks / 4, 1, kMaxChunks);
    group = max_of(1, kGroupBytes / max_of(1, n * s * element_bytes));
  }
  // f(channel, offset of the first element, run length, runs; runs lie c * s apart) for each block of a chunk of the
  // channels [first, last): neighbours in memory take turns.
  template <class F>
  ADVDL_INLINE void for_blocks(int64_t first, int64_t last, int64_t chunk, F&& f) const {
    const int64_t end = (chunk + 1) * blocks / chunks;
    for (int64_t b = chunk * blocks / chunks; b < end; ++b) {
      for (int64_t channel = first; channel < last; ++channel) {
        if (s <= kBlock) {
          const int64_t row = b * rows_per_block;
          f(channel, (row * c + channel) * s, s, min_of(rows_per_block, n - row));
        } else {
          const int64_t per_row = ceil_div(s, kBlock), begin = b % per_row * kBlock;
          f(channel, (b / per_row * c + channel) * s + begin, min_of(kBlock, s - begin), 1);
        }
      }
    }
  }
  // Whether channels alone keep all threads busy.
  bool channel_per_thread() const { return chunks == 1 || c >= 4 * cpu::thread_count(); }
};

// Adds a block to the moments of its chunk: squares about a first guess of its own mean, whose error their sum mends. About
// the mean of the blocks before they would be cheaper, and off where the first block lies far from the rest.
template <class T>
void add_block(const T* x, int64_t length, int64_t runs, int64_t stride, Moments* moments) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  const double count = static_cast<double>(length) * static_cast<double>(runs);
  Vec sum[4] = {};
  for (int64_t r = 0; r < runs; ++r) {
    const T* run = x + r * stride;
    for_vectors<Acc, 4>(
        length, [&](int64_t i, const auto& lanes, auto index) __attribute__((always_inline)) {
          sum[index.value] += lanes.counted(lanes.read(run + i));
        });
  }
  const Acc guess = static_cast<Acc>(lane_sum((sum[0] + sum[1]) + (sum[2] + sum[3])) / count);
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
  moments->merge(count, guess + shift / count, squares - shift * shift / count);
}

template <class T, ForwardAct kAct, bool kResidual>
void forward_channels_first(const BatchNormActForward& p, Arena arena) {
  using Acc = acc_t<T>;
  const ChannelBlocks cut(p.shape, sizeof(T));
  Constants<Acc> k = arena.take_constants<Acc>(cut.c);
  Moments* partial = arena.take<Moments>(cut.c * cut.chunks);
  k.mean = static_cast<Acc*>(p.mean);
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const bool stream_out = streams<T>(p.shape, kStreamBytes);
  const int64_t stride = cut.c * cut.s;

  const auto collect = [&](int64_t first, int64_t last, int64_t chunk) {
    for (int64_t c = first; c < last; ++c) partial[c * cut.chunks + chunk] = Moments{};
    cut.for_blocks(first, last, chunk,
                   [&](int64_t c, int64_t offset, int64_t length, int64_t runs) {
                     add_block(x + offset, length, runs, stride, &partial[c * cut.chunks + chunk]);
                   });
  };
  const auto finish = [&](int64_t c) {
    if (!p.training) return use_running_statistics<Acc>(p, c, k.scale + c, k.shift + c);
    Moments m;
    for (int64_t i = 0; i < cut.chunks; ++i) {
      const Moments& part = partial[c * cut.chunks + i];
      m.merge(part.count, part.mean, part.m2);
    }
    finish_statistics<Acc>(p, c, m, k.scale + c, k.shift + c);
  };
  const auto apply = [&](int64_t first, int64_t last, int64_t chunk) {
    cut.for_blocks(
        first, last, chunk, [&](int64_t c, int64_t offset, int64_t length, int64_t runs) {
          for (int64_t r = 0; r < runs; ++r, offset += stride) {
            apply_run<T, kAct, false, kResidual>(x + offset, residual + (kResidual ? offset : 0),
                                                 out + offset, length, k, c, p.act,
                                                 static_cast<Acc>(p.act_param), stream_out);
          }
        });
  };

  if (cut.channel_per_thread()) {
    parallel_ranges(cut.c, cut.n * cut.s, [&](int64_t begin, int64_t end) {
      // Evaluation reads once: in the order of memory.
      const int64_t group = p.training ? cut.group : cut.c;
      for (int64_t first = begin; first < end; first += group) {
        const int64_t last = min_of(first + group, end);
        if (p.training) {
          for (int64_t i = 0; i < cut.chunks; ++i) collect(first, last, i);
        }
        for (int64_t c = first; c < last; ++c) finish(c);
        for (int64_t i = cut.chunks - 1; i >= 0; --i) apply(first, last, i);
      }
      if (stream_out) stream_fence();
    });
    return;
  }
  const int64_t tasks = cut.c * cut.chunks;
  if (p.training) {
    parallel_ranges(tasks, cut.n * cut.s / cut.chunks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        collect(i / cut.chunks, i / cut.chunks + 1, i % cut.chunks);
    });
  }
  for (int64_t c = 0; c < cut.c; ++c) finish(c);
  parallel_ranges(tasks, cut.n * cut.s / cut.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i)
      apply(i / cut.chunks, i / cut.chunks + 1, i % cut.chunks);
    if (stream_out) stream_fence();
  });
}

struct GradientSums {
  double dz = 0, dz_centred = 0;
};

template <class T, BackwardAct kAct>
void backward_channels_first(const BatchNormActBackward& p, Arena arena) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  const ChannelBlocks cut(p.shape, sizeof(T));
  Constants<Acc> k = arena.take_constants<Acc>(cut.c);
  GradientSums* partial = arena.take<GradientSums>(cut.c * cut.chunks);
  k.mean = const_cast<Acc*>(static_cast<const Acc*>(p.mean));
  const T* dout = static_cast<const T*>(p.dout);
  const T* x = static_cast<const T*>(p.x);
  const T* saved = static_cast<const T*>(p.saved);
  T* dresidual = static_cast<T*>(p.dresidual);
  T* dx = static_cast<T*>(p.dx);
  const bool stream_out = streams<T>(p.shape, kStreamBytes);
  const bool stream_residual =
      kAct != BackwardAct::other && streams<T>(p.shape, kStreamStoredBytes);
  T* kept = kept_dz<T, kAct>(p, cut.s);
  T* stores_dz = kept != nullptr ? kept : dresidual;
  // What was streamed is far: dz is then computed again from dout, which is near.
  if (stream_residual) kept = nullptr;
  const Acc param = static_cast<Acc>(p.act_param);
  const int64_t stride = cut.c * cut.s;

  const auto collect = [&](int64_t first, int64_t last, int64_t chunk) {
    for (int64_t c = first; c < last; ++c) partial[c * cut.chunks + chunk] = GradientSums{};
    cut.for_blocks(first, last, chunk,
                   [&](int64_t c, int64_t offset, int64_t length, int64_t runs) {
                     Vec dz_sum[4] = {}, dz_centred_sum[4] = {};
                     for (int64_t r = 0; r < runs; ++r, offset += stride) {
                       const bool streams_dz = stream_residual && is_aligned(stores_dz + offset);
                       for_gradients<T, kAct, false, 4>(
                           dout + offset, x + offset, saved == nullptr ? nullptr : saved + offset,
                           length, k, c, p.act, param,
                           [&](int64_t i, const auto& lanes, auto index, auto dz, auto centred)
                               __attribute__((always_inline)) {
                                 if (stores_dz != nullptr)
                                   lanes.write_out(stores_dz + offset + i, dz, streams_dz);
                                 dz_sum[index.value] += lanes.counted(dz);
                                 dz_centred_sum[index.value] += lanes.counted(dz * centred);
                               });
                     }
                     GradientSums& sums = partial[c * cut.chunks + chunk];
                     sums.dz += lane_sum((dz_sum[0] + dz_sum[1]) + (dz_sum[2] + dz_sum[3]));
                     sums.dz_centred += lane_sum((dz_centred_sum[0] + dz_centred_sum[1]) +
                                                 (dz_centred_sum[2] + dz_centred_sum[3]));
                   });
  };
  const auto begin_channel = [&](int64_t c) {
    channel_affine(p.weight, p.bias, p.shape.weight_dtype, c, static_cast<const Acc*>(p.rstd)[c],
                   k.scale + c, k.shift + c);
  };
  const auto finish = [&](int64_t c) {
    GradientSums sums;
    for (int64_t i = 0; i < cut.chunks; ++i) {
      sums.dz += partial[c * cut.chunks + i].dz;
      sums.dz_centred += partial[c * cut.chunks + i].dz_centred;
    }
    finish_gradients<Acc>(p, c, sums.dz, sums.dz_centred, k.slope + c, k.offset + c);
  };
  const auto apply = [&](int64_t first, int64_t last, int64_t chunk) {
    if (dx == nullptr) return;
    cut.for_blocks(
        first, last, chunk, [&](int64_t c, int64_t offset, int64_t length, int64_t runs) {
          for (int64_t r = 0; r < runs; ++r, offset += stride) {
            if (kept != nullptr) {
              // Already holds dz.
              gradient_run<T, BackwardAct::identity, false>(kept + offset, x + offset, nullptr,
                                                            dx + offset, length, k, c, p.act, param,
                                                            p.training, stream_out);
            } else {
              gradient_run<T, kAct, false>(dout + offset, x + offset,
                                           saved == nullptr ? nullptr : saved + offset, dx + offset,
                                           length, k, c, p.act, param, p.training, stream_out);
            }
          }
        });
  };

  if (cut.channel_per_thread()) {
    parallel_ranges(cut.c, cut.n * cut.s, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += cut.group) {
        const int64_t last = min_of(first + cut.group, end);
        for (int64_t c = first; c < last; ++c) begin_channel(c);
        for (int64_t i = 0; i < cut.chunks; ++i) collect(first, last, i);
        for (int64_t c = first; c < last; ++c) finish(c);
        for (int64_t i = cut.chunks - 1; i >= 0; --i) apply(first, last, i);
      }
      if (stream_out || stream_residual) stream_fence();
    });
    return;
  }
  const int64_t tasks = cut.c * cut.chunks;
  for (int64_t c = 0; c < cut.c; ++c) begin_channel(c);
  parallel_ranges(tasks, cut.n * cut.s / cut.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      collect(i / cut.chunks, i / cut.chunks + 1, i % cut.chunks);
    if (stream_residual) stream_fence();
  });
  for (int64_t c = 0; c < cut.c; ++c) finish(c);
  parallel_ranges(tasks, cut.n * cut.s / cut.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i)
      apply(i / cut.chunks, i / cut.chunks + 1, i % cut.chunks);
    if (stream_out || stream_residual) stream_fence();
  });
}

// --- rows: channels_last, and channels_first with short runs ------------------------------------

// The tensor read as rows of columns, of which each belongs to one channel: channels_last [N * S, C], and
// channels_first [N, C * S] where a run of S is too short for vectors. `fold` positions side by side make a row wide
// enough, also where C is 3. Rows are cut into chunks, by the shape alone.
struct RowChunks {
  int64_t channels, inner, fold = 1, width, rows, chunks;
  explicit RowChunks(const BatchNormActShape& shape)
      : channels(shape.c), inner(shape.layout == Layout::channels_last ? 1 : shape.s) {
    const int64_t positions = shape.n * shape.s / max_of(1, inner);
    while (fold * 2 * channels * inner <= 256 && positions % (fold * 2) == 0) fold *= 2;
    width = fold * channels * inner;
    rows = positions / fold;
    chunks = clamp(rows * width / (8 * kBlock), 1, min_of(kMaxChunks, max_of(1, rows / 32)));
  }
  int64_t first_row(int64_t chunk) const { return chunk * rows / chunks; }
  int64_t columns_per_channel() const { return fold * inner; }
  // f(column) for each column of a channel.
  template <class F>
  ADVDL_INLINE void for_columns(int64_t c, F&& f) const {
    for (int64_t part = 0; part < fold; ++part) {
      const int64_t first = (part * channels + c) * inner;
      for (int64_t i = first; i < first + inner; ++i) f(i);
    }
  }
};

// Whether a tensor is read so, and not channel by channel.
bool by_rows(const BatchNormActShape& shape) {
  return shape.layout == Layout::channels_last || (shape.s > 0 && shape.s < kShortRun);
}

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

// Per column of rows [row, row + count) x [column, column + width): mean and squared deviations.
template <class T>
void column_moments(const T* x, int64_t stride, int64_t rows, int64_t width, double* mean,
                    double* m2) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  alignas(64) Acc centre[kMaxColumns + kPad], first[kMaxColumns + kPad], second[kMaxColumns + kPad];
  const int64_t rows_per_block = clamp(2 * kBlock / width, 1, kMaxRows);
  double done = 0;
  for (int64_t begin = 0; begin < rows; begin += rows_per_block) {
    const int64_t count = min_of(rows_per_block, rows - begin);
    const T* block = x + begin * stride;
    std::memset(centre, 0, width * sizeof(Acc));
    std::memset(first, 0, width * sizeof(Acc));
    std::memset(second, 0, width * sizeof(Acc));
    // Four rows at a time, so that the sums are loaded and stored once for four additions.
    const auto row_groups = [&](const auto& add) __attribute__((always_inline)) {
      int64_t r = 0;
      for (; r + 4 <= count; r += 4) add(block + r * stride, Index<4>{});
      for (; r < count; ++r) add(block + r * stride, Index<1>{});
    };
    row_groups([&](const T* row, auto group) __attribute__((always_inline)) {
      for_vectors<Acc, 1>(width,
                          [&](int64_t i, const auto& lanes, auto) __attribute__((always_inline)) {
                            Vec sum = lanes.read(row + i);
                            for (int g = 1; g < group.value; ++g)
                              sum += lanes.read(row + g * stride + i);
                            store(centre + i, load(centre + i) + lanes.counted(sum));
                          });
    });
    for (int64_t i = 0; i < width; ++i) centre[i] /= static_cast<Acc>(count);
    row_groups([&](const T* row, auto group) __attribute__((always_inline)) {
      for_vectors<Acc, 1>(width,
                          [&](int64_t i, const auto& lanes, auto) __attribute__((always_inline)) {
                            const Vec middle = load(centre + i);
                            Vec sum{}, squares{};
                            for (int g = 0; g < group.value; ++g) {
                              const Vec d = lanes.read(row + g * stride + i) - middle;
                              sum += d;
                              squares += d * d;
                            }
                            store(first + i, load(first + i) + lanes.counted(sum));
                            store(second + i, load(second + i) + lanes.counted(squares));
                          });
    });
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

template <class T, ForwardAct kAct, bool kResidual>
void forward_rows(const BatchNormActForward& p, Arena arena) {
  using Acc = acc_t<T>;
  const RowChunks cut(p.shape);
  Constants<Acc> k = arena.take_constants<Acc>(cut.width);
  double* partial_mean = arena.take<double>(cut.chunks * cut.width);
  double* partial_m2 = arena.take<double>(cut.chunks * cut.width);
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const bool stream_out = streams<T>(p.shape, kStreamBytes);

  if (p.training) {
    parallel_ranges(cut.chunks, cut.rows * cut.width / cut.chunks, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t row = cut.first_row(chunk), rows = cut.first_row(chunk + 1) - row;
        for (int64_t c = 0; c < cut.width; c += kMaxColumns) {
          column_moments(x + row * cut.width + c, cut.width, rows,
                         min_of(kMaxColumns, cut.width - c), partial_mean + chunk * cut.width + c,
                         partial_m2 + chunk * cut.width + c);
        }
      }
    });
  }
  parallel_ranges(
      cut.channels, 8 * cut.chunks * cut.columns_per_channel(), [&](int64_t begin, int64_t end) {
        for (int64_t first = begin; first < end; first += kMergedChannels) {
          const int64_t channels = min_of(kMergedChannels, end - first);
          double mean[kMergedChannels] = {}, m2[kMergedChannels] = {}, done = 0;
          for (int64_t chunk = 0; p.training && chunk < cut.chunks; ++chunk) {
            const double* means = partial_mean + chunk * cut.width;
            const double* squares = partial_m2 + chunk * cut.width;
            // All columns of a chunk count alike: no division for each.
            const double rows =
                static_cast<double>(cut.first_row(chunk + 1) - cut.first_row(chunk));
            const double columns = static_cast<double>(cut.columns_per_channel());
            const double total = done + rows * columns, share = rows * columns / total;
            for (int64_t c = 0; c < channels; ++c) {
              double chunk_mean = 0, chunk_m2 = 0;
              cut.for_columns(first + c, [&](int64_t i) { chunk_mean += means[i]; });
              chunk_mean /= columns;
              cut.for_columns(first + c, [&](int64_t i) {
                chunk_m2 += squares[i] + rows * (means[i] - chunk_mean) * (means[i] - chunk_mean);
              });
              const double delta = chunk_mean - mean[c];
              mean[c] += delta * share;
              m2[c] += chunk_m2 + delta * delta * done * share;
            }
            done = total;
          }
          for (int64_t c = 0; c < channels; ++c) {
            const int64_t to = first + c;
            if (p.training) {
              finish_statistics<Acc>(p, to, {done, mean[c], m2[c]}, k.scale + to, k.shift + to);
            } else {
              use_running_statistics<Acc>(p, to, k.scale + to, k.shift + to);
            }
            k.mean[to] = static_cast<const Acc*>(p.mean)[to];
          }
        }
      });
  repeat(cut, k.mean);
  repeat(cut, k.scale);
  repeat(cut, k.shift);
  parallel_ranges(cut.chunks, cut.rows * cut.width / cut.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = end - 1; chunk >= begin; --chunk) {
      for (int64_t row = cut.first_row(chunk); row < cut.first_row(chunk + 1); ++row) {
        const int64_t offset = row * cut.width;
        apply_run<T, kAct, true, kResidual>(x + offset, residual + (kResidual ? offset : 0),
                                            out + offset, cut.width, k, 0, p.act,
                                            static_cast<Acc>(p.act_param), stream_out);
      }
    }
    if (stream_out) stream_fence();
  });
}

template <class T, BackwardAct kAct>
void backward_rows(const BatchNormActBackward& p, Arena arena) {
  using Acc = acc_t<T>;
  const RowChunks cut(p.shape);
  Constants<Acc> k = arena.take_constants<Acc>(cut.width);
  double* partial_dz = arena.take<double>(cut.chunks * cut.width);
  double* partial_dz_centred = arena.take<double>(cut.chunks * cut.width);
  const T* dout = static_cast<const T*>(p.dout);
  const T* x = static_cast<const T*>(p.x);
  const T* saved = static_cast<const T*>(p.saved);
  T* dresidual = static_cast<T*>(p.dresidual);
  T* kept = kept_dz<T, kAct>(p, cut.width);
  T* stores_dz = kept != nullptr ? kept : dresidual;
  T* dx = static_cast<T*>(p.dx);
  const bool stream_out = streams<T>(p.shape, kStreamBytes);
  // Read again only after a pass over three tensors.
  const bool stream_residual = streams<T>(p.shape, kStreamStoredBytes);
  const Acc param = static_cast<Acc>(p.act_param);

  for (int64_t c = 0; c < cut.channels; ++c) {
    k.mean[c] = static_cast<const Acc*>(p.mean)[c];
    channel_affine(p.weight, p.bias, p.shape.weight_dtype, c, static_cast<const Acc*>(p.rstd)[c],
                   k.scale + c, k.shift + c);
  }
  repeat(cut, k.mean);
  repeat(cut, k.scale);
  repeat(cut, k.shift);
  parallel_ranges(cut.chunks, cut.rows * cut.width / cut.chunks, [&](int64_t begin, int64_t end) {
    alignas(64) Acc sum[kMaxColumns + kPad], centred_sum[kMaxColumns + kPad];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (int64_t c = 0; c < cut.width; c += kMaxColumns) {
        const int64_t width = min_of(kMaxColumns, cut.width - c);
        double* dz_total = partial_dz + chunk * cut.width + c;
        double* dz_centred_total = partial_dz_centred + chunk * cut.width + c;
        std::memset(dz_total, 0, width * sizeof(double));
        std::memset(dz_centred_total, 0, width * sizeof(double));
        const int64_t rows_per_block = clamp(2 * kBlock / width, 1, kMaxRows);
        const int64_t last = cut.first_row(chunk + 1);
        for (int64_t first = cut.first_row(chunk); first < last; first += rows_per_block) {
          std::memset(sum, 0, width * sizeof(Acc));
          std::memset(centred_sum, 0, width * sizeof(Acc));
          for (int64_t row = first; row < min_of(last, first + rows_per_block); ++row) {
            const int64_t offset = row * cut.width + c;
            const bool streams_dz = stream_residual && is_aligned(stores_dz + offset);
            for_gradients<T, kAct, true, 1>(
                dout + offset, x + offset, saved == nullptr ? nullptr : saved + offset, width, k, c,
                p.act, param,
                [&](int64_t i, const auto& lanes, auto, auto dz, auto centred)
                    __attribute__((always_inline)) {
                      if (stores_dz != nullptr) {
                        lanes.write_out(stores_dz + offset + i, dz, streams_dz);
                      }
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
    if (stream_residual) stream_fence();
  });
  parallel_ranges(cut.channels, 8 * cut.chunks * cut.columns_per_channel(),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t first = begin; first < end; first += kMergedChannels) {
                      const int64_t channels = min_of(kMergedChannels, end - first);
                      GradientSums sums[kMergedChannels];
                      for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
                        for (int64_t c = 0; c < channels; ++c) {
                          cut.for_columns(first + c, [&](int64_t i) {
                            sums[c].dz += partial_dz[chunk * cut.width + i];
                            sums[c].dz_centred += partial_dz_centred[chunk * cut.width + i];
                          });
                        }
                      }
                      for (int64_t c = 0; c < channels; ++c) {
                        finish_gradients<Acc>(p, first + c, sums[c].dz, sums[c].dz_centred,
                                              k.slope + first + c, k.offset + first + c);
                      }
                    }
                  });
  if (dx == nullptr) return;
  repeat(cut, k.slope);
  repeat(cut, k.offset);
  parallel_ranges(cut.chunks, cut.rows * cut.width / cut.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = end - 1; chunk >= begin; --chunk) {
      for (int64_t row = cut.first_row(chunk); row < cut.first_row(chunk + 1); ++row) {
        const int64_t offset = row * cut.width;
        if (kept != nullptr) {
          gradient_run<T, BackwardAct::identity, true>(kept + offset, x + offset, nullptr,
                                                       dx + offset, cut.width, k, 0, p.act, param,
                                                       p.training, stream_out);
        } else {
          gradient_run<T, kAct, true>(dout + offset, x + offset,
                                      saved == nullptr ? nullptr : saved + offset, dx + offset,
                                      cut.width, k, 0, p.act, param, p.training, stream_out);
        }
      }
    }
    if (stream_out) stream_fence();
  });
}

// --- choice of the instantiation -----------------------------------------------------------------

// f<T>() for the element type.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f64:
      return f.template operator()<double>();
    case DType::f16:
      return f.template operator()<Float16>();
    case DType::bf16:
      return f.template operator()<BFloat16>();
  }
}

template <class T, ForwardAct kAct>
void forward_with(const BatchNormActForward& p, void* workspace) {
  const Arena arena{static_cast<char*>(workspace)};
  const bool first = !by_rows(p.shape);
  if (p.residual == nullptr) {
    first ? forward_channels_first<T, kAct, false>(p, arena)
          : forward_rows<T, kAct, false>(p, arena);
  } else {
    first ? forward_channels_first<T, kAct, true>(p, arena) : forward_rows<T, kAct, true>(p, arena);
  }
}

template <class T>
void forward_dtype(const BatchNormActForward& p, void* workspace) {
  // fp64 serves tests: one instantiation for every activation keeps the build short.
  if constexpr (sizeof(T) < 8) {
    if (p.act == Activation::identity) return forward_with<T, ForwardAct::identity>(p, workspace);
    if (p.act == Activation::relu) return forward_with<T, ForwardAct::relu>(p, workspace);
  }
  forward_with<T, ForwardAct::other>(p, workspace);
}

void forward(const BatchNormActForward& p, void* workspace) {
  // Nothing to normalize; evaluation still has mean and rstd to report.
  if (p.shape.c == 0 || (p.training && p.shape.n * p.shape.s == 0)) return;
  with_type(p.shape.dtype, [&]<class T>() { forward_dtype<T>(p, workspace); });
}

template <class T, BackwardAct kAct>
void backward_with(const BatchNormActBackward& p, void* workspace) {
  const Arena arena{static_cast<char*>(workspace)};
  if (!by_rows(p.shape)) {
    backward_channels_first<T, kAct>(p, arena);
  } else {
    backward_rows<T, kAct>(p, arena);
  }
}

template <class T>
void backward_dtype(const BatchNormActBackward& p, void* workspace) {
  if (p.z_source == ZSource::output) {
    return backward_with<T, BackwardAct::relu_of_output>(p, workspace);
  }
  if constexpr (sizeof(T) < 8) {
    if (p.act == Activation::identity) return backward_with<T, BackwardAct::identity>(p, workspace);
    if (p.act == Activation::relu) return backward_with<T, BackwardAct::relu_of_z>(p, workspace);
  }
  backward_with<T, BackwardAct::other>(p, workspace);
}

void backward(const BatchNormActBackward& p, void* workspace) {
  if (p.shape.c == 0) return;
  with_type(p.shape.dtype, [&]<class T>() { backward_dtype<T>(p, workspace); });
}

template <class Acc, class Partial>
size_t workspace_of(const BatchNormActShape& shape) {
  if (shape.c == 0) return 0;
  Arena arena{nullptr};
  if (!by_rows(shape)) {
    const ChannelBlocks cut(shape, 1);  // the size of groups needs no memory
    arena.take_constants<Acc>(cut.c);
    arena.take<Partial>(cut.c * cut.chunks);
  } else {
    const RowChunks cut(shape);
    arena.take_constants<Acc>(cut.width);
    arena.take<double>(cut.chunks * cut.width);
    arena.take<double>(cut.chunks * cut.width);
  }
  return arena.used;
}

template <class Partial>
size_t workspace_bytes(const BatchNormActShape& shape) {
  return shape.dtype == DType::f64 ? workspace_of<double, Partial>(shape)
                                   : workspace_of<float, Partial>(shape);
}

}  // namespace

void add_batch_norm_act(cpu::KernelTable& table) {
  table.batch_norm_act_forward_workspace = [](const BatchNormActForward& p) {
    return workspace_bytes<Moments>(p.shape);
  };
  table.batch_norm_act_backward_workspace = [](const BatchNormActBackward& p) {
    return workspace_bytes<GradientSums>(p.shape);
  };
  table.batch_norm_act_forward = forward;
  table.batch_norm_act_backward = backward;
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
