// Python's way to the emulated kernels: every tensor arrives as bytes and leaves as bytes. Each is copied to a
// heap block of its exact size, so that AddressSanitizer sees the first access outside; outputs and workspace
// start as NaN. worker.py calls this in a process of its own. With "dry" in the request only the launches and the
// size of the workspace come back: any shape costs nothing, and a tensor is named instead of given.
#include "../../csrc/common/batch_norm_act.h"
#include "arena.h"
#include "group_norm.h"
#include "lstm.h"
#include "norm_requests.h"
#include "selftest.h"

namespace {

using namespace advdl_ops;
using namespace cuda_emulation;

BatchNormActShape batch_norm_shape(const py::dict& r) {
  auto s = get_shape<BatchNormActShape>(r);
  s.running_dtype = get_enum<DType>(r, "running_dtype");
  return s;
}

py::dict forward(const py::dict& r) {
  apply_settings(r);
  Arena arena(r);
  BatchNormActForward p;
  p.shape = batch_norm_shape(r);
  const Sizes sizes(p.shape);
  const DType running_dtype = p.shape.running_dtype;
  const size_t running = static_cast<size_t>(p.shape.c) * element_bytes(running_dtype);
  get_common(r, arena, sizes, p);
  p.training = r["training"].cast<bool>();
  p.momentum = r["momentum"].cast<double>();
  p.eps = r["eps"].cast<double>();
  p.residual = arena.input("residual", sizes.all, p.shape.dtype);
  p.running_mean = arena.input("running_mean", running, running_dtype);
  p.running_var = arena.input("running_var", running, running_dtype);
  if (!arena.wants("moments_only")) p.out = arena.output("out", sizes.all, p.shape.dtype);
  if (p.training || p.running_mean != nullptr) {
    p.mean = arena.output("mean", sizes.channels, sizes.acc);
    p.rstd = arena.output("rstd", sizes.channels, sizes.acc);
  } else {
    p.mean = const_cast<void*>(arena.input("mean", sizes.channels, sizes.acc));
    p.rstd = const_cast<void*>(arena.input("rstd", sizes.channels, sizes.acc));
  }
  if (p.training && p.running_mean != nullptr) {
    const auto output = [&](const char* name, const void* old) {
      return arena.wants("in_place") ? arena.output_at(name, const_cast<void*>(old), running)
                                     : arena.output(name, running, running_dtype);
    };
    p.running_mean_out = output("running_mean_out", p.running_mean);
    p.running_var_out = output("running_var_out", p.running_var);
  }
  cuda::batch_norm_act_forward(p, arena.workspace(cuda::batch_norm_act_forward_workspace(p)),
                               nullptr);
  return arena.results();
}

py::dict backward(const py::dict& r) {
  apply_settings(r);
  Arena arena(r);
  BatchNormActBackward p;
  p.shape = batch_norm_shape(r);
  const Sizes sizes(p.shape);
  get_common(r, arena, sizes, p);
  get_gradients(r, arena, sizes, p);
  p.training = r["training"].cast<bool>();
  p.mean = arena.input("mean", sizes.channels, sizes.acc);
  p.rstd = arena.input("rstd", sizes.channels, sizes.acc);
  p.means_given = arena.wants("means_given");
  if (p.means_given) {
    p.dweight = const_cast<void*>(arena.input("mean_dz_xhat", sizes.channels, sizes.acc));
    p.dbias = const_cast<void*>(arena.input("mean_dz", sizes.channels, sizes.acc));
  } else {
    p.dweight = arena.output("dweight", sizes.channels, sizes.acc);
    p.dbias = arena.output("dbias", sizes.channels, sizes.acc);
  }
  cuda::batch_norm_act_backward(p, arena.workspace(cuda::batch_norm_act_backward_workspace(p)),
                                nullptr);
  return arena.results();
}

py::dict selftest(const py::dict& r) {
  apply_settings(r);
  Arena arena(r);
  const int blocks = r["blocks"].cast<int>(), threads = r["threads"].cast<int>();
  const std::string name = r["name"].cast<std::string>();
  const size_t rows = name == "shuffles" ? 4 : static_cast<size_t>(blocks);
  auto* out = static_cast<float*>(arena.output("out", rows * threads * sizeof(float), DType::f32));
  cuda_emulation::run_selftest(name, blocks, threads, r["width"].cast<int>(), out);
  return arena.results();
}

}  // namespace

PYBIND11_MODULE(cuda_emulated, m) {
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("group_norm_forward", &cuda_emulation::group_norm_forward);
  m.def("group_norm_backward", &cuda_emulation::group_norm_backward);
  m.def("lstm_step", &cuda_emulation::lstm_step);
  m.def("selftest", &selftest);
}
