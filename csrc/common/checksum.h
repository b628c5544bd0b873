// A checksum of a tensor's bytes: by it a layer sees that a weight was changed behind PyTorch's back.
//
// Every change of a single 4-byte word changes it, any other change but for one chance in 2^32. It depends on the order
// of the bytes, not on the number of threads. It holds for one process: each capability of the CPU has its own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace advdl_ops::cpu {
uint64_t checksum(const void* bytes, int64_t count);
}  // namespace advdl_ops::cpu
