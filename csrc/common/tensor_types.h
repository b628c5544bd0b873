// Element types and layouts that kernels know, independent of torch.
#pragma once

#include <cstdint>

namespace advdl_ops {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

// How [N, C, spatial...] lies in memory, with S the product of the spatial sizes.
enum class Layout : int {
  channels_first = 0,  // [N, C, S]
  channels_last = 1,   // [N, S, C]
};

}  // namespace advdl_ops
