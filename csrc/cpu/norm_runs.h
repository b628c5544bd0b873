// What the norms share on the CPU for a run of contiguous elements: the moments of its blocks, and the loops that apply
// a norm, an activation and their gradients. norm_columns.h adds tensors whose channels are innermost.
#pragma once

#include "../common/arena.h"
#include "../common/moments.h"

#include "simd_math.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

constexpr int64_t kBlock = 4096;     // elements of a block: 16 KB of fp32
constexpr int64_t kActBlock = 1024;  // pre-activations in the buffer of an activation
constexpr int64_t kShortRun = 32;    // shorter channels have no loops of their own
constexpr int64_t kMaxChunks = 64;   // partial sums per channel, at most
// Channels whose partial sums are merged together, chunk by chunk. The partial sums of one channel are far apart in
// memory.
constexpr int64_t kMergedChannels = 64;
// Rows that are added up in the precision of the arithmetic. The sums of such groups are added up in double.
constexpr int64_t kMaxRows = 64;
constexpr int64_t kPad = 64;  // elements that can be read past the end of per-channel arrays
// Outputs of at least kStreamBytes bypass the caches (docs/performance.md). The limit is kStreamStoredBytes for a
// tensor that is read again only much later.
constexpr int64_t kStreamBytes = 24 << 20, kStreamStoredBytes = 8 << 20;

ADVDL_INLINE int64_t clamp(int64_t v, int64_t low, int64_t high) {
  return max_of(low, min_of(v, high));
}

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

// scale = rstd * weight and shift = bias of one channel. The gradients use the same arithmetic, so that backward
// recomputes the pre-activation of forward bit for bit.
template <class Acc>
void channel_affine(const void* weight, const void* bias, DType dtype, int64_t c, Acc rstd,
                    Acc* scale, Acc* shift) {
  *scale = weight == nullptr ? rstd : rstd * static_cast<Acc>(read_scalar(weight, dtype, c));
  *shift = bias == nullptr ? Acc(0) : static_cast<Acc>(read_scalar(bias, dtype, c));
}

// Whether an output is large enough to bypass the caches, and whether a run of it is aligned for such stores.
template <class T>
bool streams(int64_t elements, int64_t bytes) {
  return elements * static_cast<int64_t>(sizeof(T)) >= bytes;
}
ADVDL_INLINE bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % ADVDL_VECTOR_BYTES == 0;
}

// The constants of a run: z = (x - mean) * scale + shift, dx = scale * dz + slope * (x - mean) + offset. Each is one
// value for the run, or an array with one value for each element (readable kPad elements past the end).
template <class Acc>
struct Constants {
  Acc *mean, *scale, *shift, *slope, *offset;
  Acc* rstd =
      nullptr;  // multiplies `scale` if only one of statistics and weights varies along a run
};

template <class Acc>
Constants<Acc> take_constants(Arena& arena, int64_t channels) {
  Constants<Acc> k;
  k.mean = arena.take<Acc>(channels + kPad);
  k.scale = arena.take<Acc>(channels + kPad);
  k.shift = arena.take<Acc>(channels + kPad);
  k.slope = arena.take<Acc>(channels + kPad);
  k.offset = arena.take<Acc>(channels + kPad);
  return k;
}

// Which constants vary along a run. kStatistics: mean, rstd, slope and offset. kAffine: scale and shift. If both or
// neither, scale includes rstd.
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

// The activations with loops of their own, so that the arithmetic (of silu) overlaps with memory accesses. The others
// are applied to blocks in L1. That needs one loop per activation, not one per norm and activation.
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
      // If T is the type of the arithmetic and the block has whole vectors, z is computed in `out` and activated in
      // place.
      if constexpr (sizeof(T) == sizeof(Acc)) {
        if (count % lanes_per == 0) z = out + begin;
      }
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

// kept: `dout` is a dz that the first pass stored.
enum class BackwardAct { identity, relu_of_z, relu_of_output, leaky_relu, silu, other, kept };

constexpr bool is_transcendental(BackwardAct act) {
  return act == BackwardAct::silu || act == BackwardAct::other;
}

// Calls use(position, lanes, Index, dz, x - mean) for the vectors of a run.
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
          // As in torch, the gradient passes where z is NaN.
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

// Where the first pass stores dz for the second one, or null: dz is computed again. Without a residual, only the
// derivative of a transcendental activation is worth a store. It then goes to dx, which the second pass overwrites.
template <class T, BackwardAct kAct, class Params>
T* kept_dz(const Params& p) {
  if (!stored_dz_is_exact(sizeof(T), p.act)) return nullptr;
  if (p.dresidual != nullptr) return static_cast<T*>(p.dresidual);
  return is_transcendental(kAct) ? static_cast<T*>(p.dx) : nullptr;
}

