// Kernels that test the emulation itself: what it must compute, and what it must report.
#include "selftest.h"

#include <stdexcept>

#include "../../csrc/cuda/launch.h"

namespace cuda_emulation {
namespace {

using advdl_ops::cuda::launch;
using advdl_ops::cuda::LaunchConfig;

// out[op][thread]: the value each shuffle gives when every thread holds its own number.
__global__ void shuffles(float* out, int width) {
  const int t = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const float mine = static_cast<float>(t);
  out[t] = __shfl_xor_sync(0xffffffffu, mine, 5, width);
  out[threads + t] = __shfl_down_sync(0xffffffffu, mine, 3, width);
  out[2 * threads + t] = __shfl_up_sync(0xffffffffu, mine, 3, width);
  out[3 * threads + t] = __shfl_sync(0xffffffffu, mine, 2, width);
}

// Reverses the block through shared memory; without the barrier half the threads read poison.
template <bool Barrier>
__global__ void reverse_block(float* out) {
  ADVDL_DYNAMIC_SHARED(memory);
  float* values = reinterpret_cast<float*>(memory);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if constexpr (Barrier) __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void divergent_shuffle(float* out) {
  out[threadIdx.x] = 0.0f;
  if (threadIdx.x != 7) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, out[threadIdx.x], 1);
}

__global__ void shared_past_the_end(float* out) {
  ADVDL_DYNAMIC_SHARED(memory);
  float* values = reinterpret_cast<float*>(memory);
  values[threadIdx.x + 1] = 1.0f;
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void global_write_past_the_end(float* out) { out[threadIdx.x + 1] = 1.0f; }

__global__ void global_read_past_the_end(float* out) {
  const float next = out[threadIdx.x + 1];
  out[threadIdx.x] = next;
}

__global__ void misaligned_vector(float* out) {
  *reinterpret_cast<float4*>(out + 1) = float4{0.0f, 0.0f, 0.0f, 0.0f};
}

// Every block adds to one counter; each notes the turn it had.
__global__ void turns(int* counter, float* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<float>(atomicAdd(counter, 1));
}

}  // namespace

void run_selftest(const std::string& name, int blocks, int threads, int width, float* out) {
  LaunchConfig config{blocks, threads, static_cast<size_t>(threads) * sizeof(float), nullptr};
  if (name == "shuffles") return launch("shuffles", &shuffles, config, out, width);
  if (name == "reverse_block") return launch("reverse_block", &reverse_block<true>, config, out);
  if (name == "missing_barrier")
    return launch("missing_barrier", &reverse_block<false>, config, out);
  if (name == "divergent_barrier")
    return launch("divergent_barrier", &divergent_barrier, config, out);
  if (name == "divergent_shuffle")
    return launch("divergent_shuffle", &divergent_shuffle, config, out);
  if (name == "shared_past_the_end") return launch("shared", &shared_past_the_end, config, out);
  if (name == "global_write_past_the_end")
    return launch("global_write", &global_write_past_the_end, config, out);
  if (name == "global_read_past_the_end")
    return launch("global_read", &global_read_past_the_end, config, out);
  if (name == "misaligned_vector") return launch("misaligned", &misaligned_vector, config, out);
  if (name == "too_much_shared") {
    config.shared = 300 * 1024;
    return launch("too_much_shared", &reverse_block<true>, config, out);
  }
  if (name == "turns") {
    int counter = 0;
    return launch("turns", &turns, config, &counter, out);
  }
  throw std::runtime_error("no selftest of that name: " + name);
}

}  // namespace cuda_emulation
