// What the gradients of group norm and layer norm 2d share on the CPU. A set is a group of a sample, or a position.
#pragma once

#include "../common/group_norm.h"

#include "dispatch.h"
#include "norm_runs.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

// rstd of every set, from the variances that forward stored.
template <class Acc>
void fill_rstd(const GroupNormBackward& p, Acc* rstd) {
  const int64_t sets = p.shape.sets();
  for (int64_t i = 0; i < sets; ++i) rstd[i] = rstd_of(static_cast<const Acc*>(p.var)[i], p.eps);
}

// Adds a channel's sums of dz to its set's sums of weight * dz.
ADVDL_INLINE void add_weighted(GradientSums<double>& set, double weight,
                               const GradientSums<double>& channel) {
  set.merge({weight * channel.dz, weight * channel.dz_x});
}

// slope and offset of a set's dx, from its sums of weight * dz and weight * dz * (x - mean).
template <class Acc>
ADVDL_INLINE void finish_gradients(const GradientSums<double>& set, double count, Acc rstd,
                                   Acc* slope, Acc* offset) {
  const double r = rstd;
  *slope = static_cast<Acc>(-r * r * r * set.dz_x / count);
  *offset = static_cast<Acc>(-r * set.dz / count);
}

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

// For an empty x: dweight and dbias are zero.
inline void zero_parameter_gradients(const GroupNormBackward& p) {
  if (p.dweight == nullptr || p.shape.c == 0) return;
  const size_t bytes = static_cast<size_t>(p.shape.c) * (p.shape.dtype == DType::f64 ? 8 : 4);
  std::memset(p.dweight, 0, bytes);
  std::memset(p.dbias, 0, bytes);
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