// The tensors of the backward call `p`. `kept`: where the first pass stores dz for the second one; `stores_dz`: where it
// writes dz at all. Null: nowhere.
template <class T>
struct GradientTensors {
  const T *dout, *x, *saved;
  T *dresidual, *dx, *kept, *stores_dz;
};
template <class T, BackwardAct kAct, class Params>
GradientTensors<T> gradient_tensors(const Params& p) {
  T *dresidual = static_cast<T*>(p.dresidual), *kept = kept_dz<T, kAct>(p);
  return {static_cast<const T*>(p.dout),
          static_cast<const T*>(p.x),
          static_cast<const T*>(p.saved),
          dresidual,
          static_cast<T*>(p.dx),
          kept,
          kept != nullptr ? kept : dresidual};
}

// Whether dx streams. It does not if dz was stored there, because those lines are already in the caches.
template <class T>
bool streams_dx(int64_t elements, const T* kept, const T* dx) {
  return streams<T>(elements, kStreamBytes) && kept != dx;
}

// dx of a run. kTraining is a template argument because a run-time choice would change how the compiler contracts the
// products.
template <class T, BackwardAct kAct, class V, bool kTraining = true>
void gradient_run(const T* dout, const T* x, const T* saved, T* dx, int64_t n,
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
                                   // Zero slopes would not do: with fixed statistics, a NaN or Inf in x must not reach
                                   // dx.
                                   lanes.write_out(dx + i, norm.scale_at(i) * dz, streams);
                                 }
                               });
}

// The mean of a block is guessed from the first 1 / kSampled of its elements. The mean of any fraction f of a set is
// within sqrt((1 - f) / f) standard deviations of the mean of the set. So the sum of squares about the guess is at most
// 8 times that about the mean, and the loss of precision is limited to that factor.
constexpr int64_t kSampled = 8;
// The least number of sampled elements, if the run has as many. Fewer would give a worse guess.
constexpr int64_t kMinSampled = 64;

// Adds a block to the moments of its chunk. The squares are about a guess of the block's own mean, which the sum of the
// deviations corrects. The mean of the earlier blocks would be a cheaper guess, but a bad one if the first block
// differs from the rest.
template <class T>
void add_block(const T* x, int64_t length, int64_t runs, int64_t stride, Moments<double>* moments) {
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
  const Moments<double> block{count, guess + correction, squares - shift * correction};
  if (moments->count ==
      0) {  // most sets have one block, and for a short one the division of merge() would dominate
    *moments = block;
  } else {
    moments->merge(block);
  }
}

// --- the sets of group norm and layer norm 2d ------------------------------------------------------

// rstd from the variance that forward stored, so that backward recomputes the pre-activation of forward bit for bit.
template <class Acc>
ADVDL_INLINE Acc rstd_of(Acc var, double eps) {
  return static_cast<Acc>(1.0 / __builtin_sqrt(static_cast<double>(var) + eps));
}

// Writes mean and var of a set from its moments; returns rstd.
template <class Acc, class Forward>
ADVDL_INLINE Acc write_statistics(const Forward& p, int64_t set, const Moments<double>& m) {
  const double m2 = m.m2 < 0 ? 0 : m.m2;  // rounding may make it slightly negative; NaN stays
  const Acc var = static_cast<Acc>(m2 / m.count);
  static_cast<Acc*>(p.mean)[set] = static_cast<Acc>(m.mean);
  static_cast<Acc*>(p.var)[set] = var;
  return rstd_of(var, p.eps);
}

// to[c * inner + i] = values[first + c], or `otherwise` if values is null, for c in [0, channels) and i in [0, inner).
template <class Acc>
void fill_channels(const void* values, DType dtype, int64_t first, int64_t channels, int64_t inner,
                   Acc otherwise, Acc* to) {
  for (int64_t c = 0; c < channels; ++c) {
    const Acc value =
        values == nullptr ? otherwise : static_cast<Acc>(read_scalar(values, dtype, first + c));
    if (inner == 1) {
      to[c] = value;
      continue;
    }
    for_vectors<Acc, 1>(inner,
                        [&](int64_t i, const auto& lanes, auto) __attribute__((always_inline)) {
                          lanes.write(to + c * inner + i, broadcast(value));
                        });
  }
}

// Weight and bias of the channels, [c + kPad] each.
template <class Acc>
struct Affine {
  Acc *weight, *bias;
  Affine(int64_t channels, Arena& arena)
      : weight(arena.take<Acc>(channels + kPad)), bias(arena.take<Acc>(channels + kPad)) {}
  template <class Params>
  void fill(const Params& p) const {
    fill_channels(p.weight, p.shape.weight_dtype, 0, p.shape.c, 1, Acc(1), weight);
    fill_channels(p.bias, p.shape.weight_dtype, 0, p.shape.c, 1, Acc(0), bias);
  }
};

// --- choice of the instantiation -----------------------------------------------------------------

// Element types whose activations have loops of their own. fp64 is mostly for tests and the default capability for old
// CPUs: one loop for all activations keeps the build short there. In half precision silu and leaky relu have none
// either, because the conversions cost as much as the loop would save.
template <class T>
constexpr bool kSpecialized = sizeof(T) < 8 && ADVDL_VECTOR_BYTES > 16;
template <class T>
constexpr bool kSpecializedForFloat = kSpecialized<T> && sizeof(T) == 4;

// Calls f<T, kAct, kResidual>() for a forward call.
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

// Calls f<T, kAct>() for a backward call.
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
