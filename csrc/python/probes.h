// The two ceilings of the benchmarks' roofline: memory bandwidth and peak FLOP rate.
#pragma once

#include <cstddef>

namespace advdl_ops::python {

// Bytes per second (read plus written) when `threads` threads copy `bytes` bytes: the best of several repeats and of
// several kinds of loads and stores.
double copy_bandwidth(size_t bytes, int threads);

// fp32 FLOP per second of `threads` threads that do independent fused multiply-adds (2 FLOP each) in registers, with
// the best vector width of this CPU.
double peak_flops(int threads);

}  // namespace advdl_ops::python
