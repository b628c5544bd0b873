// csrc/common/group_norm.h says what each argument is; 0 stands for a null pointer.
#include "../common/group_norm.h"

#include <pybind11/stl.h>

#include <tuple>

#include "cpu_kernels.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace advdl_ops::python {
namespace {

// shape: (n, c, s, groups, layout, dtype, weight_dtype), enumerators as integers.
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, int, int, int>;

GroupNormShape shape_of(const Shape& shape) {
  const auto [n, c, s, groups, layout, dtype, weight_dtype] = shape;
  return {n,
          c,
          s,
          groups,
          static_cast<Layout>(layout),
          static_cast<DType>(dtype),
          static_cast<DType>(weight_dtype)};
}

void forward(const Shape& shape, double eps, int act, double act_param, uintptr_t x,
             uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t result, uintptr_t mean,
             uintptr_t var, int threads) {
  GroupNormForward p;
  p.shape = shape_of(shape);
  p.eps = eps;
  p.act = static_cast<Activation>(act);
  p.act_param = act_param;
  p.x = in(x);
  p.residual = in(residual);
  p.weight = in(weight);
  p.bias = in(bias);
  p.out = out(result);
  p.mean = out(mean);
  p.var = out(var);
  const bool each_position = p.shape.groups == kEachPosition;
  const size_t bytes = each_position ? cpu::layer_norm_2d_forward_workspace(p)
                                     : cpu::group_norm_forward_workspace(p);
  run_kernel(bytes, threads, [&](void* workspace) {
    each_position ? cpu::layer_norm_2d_forward(p, workspace)
                  : cpu::group_norm_forward(p, workspace);
  });
}

void backward(const Shape& shape, double eps, int act, double act_param, int z_source,
              uintptr_t dout, uintptr_t x, uintptr_t saved, uintptr_t weight, uintptr_t bias,
              uintptr_t mean, uintptr_t var, uintptr_t dx, uintptr_t dresidual, uintptr_t dweight,
              uintptr_t dbias, int threads) {
  GroupNormBackward p;
  p.shape = shape_of(shape);
  p.eps = eps;
  p.act = static_cast<Activation>(act);
  p.act_param = act_param;
  p.z_source = static_cast<ZSource>(z_source);
  p.dout = in(dout);
  p.x = in(x);
  p.saved = in(saved);
  p.weight = in(weight);
  p.bias = in(bias);
  p.mean = in(mean);
  p.var = in(var);
  p.dx = out(dx);
  p.dresidual = out(dresidual);
  p.dweight = out(dweight);
  p.dbias = out(dbias);
  const bool each_position = p.shape.groups == kEachPosition;
  const size_t bytes = each_position ? cpu::layer_norm_2d_backward_workspace(p)
                                     : cpu::group_norm_backward_workspace(p);
  run_kernel(bytes, threads, [&](void* workspace) {
    each_position ? cpu::layer_norm_2d_backward(p, workspace)
                  : cpu::group_norm_backward(p, workspace);
  });
}

}  // namespace

void bind_group_norm(py::module_& module) {
  module.def("group_norm_forward", &forward, "shape"_a, "eps"_a, "act"_a, "act_param"_a, "x"_a,
             "residual"_a, "weight"_a, "bias"_a, "out"_a, "mean"_a, "var"_a, "threads"_a = 1);
  module.def("group_norm_backward", &backward, "shape"_a, "eps"_a, "act"_a, "act_param"_a,
             "z_source"_a, "dout"_a, "x"_a, "saved"_a, "weight"_a, "bias"_a, "mean"_a, "var"_a,
             "dx"_a, "dresidual"_a, "dweight"_a, "dbias"_a, "threads"_a = 1);
}

}  // namespace advdl_ops::python
