#include "dispatch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "parallel.h"

namespace advdl_ops {

namespace capability_default {
cpu::KernelTable batch_norm_act_kernels();
}
#if defined(__x86_64__)
namespace capability_avx2 {
cpu::KernelTable batch_norm_act_kernels();
}
namespace capability_avx512 {
cpu::KernelTable batch_norm_act_kernels();
}
#endif

namespace cpu {
namespace {

struct Capability {
  const char* name;
  bool (*supported)();
  KernelTable (*kernels)();
};

// Best first.
const Capability kCapabilities[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     capability_avx512::batch_norm_act_kernels},
    {"avx2",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     },
     capability_avx2::batch_norm_act_kernels},
#endif
    {"default", [] { return true; }, capability_default::batch_norm_act_kernels},
};

KernelTable choose() {
  const char* forced = std::getenv("ADVDL_OPS_CPU_CAPABILITY");
  if (forced != nullptr && *forced != '\0') {
    for (const auto& c : kCapabilities) {
      if (std::strcmp(c.name, forced) == 0 && c.supported()) return c.kernels();
    }
    std::fprintf(stderr,
                 "advdl_ops: ADVDL_OPS_CPU_CAPABILITY (%s) must be default, avx2 or avx512 and "
                 "supported by this CPU; it is ignored\n",
                 forced);
  }
  for (const auto& c : kCapabilities) {
    if (c.supported()) return c.kernels();
  }
  std::abort();  // not reached: `default` always is
}

KernelTable& table() {
  static KernelTable chosen = choose();
  return chosen;
}

void run_serially(int64_t begin, int64_t end, int64_t, RangeFunction function, void* context) {
  function(begin, end, context);
}

ParallelFor pool = run_serially;
int (*pool_threads)() = [] { return 1; };

}  // namespace

const char* capability() { return table().name; }

bool set_capability(const char* name) {
  for (const auto& c : kCapabilities) {
    if (std::strcmp(c.name, name) == 0 && c.supported()) {
      table() = c.kernels();
      return true;
    }
  }
  return false;
}

void set_parallel_for(ParallelFor parallel_for, int (*thread_count)()) {
  pool = parallel_for;
  pool_threads = thread_count;
}
void parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                  void* context) {
  pool(begin, end, grain, function, context);
}
int thread_count() { return pool_threads(); }

size_t batch_norm_act_forward_workspace(const BatchNormActForward& p) {
  return table().batch_norm_act_forward_workspace(p);
}
size_t batch_norm_act_backward_workspace(const BatchNormActBackward& p) {
  return table().batch_norm_act_backward_workspace(p);
}
void batch_norm_act_forward(const BatchNormActForward& p, void* workspace) {
  table().batch_norm_act_forward(p, workspace);
}
void batch_norm_act_backward(const BatchNormActBackward& p, void* workspace) {
  table().batch_norm_act_backward(p, workspace);
}

}  // namespace cpu
}  // namespace advdl_ops
