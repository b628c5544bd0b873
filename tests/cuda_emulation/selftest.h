#pragma once

#include <string>

namespace cuda_emulation {

// Runs one kernel of selftest.cu; `out` holds blocks * threads floats (shuffles: four times as many).
void run_selftest(const std::string& name, int blocks, int threads, int width, float* out);

}  // namespace cuda_emulation
