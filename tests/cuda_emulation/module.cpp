// Python's way to the emulated kernels: every tensor arrives as bytes and leaves as bytes. Each is copied to a
// heap block of its exact size, so that AddressSanitizer sees the first access outside; outputs and workspace
// start as NaN. worker.py calls this in a process of its own. With "dry" in the request only the launches and the
// size of the workspace come back: any shape costs nothing, and a tensor is named instead of given.
#include "../../csrc/common/batch_norm_act.h"
#include "arena.h"
#include "group_norm.h"
#include "lstm.h"
#include "selftest.h"

namespace {

using namespace advdl_ops;
using namespace cuda_emulation;

BatchNormActShape get_shape(const py::dict& r) {
  BatchNormActShape s;
  s.n = r["n"].cast<int64_t>();
  s.c = r["c"].cast<int64_t>();
  s.s = r["s"].cast<int64_t>();
  s.layout = get_enum<Layout>(r, "layout");
  s.dtype = get_enum<DType>(r, "dtype");
  s.weight_dtype = get_enum<DType>(r, "weight_dtype");
  s.running_dtype = get_enum<DType>(r, "running_dtype");
  return s;
}

DType acc_dtype(const BatchNormActShape& s) {
  return s.dtype == DType::f64 ? DType::f64 : DType::f32;
}

py::dict forward(const py::dict& r) {
  apply_settings(r);
  Arena arena(r);
  BatchNormActForward p;
  p.shape = get_shape(r);
  const auto& s = p.shape;
  const size_t all = static_cast<size_t>(s.n * s.c * s.s) * element_bytes(s.dtype);
  const size_t channels = static_cast<size_t>(s.c), acc = channels * element_bytes(acc_dtype(s));
  const size_t weights = channels * element_bytes(s.weight_dtype);
  const size_t running = channels * element_bytes(s.running_dtype);
  p.training = r["training"].cast<bool>();
  p.momentum = r["momentum"].cast<double>();
  p.eps = r["eps"].cast<double>();
  p.act = get_enum<Activation>(r, "act");
  p.act_param = r["act_param"].cast<double>();
  p.x = arena.input("x", all, s.dtype);
  p.residual = arena.input("residual", all, s.dtype);
  p.weight = arena.input("weight", weights, s.weight_dtype);
  p.bias = arena.input("bias", weights, s.weight_dtype);
  p.running_mean = arena.input("running_mean", running, s.running_dtype);
  p.running_var = arena.input("running_var", running, s.running_dtype);
  p.out = arena.output("out", all, s.dtype);
  p.mean = arena.output("mean", acc, acc_dtype(s));
  p.rstd = arena.output("rstd", acc, acc_dtype(s));
  if (p.training && p.running_mean != nullptr) {
    const auto output = [&](const char* name, const void* old) {
      return arena.wants("in_place") ? arena.output_at(name, const_cast<void*>(old), running)
                                     : arena.output(name, running, s.running_dtype);
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
  p.shape = get_shape(r);
  const auto& s = p.shape;
  const size_t all = static_cast<size_t>(s.n * s.c * s.s) * element_bytes(s.dtype);
  const size_t channels = static_cast<size_t>(s.c), acc = channels * element_bytes(acc_dtype(s));
  const size_t weights = channels * element_bytes(s.weight_dtype);
  p.training = r["training"].cast<bool>();
  p.act = get_enum<Activation>(r, "act");
  p.act_param = r["act_param"].cast<double>();
  p.z_source = get_enum<ZSource>(r, "z_source");
  p.dout = arena.input("dout", all, s.dtype);
  p.x = arena.input("x", all, s.dtype);
  p.saved = arena.input("saved", all, s.dtype);
  p.weight = arena.input("weight", weights, s.weight_dtype);
  p.bias = arena.input("bias", weights, s.weight_dtype);
  p.mean = arena.input("mean", acc, acc_dtype(s));
  p.rstd = arena.input("rstd", acc, acc_dtype(s));
  if (arena.wants("want_dx")) p.dx = arena.output("dx", all, s.dtype);
  if (arena.wants("want_dresidual")) p.dresidual = arena.output("dresidual", all, s.dtype);
  p.dweight = arena.output("dweight", acc, acc_dtype(s));
  p.dbias = arena.output("dbias", acc, acc_dtype(s));
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
