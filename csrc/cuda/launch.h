// The only way to start a kernel. The same source compiles with nvcc and with the host emulation in
// tests/cuda_emulation/, which has its own cuda_runtime.h. So there is no `<<<>>>` and no static shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

// Declares `name` as this block's dynamic shared memory (unsigned char, 16-byte aligned).
#ifndef ADVDL_DYNAMIC_SHARED
#define ADVDL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace advdl_ops::cuda {

// Grids are sized for this many multiprocessors (H100, H200) on every GPU, so that the split of a sum, and with it
// the result, depends on the shape only.
inline constexpr int64_t kMultiprocessors = 132;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t power_of_two_above(int64_t value) {
  int64_t power = 1;
  while (power < value) power *= 2;
  return power;
}

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)
      cudaGetLastError();  // clears the error, which is reported here and not again in a later call
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// The most dynamic shared memory of a block on the current device, in bytes.
inline size_t shared_memory_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return static_cast<size_t>(bytes);
}

struct LaunchConfig {
  int64_t grid = 1;        // blocks
  int block = 1;           // threads, a multiple of 32
  size_t shared = 0;       // bytes of dynamic shared memory
  void* stream = nullptr;  // cudaStream_t
};

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), const LaunchConfig& config,
            const Args&... args) {
  constexpr size_t kWithoutOptIn = 48 * 1024;
  if (config.grid < 1 || config.grid > 0x7fffffff)
    throw std::runtime_error(std::string(name) + ": grid of " + std::to_string(config.grid) +
                             " blocks");
  if (config.shared > kWithoutOptIn)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(config.shared)),
          name);
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = dim3(static_cast<unsigned>(config.grid));
  launch_config.blockDim = dim3(static_cast<unsigned>(config.block));
  launch_config.dynamicSmemBytes = config.shared;
  launch_config.stream = static_cast<cudaStream_t>(config.stream);
  check(cudaLaunchKernelEx(&launch_config, kernel, args...), name);
}

}  // namespace advdl_ops::cuda
