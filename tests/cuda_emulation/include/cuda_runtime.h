// Stands in for CUDA's cuda_runtime.h when a .cu file is compiled for the host: the CUDA execution model on one
// CPU thread. Test code only. What a kernel here can use:
//
//   threadIdx, blockIdx, blockDim, gridDim, warpSize    dynamic shared memory (ADVDL_DYNAMIC_SHARED)
//   __syncthreads, __syncwarp, __shfl*_sync             integer atomics, __popc, __ldg, __stwb, rsqrtf
//   cudaLaunchKernelEx, cudaMemsetAsync, cudaFuncSetAttribute, cudaDeviceGetAttribute, ...
//
// Threads are fibers: each runs until it meets a barrier or a warp operation. Blocks run one after another, in
// the order of Settings. What the model cannot show: races inside a warp, memory ordering, time.
#pragma once

// The toolkit's own headers: vector types, cudaError_t, cudaLaunchConfig_t and the declarations of the runtime.
#include <cuda_runtime_api.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __restrict__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define ADVDL_DYNAMIC_SHARED(name) unsigned char* const name = ::cuda_emulation::shared_memory()

namespace cuda_emulation {

enum class Order {
  forward,
  reverse,
  shuffled
};  // of the blocks; reverse also runs the threads backwards

struct Settings {
  Order order = Order::forward;
  unsigned seed = 0;
  int shared_limit = 227 * 1024;  // what cudaDevAttrMaxSharedMemoryPerBlockOptin reports
  bool dry = false;               // launches are checked and recorded, nothing runs
};
Settings& settings();

struct Launch {
  bool is_kernel = true;  // or a memset
  unsigned grid = 0, block = 0;
  size_t shared = 0;
};
// Launches (and memsets) since the last clear.
void clear_launches();
size_t launch_count();
const Launch& launch_at(size_t index);

// Runs every thread of every block. Throws std::runtime_error where threads wait for each other for ever.
void run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body);
cudaError_t last_error();

unsigned char* shared_memory();
void sync_threads();
// All lanes of `mask` deposit `size` bytes and meet; returns the deposit of `source` (a lane of the same warp).
void exchange(unsigned mask, int source, const void* mine, void* theirs, size_t size);

}  // namespace cuda_emulation

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

inline void __syncthreads() { cuda_emulation::sync_threads(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  int nothing = 0, other;
  cuda_emulation::exchange(mask, static_cast<int>(threadIdx.x % 32), &nothing, &other,
                           sizeof other);
}

namespace cuda_emulation {
template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  T result;
  exchange(mask, source, &value, &result, sizeof result);
  return result;
}
inline int lane() { return static_cast<int>(threadIdx.x % 32); }
}  // namespace cuda_emulation

// `width` divides the warp into segments; a source outside the segment gives the own value, as on the device.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = cuda_emulation::lane();
  return cuda_emulation::shuffle(mask, value, lane / width * width + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset, int width = 32) {
  const int lane = cuda_emulation::lane(), source = lane ^ offset;
  return cuda_emulation::shuffle(mask, value, source / width > lane / width ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_emulation::lane(), source = lane + static_cast<int>(delta);
  return cuda_emulation::shuffle(mask, value, source / width != lane / width ? lane : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_emulation::lane(), source = lane - static_cast<int>(delta);
  return cuda_emulation::shuffle(mask, value, source < lane / width * width ? lane : source);
}

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
void __stwb(T* pointer, T value) {
  *pointer = value;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline double rsqrt(double value) { return 1.0 / std::sqrt(value); }
using std::sqrt;

// Fibers never run at the same time, so a plain read-modify-write is atomic.
template <class T>
T atomicAdd(T* address, T value) {
  static_assert(!std::is_floating_point_v<T>, "floating-point atomics are not deterministic");
  const T old = *address;
  *address = old + value;
  return old;
}
inline void __threadfence() {}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  const std::tuple<Params...> values(
      static_cast<Params>(args)...);  // by value, as a launch copies them
  cuda_emulation::run(*config, reinterpret_cast<const void*>(kernel),
                      [&] { std::apply(kernel, values); });
  return cuda_emulation::last_error();
}
