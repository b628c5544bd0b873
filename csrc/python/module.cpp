// `_C`: everything that is not a tensor operator. It is built for one Python version, and therefore optional at run
// time.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "build_info.h"
#include "cpu_kernels.h"
#include "probes.h"

namespace py = pybind11;

namespace advdl_ops::python {
namespace {

py::list words(const std::string& text) { return py::str(text).attr("split")(); }

py::dict build_info() {
  py::dict info;
  info["version"] = ADVDL_VERSION;
  info["commit"] = ADVDL_COMMIT;
  info["compiler"] = ADVDL_COMPILER;
  info["flags"] = ADVDL_FLAGS;
  info["cpu_capabilities"] = words(ADVDL_CPU_CAPABILITIES);
  info["cuda"] = ADVDL_CUDA_VERSION;
  info["cuda_architectures"] = words(ADVDL_CUDA_ARCHITECTURES);
  info["torch"] = ADVDL_TORCH_VERSION;
  info["python"] = ADVDL_PYTHON_VERSION;
  return info;
}

constexpr int64_t kMinBytes = 4096, kMaxBytes = int64_t{1} << 40;
constexpr int kMaxThreads = 1024;

void check(const char* function, const char* argument, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return;
  throw py::value_error(std::string(function) + ": " + argument + " (" + std::to_string(value) +
                        ") must lie in " + std::to_string(low) + " .. " + std::to_string(high));
}

double checked_copy_bandwidth(int64_t bytes, int64_t threads) {
  check("copy_bandwidth", "bytes", bytes, kMinBytes, kMaxBytes);
  check("copy_bandwidth", "threads", threads, 1, kMaxThreads);
  py::gil_scoped_release release;
  return copy_bandwidth(static_cast<size_t>(bytes), static_cast<int>(threads));
}

double checked_peak_flops(int64_t threads) {
  check("peak_flops", "threads", threads, 1, kMaxThreads);
  py::gil_scoped_release release;
  return peak_flops(static_cast<int>(threads));
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build information and the roofline probes of the benchmark.";
  module.def("build_info", &build_info,
             "How the native libraries were built: version, commit, compiler, flags, "
             "cpu_capabilities, cuda (empty: "
             "no CUDA library), cuda_architectures, torch, python.");
  module.def("copy_bandwidth", &checked_copy_bandwidth, py::arg("bytes"), py::arg("threads"),
             "Bytes per second, read and written counted, of a copy of `bytes` bytes by `threads` "
             "threads.");
  module.def("peak_flops", &checked_peak_flops, py::arg("threads"),
             "fp32 FLOP per second of fused multiply-adds in registers by `threads` threads.");
  bind_cpu_kernels(module);
}

}  // namespace
}  // namespace advdl_ops::python
