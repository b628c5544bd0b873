// What the paths of group norm and layer norm 2d share: the statistics and gradient sums of a set of elements, and weights
// in the type of the arithmetic.
#pragma once

#include "../common/group_norm.h"

#include "norm.h"
#include "parallel.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

// From the variance as forward stored it: backward recomputes the very pre-activation of forward.
template <class Acc>
ADVDL_INLINE Acc rstd_of(Acc var, double eps) {
  return static_cast<Acc>(1.0 / __builtin_sqrt(static_cast<double>(var) + eps));
}

// Writes mean and var of a set from its moments; returns rstd.
template <class Acc>
ADVDL_INLINE Acc write_statistics(const GroupNormForward& p, int64_t set, const Moments& m) {
  const double m2 = m.m2 < 0 ? 0 : m.m2;  // rounding may leave a trace below zero; NaN stays
  const Acc var = static_cast<Acc>(m2 / m.count);
  static_cast<Acc*>(p.mean)[set] = static_cast<Acc>(m.mean);
  static_cast<Acc*>(p.var)[set] = var;
  return rstd_of(var, p.eps);
}

// rstd of every set, [sets].
template <class Acc>
Acc* read_rstd(const GroupNormBackward& p, Arena& arena) {
  const int64_t sets = p.shape.sets();
  Acc* rstd = arena.take<Acc>(sets);
  for (int64_t i = 0; i < sets; ++i) rstd[i] = rstd_of(static_cast<const Acc*>(p.var)[i], p.eps);
  return rstd;
}

// to[c * inner + i] = values[first + c], or `otherwise`, in the type of the arithmetic, for c in [0, channels).
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
  Affine(const GroupNormShape& shape, Arena& arena)
      : weight(arena.take<Acc>(shape.c + kPad)), bias(arena.take<Acc>(shape.c + kPad)) {}
  template <class Params>
  Affine(const Params& p, Arena& arena) : Affine(p.shape, arena) {
    fill_channels(p.weight, p.shape.weight_dtype, 0, p.shape.c, 1, Acc(1), weight);
    fill_channels(p.bias, p.shape.weight_dtype, 0, p.shape.c, 1, Acc(0), bias);
  }
};

// A set's sums of weight * dz and weight * dz * (x - mean), and what they make of dx.
struct SetSums {
  double dz = 0, dz_centred = 0;
  void add(double weight, const GradientSums& channel) {
    dz += weight * channel.dz;
    dz_centred += weight * channel.dz_centred;
  }
  template <class Acc>
  ADVDL_INLINE void finish(double count, Acc rstd, Acc* slope, Acc* offset) const {
    const double r = rstd;
    *slope = static_cast<Acc>(-r * r * r * dz_centred / count);
    *offset = static_cast<Acc>(-r * dz / count);
  }
};

// The sum of values[0 .. n).
inline double sum_of_run(const double* values, int64_t n) {
  if (n == 1) return values[0];
  DoubleVec sum[4] = {};
  for_vectors<double, 4>(
      n, [&](int64_t i, const auto& lanes, auto index) __attribute__((always_inline)) {
        sum[index.value] += lanes.counted(lanes.read(values + i));
      });
  return lane_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Adds up [parts, channels * inner] column sums into dbias and dweight [channels].
template <class Acc>
void sum_parts(const GroupNormBackward& p, const double* dbias, const double* dweight,
               int64_t parts, int64_t inner) {
  const int64_t c = p.shape.c;
  cpu::parallel_ranges(c, 2 * parts * inner, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kMergedChannels) {
      const int64_t channels = min_of(kMergedChannels, end - first);
      double bias[kMergedChannels] = {}, weight[kMergedChannels] = {};
      for (int64_t part = 0; part < parts; ++part) {
        for (int64_t i = 0; i < channels; ++i) {
          const int64_t at = (part * c + first + i) * inner;
          bias[i] += sum_of_run(dbias + at, inner);
          weight[i] += sum_of_run(dweight + at, inner);
        }
      }
      for (int64_t i = 0; i < channels; ++i) {
        static_cast<Acc*>(p.dbias)[first + i] = static_cast<Acc>(bias[i]);
        static_cast<Acc*>(p.dweight)[first + i] = static_cast<Acc>(weight[i]);
      }
    }
  });
}

// Whether there is nothing to do but to zero the gradients of weight and bias.
inline bool zero_gradients_of_nothing(const GroupNormBackward& p) {
  if (!p.shape.is_empty()) return false;
  const size_t bytes = static_cast<size_t>(p.shape.c) * (p.shape.dtype == DType::f64 ? 8 : 4);
  if (p.dweight != nullptr && bytes > 0) {
    std::memset(p.dweight, 0, bytes);
    std::memset(p.dbias, 0, bytes);
  }
  return true;
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
