// One axis of a convolution.
#pragma once

#include <cstdint>

namespace advdl_ops {

struct Conv2dAxis {
  int64_t in = 0, out = 0;  // sizes of the image before and after
  int64_t kernel = 1, stride = 1, padding = 0, dilation = 1;

  int64_t reach() const { return (kernel - 1) * dilation; }
};

}  // namespace advdl_ops
