#include "dispatch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace advdl_ops {

// Each family adds its kernels to the table of each capability. A new family needs its lines here.
#define ADVDL_DECLARE_KERNELS(capability)                     \
  namespace capability {                                      \
  void add_batch_norm_act(cpu::KernelTable& table);           \
  void add_checksum(cpu::KernelTable& table);                 \
  void add_convert_layout(cpu::KernelTable& table);           \
  void add_dense_conv2d(cpu::KernelTable& table);             \
  void add_depthwise_conv2d(cpu::KernelTable& table);         \
  void add_depthwise_conv2d_last(cpu::KernelTable& table);    \
  void add_group_norm(cpu::KernelTable& table);               \
  void add_layer_norm_2d(cpu::KernelTable& table);            \
  void add_lstm(cpu::KernelTable& table);                     \
  void add_lstm_backward(cpu::KernelTable& table);            \
  void add_winograd_conv2d(cpu::KernelTable& table);          \
  void add_winograd_conv2d_backward(cpu::KernelTable& table); \
  static cpu::KernelTable kernels(const char* name) {         \
    cpu::KernelTable table{};                                 \
    table.name = name;                                        \
    add_batch_norm_act(table);                                \
    add_checksum(table);                                      \
    add_convert_layout(table);                                \
    add_dense_conv2d(table);                                  \
    add_depthwise_conv2d(table);                              \
    add_depthwise_conv2d_last(table);                         \
    add_group_norm(table);                                    \
    add_layer_norm_2d(table);                                 \
    add_lstm(table);                                          \
    add_lstm_backward(table);                                 \
    add_winograd_conv2d(table);                               \
    add_winograd_conv2d_backward(table);                      \
    return table;                                             \
  }                                                           \
  }
ADVDL_DECLARE_KERNELS(capability_default)
#if defined(__x86_64__)
ADVDL_DECLARE_KERNELS(capability_avx2)
ADVDL_DECLARE_KERNELS(capability_avx512)
#endif
#undef ADVDL_DECLARE_KERNELS

namespace cpu {
namespace {

struct Capability {
  const char* name;
  bool (*supported)();
  KernelTable (*kernels)(const char* name);
};

// Best first.
const Capability kCapabilities[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     capability_avx512::kernels},
    {"avx2",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     },
     capability_avx2::kernels},
#endif
    {"default", [] { return true; }, capability_default::kernels},
};

KernelTable choose() {
  const char* forced = std::getenv("ADVDL_OPS_CPU_CAPABILITY");
  if (forced != nullptr && *forced != '\0') {
    for (const auto& c : kCapabilities) {
      if (std::strcmp(c.name, forced) == 0 && c.supported()) return c.kernels(c.name);
    }
    std::fprintf(stderr,
                 "advdl_ops: ADVDL_OPS_CPU_CAPABILITY (%s) must be default, avx2 or avx512 and "
                 "supported by this CPU; it is ignored\n",
                 forced);
  }
  for (const auto& c : kCapabilities) {
    if (c.supported()) return c.kernels(c.name);
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
      table() = c.kernels(c.name);
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

#define ADVDL_DEFINE_FAMILY(family, Params)                            \
  size_t family##_forward_workspace(const Params##Forward& p) {        \
    return table().family.forward_workspace(p);                        \
  }                                                                    \
  size_t family##_backward_workspace(const Params##Backward& p) {      \
    return table().family.backward_workspace(p);                       \
  }                                                                    \
  void family##_forward(const Params##Forward& p, void* workspace) {   \
    table().family.forward(p, workspace);                              \
  }                                                                    \
  void family##_backward(const Params##Backward& p, void* workspace) { \
    table().family.backward(p, workspace);                             \
  }
ADVDL_DEFINE_FAMILY(batch_norm_act, BatchNormAct)
ADVDL_DEFINE_FAMILY(dense_conv2d, DenseConv2d)
ADVDL_DEFINE_FAMILY(depthwise_conv2d, DepthwiseConv2d)
ADVDL_DEFINE_FAMILY(depthwise_conv2d_last, DepthwiseConv2d)
ADVDL_DEFINE_FAMILY(group_norm, GroupNorm)
ADVDL_DEFINE_FAMILY(layer_norm_2d, GroupNorm)
ADVDL_DEFINE_FAMILY(lstm, Lstm)
ADVDL_DEFINE_FAMILY(winograd_conv2d, WinogradConv2d)
#undef ADVDL_DEFINE_FAMILY

uint64_t checksum(const void* bytes, int64_t count) { return table().checksum(bytes, count); }
void convert_layout(const ConvertLayout& p) { table().convert_layout(p); }
int64_t winograd_packed_size(const WinogradFilters& f) { return table().winograd_packed_size(f); }
void winograd_pack(const WinogradFilters& f, const WinogradWeight& w, float* packed) {
  table().winograd_pack(f, w, packed);
}

}  // namespace cpu
}  // namespace advdl_ops
