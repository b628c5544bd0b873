// csrc/common/batch_norm_act.h says what each argument is; 0 stands for a null pointer.
#include "../common/batch_norm_act.h"

#include <pybind11/stl.h>

#include <tuple>

#include "cpu_kernels.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace advdl_ops::python {
namespace {

// shape: (n, c, s, layout, dtype, weight_dtype, running_dtype), enumerators as integers.
using Shape = std::tuple<int64_t, int64_t, int64_t, int, int, int, int>;

BatchNormActShape shape_of(const Shape& shape) {
  const auto [n, c, s, layout, dtype, weight_dtype, running_dtype] = shape;
  return {n,
          c,
          s,
          static_cast<Layout>(layout),
          static_cast<DType>(dtype),
          static_cast<DType>(weight_dtype),
          static_cast<DType>(running_dtype)};
}

void forward(const Shape& shape, bool training, double momentum, double eps, int act,
             double act_param, uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias,
             uintptr_t running_mean, uintptr_t running_var, uintptr_t result, uintptr_t mean,
             uintptr_t rstd, uintptr_t running_mean_out, uintptr_t running_var_out, int threads) {
  BatchNormActForward p;
  p.shape = shape_of(shape);
  p.training = training;
  p.momentum = momentum;
  p.eps = eps;
  p.act = static_cast<Activation>(act);
  p.act_param = act_param;
  p.x = in(x);
  p.residual = in(residual);
  p.weight = in(weight);
  p.bias = in(bias);
  p.running_mean = in(running_mean);
  p.running_var = in(running_var);
  p.out = out(result);
  p.mean = out(mean);
  p.rstd = out(rstd);
  p.running_mean_out = out(running_mean_out);
  p.running_var_out = out(running_var_out);
  run_kernel(cpu::batch_norm_act_forward_workspace(p), threads,
             [&](void* workspace) { cpu::batch_norm_act_forward(p, workspace); });
}

void backward(const Shape& shape, bool training, int act, double act_param, int z_source,
              uintptr_t dout, uintptr_t x, uintptr_t saved, uintptr_t weight, uintptr_t bias,
              uintptr_t mean, uintptr_t rstd, uintptr_t dx, uintptr_t dresidual, uintptr_t dweight,
              uintptr_t dbias, int threads) {
  BatchNormActBackward p;
  p.shape = shape_of(shape);
  p.training = training;
  p.act = static_cast<Activation>(act);
  p.act_param = act_param;
  p.z_source = static_cast<ZSource>(z_source);
  p.dout = in(dout);
  p.x = in(x);
  p.saved = in(saved);
  p.weight = in(weight);
  p.bias = in(bias);
  p.mean = in(mean);
  p.rstd = in(rstd);
  p.dx = out(dx);
  p.dresidual = out(dresidual);
  p.dweight = out(dweight);
  p.dbias = out(dbias);
  run_kernel(cpu::batch_norm_act_backward_workspace(p), threads,
             [&](void* workspace) { cpu::batch_norm_act_backward(p, workspace); });
}

}  // namespace

void bind_batch_norm_act(py::module_& module) {
  module.def("batch_norm_act_forward", &forward, "shape"_a, "training"_a, "momentum"_a, "eps"_a,
             "act"_a, "act_param"_a, "x"_a, "residual"_a, "weight"_a, "bias"_a, "running_mean"_a,
             "running_var"_a, "out"_a, "mean"_a, "rstd"_a, "running_mean_out"_a,
             "running_var_out"_a, "threads"_a = 1);
  module.def("batch_norm_act_backward", &backward, "shape"_a, "training"_a, "act"_a, "act_param"_a,
             "z_source"_a, "dout"_a, "x"_a, "saved"_a, "weight"_a, "bias"_a, "mean"_a, "rstd"_a,
             "dx"_a, "dresidual"_a, "dweight"_a, "dbias"_a, "threads"_a = 1);
}

}  // namespace advdl_ops::python
