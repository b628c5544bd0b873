#include "cpu_kernels.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace py = pybind11;

namespace advdl_ops::python {
namespace {

int thread_limit = 1;

// As torch's pool does it: equal parts, one thread each, none shorter than `grain`.
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

}  // namespace

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

void bind_batch_norm_act(py::module_& module);
void bind_group_norm(py::module_& module);

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
