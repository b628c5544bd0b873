#include "cpu_kernels.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "../common/batch_norm_act.h"
#include "../common/group_norm.h"
#include "dispatch.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace advdl_ops::python {
namespace {

const void* in(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* out(uintptr_t address) { return reinterpret_cast<void*>(address); }

int thread_limit = 1;

// Splits the range as torch's pool does: equal parts of at least `grain`, one thread each.
void run_on_threads(int64_t begin, int64_t end, int64_t grain, cpu::RangeFunction function,
                    void* context) {
  const int64_t count = end - begin, most = (count + grain - 1) / std::max<int64_t>(grain, 1);
  const int64_t parts = std::clamp<int64_t>(most, 1, thread_limit);
  const int64_t size = (count + parts - 1) / parts;
  std::vector<std::jthread> threads;
  for (int64_t first = begin + size; first < end; first += size) {
    threads.emplace_back(function, first, std::min(first + size, end), context);
  }
  function(begin, std::min(begin + size, end), context);
}

// Runs kernel(workspace) on `threads` new threads, with a workspace of `bytes` bytes that holds garbage.
// Throws std::logic_error if the kernel wrote outside of it.
void run_kernel(size_t bytes, int threads, const std::function<void(void*)>& kernel) {
  constexpr size_t kAlign = 256, kGuard = 256;
  constexpr unsigned char kGarbage = 0xff;  // a NaN in every floating-point type
  if (threads < 1) {
    throw py::value_error("threads (" + std::to_string(threads) + ") must be at least 1");
  }
  std::vector<unsigned char> memory(bytes + 2 * kGuard + kAlign, kGarbage);
  const auto address = reinterpret_cast<uintptr_t>(memory.data()) + kGuard;
  unsigned char* workspace = memory.data() + (address + kAlign - 1) / kAlign * kAlign -
                             reinterpret_cast<uintptr_t>(memory.data());
  thread_limit = threads;
  {
    py::gil_scoped_release release;
    kernel(workspace);
  }
  thread_limit = 1;
  const auto whole = [](const unsigned char* begin, const unsigned char* end) {
    return std::all_of(begin, end, [](unsigned char byte) { return byte == kGarbage; });
  };
  if (!whole(memory.data(), workspace) ||
      !whole(workspace + bytes, memory.data() + memory.size())) {
    throw std::logic_error("the kernel wrote outside of its workspace");
  }
}

// Set the fields that the structs of all norms have in common.
template <class Params>
void set_activation(Params& p, int act, double act_param) {
  p.act = static_cast<Activation>(act);
  p.act_param = act_param;
}
template <class Params>
void set_affine_input(Params& p, uintptr_t x, uintptr_t weight, uintptr_t bias) {
  p.x = in(x);
  p.weight = in(weight);
  p.bias = in(bias);
}
template <class Params>
void set_gradients(Params& p, int z_source, uintptr_t dout, uintptr_t saved, uintptr_t dx,
                   uintptr_t dresidual, uintptr_t dweight, uintptr_t dbias) {
  p.z_source = static_cast<ZSource>(z_source);
  p.dout = in(dout);
  p.saved = in(saved);
  p.dx = out(dx);
  p.dresidual = out(dresidual);
  p.dweight = out(dweight);
  p.dbias = out(dbias);
}

// --- batch_norm_act ------------------------------------------------------------------------------

// shape: (n, c, s, layout, dtype, weight_dtype, running_dtype), enumerators as integers.
using BatchNormActTuple = std::tuple<int64_t, int64_t, int64_t, int, int, int, int>;

BatchNormActShape shape_of(const BatchNormActTuple& shape) {
  const auto [n, c, s, layout, dtype, weight_dtype, running_dtype] = shape;
  return {n,
          c,
          s,
          static_cast<Layout>(layout),
          static_cast<DType>(dtype),
          static_cast<DType>(weight_dtype),
          static_cast<DType>(running_dtype)};
}

void batch_norm_act_forward(const BatchNormActTuple& shape, bool training, double momentum,
                            double eps, int act, double act_param, uintptr_t x, uintptr_t residual,
                            uintptr_t weight, uintptr_t bias, uintptr_t running_mean,
                            uintptr_t running_var, uintptr_t result, uintptr_t mean, uintptr_t rstd,
                            uintptr_t running_mean_out, uintptr_t running_var_out, int threads) {
  BatchNormActForward p;
  p.shape = shape_of(shape);
  p.training = training;
  p.momentum = momentum;
  p.eps = eps;
  set_activation(p, act, act_param);
  set_affine_input(p, x, weight, bias);
  p.residual = in(residual);
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

void batch_norm_act_backward(const BatchNormActTuple& shape, bool training, int act,
                             double act_param, int z_source, uintptr_t dout, uintptr_t x,
                             uintptr_t saved, uintptr_t weight, uintptr_t bias, uintptr_t mean,
                             uintptr_t rstd, uintptr_t dx, uintptr_t dresidual, uintptr_t dweight,
                             uintptr_t dbias, int threads) {
  BatchNormActBackward p;
  p.shape = shape_of(shape);
  p.training = training;
  set_activation(p, act, act_param);
  set_affine_input(p, x, weight, bias);
  p.mean = in(mean);
  p.rstd = in(rstd);
  set_gradients(p, z_source, dout, saved, dx, dresidual, dweight, dbias);
  run_kernel(cpu::batch_norm_act_backward_workspace(p), threads,
             [&](void* workspace) { cpu::batch_norm_act_backward(p, workspace); });
}

void bind_batch_norm_act(py::module_& module) {
  module.def("batch_norm_act_forward", &batch_norm_act_forward, "shape"_a, "training"_a,
             "momentum"_a, "eps"_a, "act"_a, "act_param"_a, "x"_a, "residual"_a, "weight"_a,
             "bias"_a, "running_mean"_a, "running_var"_a, "out"_a, "mean"_a, "rstd"_a,
             "running_mean_out"_a, "running_var_out"_a, "threads"_a = 1);
  module.def("batch_norm_act_backward", &batch_norm_act_backward, "shape"_a, "training"_a, "act"_a,
             "act_param"_a, "z_source"_a, "dout"_a, "x"_a, "saved"_a, "weight"_a, "bias"_a,
             "mean"_a, "rstd"_a, "dx"_a, "dresidual"_a, "dweight"_a, "dbias"_a, "threads"_a = 1);
}

// --- group_norm, layer_norm_2d -------------------------------------------------------------------

// shape: (n, c, s, groups, layout, dtype, weight_dtype), enumerators as integers.
using GroupNormTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int, int, int>;

GroupNormShape shape_of(const GroupNormTuple& shape) {
  const auto [n, c, s, groups, layout, dtype, weight_dtype] = shape;
  return {n,
          c,
          s,
          groups,
          static_cast<Layout>(layout),
          static_cast<DType>(dtype),
          static_cast<DType>(weight_dtype)};
}

void group_norm_forward(const GroupNormTuple& shape, double eps, int act, double act_param,
                        uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias,
                        uintptr_t result, uintptr_t mean, uintptr_t var, int threads) {
  GroupNormForward p;
  p.shape = shape_of(shape);
  p.eps = eps;
  set_activation(p, act, act_param);
  set_affine_input(p, x, weight, bias);
  p.residual = in(residual);
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

void group_norm_backward(const GroupNormTuple& shape, double eps, int act, double act_param,
                         int z_source, uintptr_t dout, uintptr_t x, uintptr_t saved,
                         uintptr_t weight, uintptr_t bias, uintptr_t mean, uintptr_t var,
                         uintptr_t dx, uintptr_t dresidual, uintptr_t dweight, uintptr_t dbias,
                         int threads) {
  GroupNormBackward p;
  p.shape = shape_of(shape);
  p.eps = eps;
  set_activation(p, act, act_param);
  set_affine_input(p, x, weight, bias);
  p.mean = in(mean);
  p.var = in(var);
  set_gradients(p, z_source, dout, saved, dx, dresidual, dweight, dbias);
  const bool each_position = p.shape.groups == kEachPosition;
  const size_t bytes = each_position ? cpu::layer_norm_2d_backward_workspace(p)
                                     : cpu::group_norm_backward_workspace(p);
  run_kernel(bytes, threads, [&](void* workspace) {
    each_position ? cpu::layer_norm_2d_backward(p, workspace)
                  : cpu::group_norm_backward(p, workspace);
  });
}

void bind_group_norm(py::module_& module) {
  module.def("group_norm_forward", &group_norm_forward, "shape"_a, "eps"_a, "act"_a, "act_param"_a,
             "x"_a, "residual"_a, "weight"_a, "bias"_a, "out"_a, "mean"_a, "var"_a,
             "threads"_a = 1);
  module.def("group_norm_backward", &group_norm_backward, "shape"_a, "eps"_a, "act"_a,
             "act_param"_a, "z_source"_a, "dout"_a, "x"_a, "saved"_a, "weight"_a, "bias"_a,
             "mean"_a, "var"_a, "dx"_a, "dresidual"_a, "dweight"_a, "dbias"_a, "threads"_a = 1);
}

}  // namespace

void bind_cpu_kernels(py::module_& module) {
  auto sub = module.def_submodule("cpu", "The CPU kernels without torch, for their unit tests.");
  cpu::set_parallel_for(run_on_threads, [] { return thread_limit; });
  sub.def("capability", &cpu::capability,
          "The capability in use by `_C` (the library has its own).");
  sub.def(
      "set_capability",
      [](const std::string& name) {
        if (cpu::set_capability(name.c_str())) return;
        throw py::value_error("set_capability: name ('" + name +
                              "') must be a capability that this build and this CPU have");
      },
      py::arg("name"));
  bind_batch_norm_act(sub);
  bind_group_norm(sub);
}

}  // namespace advdl_ops::python
