// What the bindings of the norms check and read off their arguments alike.
#pragma once

#include "tensor.h"

namespace advdl_ops {

inline int64_t positions(const Tensor& x) {
  int64_t count = 1;
  for (int64_t i = 2; i < x.dim(); ++i) count *= x.size(i);
  return count;
}

// Of a dense x. With one position, or one channel, both are true; rows of channels are the longer runs.
inline Layout layout_of(const Tensor& x) {
  return is_channels_last(x) && (x.size(1) > 1 || !x.is_contiguous()) ? Layout::channels_last
                                                                      : Layout::channels_first;
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (x[i] != y[i]) return false;
  }
  return true;
}

inline bool same_kind(const Tensor& a, const Tensor& b) {
  return same_sizes(a, b) && a.scalar_type() == b.scalar_type() && a.device() == b.device();
}

// Whether a [C] tensor's dtype goes with x's: its own, or fp32 beside a half-precision x.
inline bool goes_with(const OptionalTensor& t, ScalarType x) {
  if (!t.has_value() || t->scalar_type() == x) return true;
  return (x == ScalarType::Half || x == ScalarType::BFloat16) &&
         t->scalar_type() == ScalarType::Float;
}

inline bool is_per_channel(const OptionalTensor& t, const Tensor& x) {
  return !t.has_value() || (t->dim() == 1 && t->size(0) == x.size(1) && t->device() == x.device());
}

inline void check_affine(const char* function, const Tensor& x, const OptionalTensor& weight,
                         const OptionalTensor& bias, int64_t act) {
  check(goes_with(weight, x.scalar_type()) && goes_with(bias, x.scalar_type()), function,
        "weight and bias must be of x's dtype, or float32 beside a half x");
  check(is_per_channel(weight, x), function,
        "weight must have one value per channel of x, on its device");
  check(is_per_channel(bias, x), function,
        "bias must have one value per channel of x, on its device");
  check(!weight.has_value() || !bias.has_value() || weight->scalar_type() == bias->scalar_type(),
        function, "weight and bias must have the same dtype");
  check(act >= 0 && act < kActivationCount, function, "unknown activation code");
}

inline void check_residual(const char* function, const OptionalTensor& residual, const Tensor& x) {
  check(!residual.has_value() || same_kind(*residual, x), function,
        "residual must have the shape, dtype and device of x");
}

inline void check_backward(const char* function, const Tensor& dout, const Tensor& x,
                           const OptionalTensor& saved, int64_t act, int64_t z_source) {
  check(same_kind(dout, x), function, "dout must have the shape, dtype and device of x");
  check(!saved.has_value() || same_kind(*saved, x), function,
        "saved must have the shape, dtype and device of x");
  check(z_source >= 0 && z_source <= 2, function, "unknown z_source");
  const auto source = static_cast<ZSource>(z_source);
  check((source != ZSource::input) == saved.has_value(), function,
        "saved must be given exactly where z_source names it");
  check(source != ZSource::output || static_cast<Activation>(act) == Activation::relu, function,
        "only relu's derivative can be read off its output");
}

}  // namespace advdl_ops
