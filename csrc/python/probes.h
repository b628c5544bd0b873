// What the machine can do at best: the two ceilings of the benchmark's roofline.
#pragma once

#include <cstddef>

namespace advdl_ops::python {

// Bytes per second of a copy of `bytes` bytes by `threads` threads, read and written bytes counted; the best of
// several repeats and of several kinds of loads and stores.
double copy_bandwidth(size_t bytes, int threads);

// fp32 FLOP per second of `threads` threads that do independent fused multiply-adds (2 each) in registers, at the
// widest vectors this CPU has.
double peak_flops(int threads);

}  // namespace advdl_ops::python
