#pragma once

#include <pybind11/pybind11.h>

namespace cuda_emulation {

pybind11::dict layer_norm_2d_forward(const pybind11::dict& request);
pybind11::dict layer_norm_2d_backward(const pybind11::dict& request);

}  // namespace cuda_emulation
