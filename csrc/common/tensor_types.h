// Element types, layouts and activations that kernels know, independent of torch.
#pragma once

#include <cstdint>

// Marks functions that CPU and CUDA kernels share. They are always inlined: otherwise the linker could merge a copy
// compiled for AVX-512 with those for other CPUs.
#if defined(__CUDACC__)
#define ADVDL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ADVDL_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace advdl_ops {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

ADVDL_HOST_DEVICE constexpr int element_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// "acc": the type of statistics, sums and arithmetic for elements of type T.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccOf<T>::type;

// The order of [N, C, spatial...] in memory. S is the product of the spatial sizes.
enum class Layout : int {
  channels_first = 0,  // [N, C, S]
  channels_last = 1,   // [N, S, C]
};

// Values are part of the operator schema (advdl_ops/activation.py): append only.
enum class Activation : int {
  identity = 0,
  relu = 1,
  leaky_relu = 2,  // param: negative_slope
  elu = 3,         // param: alpha
  silu = 4,
  gelu = 5,
  gelu_tanh = 6,
  sigmoid = 7,
  tanh = 8,
  hardswish = 9,
  relu6 = 10,
};
inline constexpr int kActivationCount = 11;

// How backward gets act'(z) of the pre-activation z. norm(x) is recomputed from x and the statistics.
enum class ZSource : int {
  input = 0,     // z = norm(x); `saved` is null
  residual = 1,  // z = norm(x) + saved
  output = 2,    // act'(z) from saved = act(z); relu only, as out > 0 exactly where z > 0
};

}  // namespace advdl_ops
