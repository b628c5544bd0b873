// The CPU kernels without torch, for their unit tests: pointers come in as integers (Tensor.data_ptr()).
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <functional>

namespace advdl_ops::python {

// Adds the submodule `_C.cpu`.
void bind_cpu_kernels(pybind11::module_& module);

// Runs kernel(workspace) on `threads` threads of its own, with a workspace of `bytes` bytes that holds garbage.
// Throws std::logic_error if the kernel wrote outside of it.
void run_kernel(size_t bytes, int threads, const std::function<void(void*)>& kernel);

inline const void* in(uintptr_t address) { return reinterpret_cast<const void*>(address); }
inline void* out(uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace advdl_ops::python
