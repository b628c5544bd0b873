// Gives the CPU kernels torch's thread pool. A second pool would compete with it for the cores and halve the speed of
// both.
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include "../cpu/dispatch.h"

namespace advdl_ops::cpu {
namespace {

void torch_pool(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, function, context));
}

int torch_threads() {
  uint32_t count = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return static_cast<int>(count);
}

[[maybe_unused]] const bool registered = [] {
  set_parallel_for(torch_pool, torch_threads);
  return true;
}();

}  // namespace
}  // namespace advdl_ops::cpu
