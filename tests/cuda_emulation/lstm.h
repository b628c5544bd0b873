#pragma once

#include <pybind11/pybind11.h>

namespace cuda_emulation {

pybind11::dict lstm_step(const pybind11::dict& request);

}  // namespace cuda_emulation
