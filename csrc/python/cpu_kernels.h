// The CPU kernels without torch, for their unit tests. Pointers are passed as integers (Tensor.data_ptr()), 0 for null.
// The headers of csrc/common document the arguments.
#pragma once

#include <pybind11/pybind11.h>

namespace advdl_ops::python {

// Adds the submodule `_C.cpu`.
void bind_cpu_kernels(pybind11::module_& module);

}  // namespace advdl_ops::python
