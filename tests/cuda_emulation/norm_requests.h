// Fields of every request for a norm. They have the names that the structs of csrc/common share; see module.cpp.
#pragma once

#include "arena.h"

namespace cuda_emulation {

template <class Shape>
Shape get_shape(const py::dict& r) {
  Shape s;
  s.n = r["n"].cast<int64_t>();
  s.c = r["c"].cast<int64_t>();
  s.s = r["s"].cast<int64_t>();
  s.layout = get_enum<advdl_ops::Layout>(r, "layout");
  s.dtype = get_enum<DType>(r, "dtype");
  s.weight_dtype = get_enum<DType>(r, "weight_dtype");
  return s;
}

// Bytes of the tensors of a call, and the type of its statistics and sums.
struct Sizes {
  size_t all, weights, channels;
  DType acc;

  template <class Shape>
  explicit Sizes(const Shape& s)
      : all(static_cast<size_t>(s.n * s.c * s.s) * element_bytes(s.dtype)),
        weights(static_cast<size_t>(s.c) * element_bytes(s.weight_dtype)),
        acc(s.dtype == DType::f64 ? DType::f64 : DType::f32) {
    channels = static_cast<size_t>(s.c) * element_bytes(acc);
  }
};

// Forward and backward.
template <class Params>
void get_common(const py::dict& r, Arena& arena, const Sizes& sizes, Params& p) {
  p.act = get_enum<advdl_ops::Activation>(r, "act");
  p.act_param = r["act_param"].cast<double>();
  p.x = arena.input("x", sizes.all, p.shape.dtype);
  p.weight = arena.input("weight", sizes.weights, p.shape.weight_dtype);
  p.bias = arena.input("bias", sizes.weights, p.shape.weight_dtype);
}

// Backward, except the gradients of weight and bias.
template <class Params>
void get_gradients(const py::dict& r, Arena& arena, const Sizes& sizes, Params& p) {
  const DType dtype = p.shape.dtype;
  p.z_source = get_enum<advdl_ops::ZSource>(r, "z_source");
  p.dout = arena.input("dout", sizes.all, dtype);
  p.saved = arena.input("saved", sizes.all, dtype);
  if (arena.wants("want_dx")) p.dx = arena.output("dx", sizes.all, dtype);
  if (arena.wants("want_dresidual")) p.dresidual = arena.output("dresidual", sizes.all, dtype);
}

}  // namespace cuda_emulation
