// torch.ops.advdl_ops.checksum on CPU: checks and registration.

#include "../common/checksum.h"

#include "conv2d.h"

namespace advdl_ops {
namespace {

int64_t checksum(Tensor x) {
  check(x.is_contiguous() || is_channels_last(x), "checksum",
        "x must be contiguous or in channels_last");
  return static_cast<int64_t>(cpu::checksum(data(x), x.numel() * x.element_size()));
}

}  // namespace
}  // namespace advdl_ops

STABLE_TORCH_LIBRARY_IMPL(advdl_ops, CPU, m) {
  m.impl("checksum", TORCH_BOX(&advdl_ops::checksum));
}
