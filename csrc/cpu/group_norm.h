// What the paths of group norm and layer norm 2d share: the statistics and gradient sums of a set of elements, and weights
// in the type of the arithmetic.
#pragma once

#include "../common/group_norm.h"

#include "norm.h"

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

// Weight and bias in the type of the arithmetic, each value `inner` times: [c * inner + kPad].
template <class Acc>
struct Affine {
  Acc *weight, *bias;
  Affine(const GroupNormShape& shape, int64_t inner, Arena& arena)
      : weight(arena.take<Acc>(shape.c * inner + kPad)),
        bias(arena.take<Acc>(shape.c * inner + kPad)) {}
  template <class Params>
  Affine(const Params& p, int64_t inner, Arena& arena) : Affine(p.shape, inner, arena) {
    fill(p.weight, p.shape, inner, Acc(1), weight);
    fill(p.bias, p.shape, inner, Acc(0), bias);
  }

 private:
  static void fill(const void* from, const GroupNormShape& shape, int64_t inner, Acc otherwise,
                   Acc* to) {
    for (int64_t c = 0; c < shape.c; ++c) {
      const Acc value =
          from == nullptr ? otherwise : static_cast<Acc>(read_scalar(from, shape.weight_dtype, c));
      for (int64_t i = 0; i < inner; ++i) *to++ = value;
    }
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

// Adds up [parts, channels * inner] column sums into dbias and dweight [channels].
template <class Acc>
void sum_parts(const GroupNormBackward& p, const double* dbias, const double* dweight,
               int64_t parts, int64_t inner) {
  for (int64_t c = 0; c < p.shape.c; ++c) {
    double bias = 0, weight = 0;
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t i = 0; i < inner; ++i) {
        bias += dbias[(part * p.shape.c + c) * inner + i];
        weight += dweight[(part * p.shape.c + c) * inner + i];
      }
    }
    static_cast<Acc*>(p.dbias)[c] = static_cast<Acc>(bias);
    static_cast<Acc*>(p.dweight)[c] = static_cast<Acc>(weight);
  }
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
