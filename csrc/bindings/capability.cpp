// The name of the CPU kernels' capability, for Python without `_C` (advdl_ops/_library.py).
#include "../cpu/dispatch.h"

extern "C" __attribute__((visibility("default"))) const char* advdl_ops_cpu_capability() {
  return advdl_ops::cpu::capability();
}
