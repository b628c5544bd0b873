#pragma once

#include <pybind11/pybind11.h>

namespace cuda_emulation {

pybind11::dict group_norm_forward(const pybind11::dict& request);
pybind11::dict group_norm_backward(const pybind11::dict& request);

}  // namespace cuda_emulation
