// Packs of V consecutive elements: one access of up to 16 bytes, and conversion to and from the accumulation type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../common/activation.h"
#include "../common/tensor_types.h"

namespace advdl_ops::cuda {

inline constexpr int kVectorBytes = 16;

ADVDL_HOST_DEVICE float to_acc(float v) { return v; }
ADVDL_HOST_DEVICE double to_acc(double v) { return v; }
ADVDL_HOST_DEVICE float to_acc(__half v) { return __half2float(v); }
ADVDL_HOST_DEVICE float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }

ADVDL_HOST_DEVICE void from_acc(float v, float& out) { out = v; }
ADVDL_HOST_DEVICE void from_acc(double v, double& out) { out = v; }
ADVDL_HOST_DEVICE void from_acc(float v, __half& out) { out = __float2half_rn(v); }
ADVDL_HOST_DEVICE void from_acc(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

// Converts two values at once, which is one instruction for the 16-bit types.
template <class T, class A>
ADVDL_HOST_DEVICE void from_acc2(A a, A b, T& first, T& second) {
  from_acc(a, first);
  from_acc(b, second);
}
ADVDL_HOST_DEVICE void from_acc2(float a, float b, __half& first, __half& second) {
  const __half2 pair = __floats2half2_rn(a, b);
  first = pair.x;
  second = pair.y;
}
ADVDL_HOST_DEVICE void from_acc2(float a, float b, __nv_bfloat16& first, __nv_bfloat16& second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  first = pair.x;
  second = pair.y;
}

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <class T, int V, class A>
ADVDL_HOST_DEVICE Pack<T, V> make_pack(const A (&values)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int j = 0; j + 1 < V; j += 2) from_acc2(values[j], values[j + 1], pack.v[j], pack.v[j + 1]);
  if constexpr (V % 2 != 0) from_acc(values[V - 1], pack.v[V - 1]);
  return pack;
}

template <int V>
inline constexpr unsigned kFullMask = (1u << V) - 1u;

// The pack at element offset `at`. `mask` has the wanted lanes; the others are arbitrary. A partly wanted pack
// is read whole (`base` is aligned to packs), except past the tensor's end. `Whole`: all lanes are wanted or none.
template <class T, int V, bool Whole>
__device__ __forceinline__ Pack<T, V> load_pack(const T* base, int64_t at, unsigned mask,
                                                int64_t size) {
  Pack<T, V> pack{};
  if (mask == 0) return pack;
  if (Whole || V == 1 || at + V <= size) {
    pack = *reinterpret_cast<const Pack<T, V>*>(base + at);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (mask >> j & 1u) pack.v[j] = base[at + j];
  }
  return pack;
}

// Writes the lanes of `mask` and nothing else.
template <bool Whole, class T, int V>
__device__ __forceinline__ void store_pack(T* base, int64_t at, unsigned mask,
                                           const Pack<T, V>& pack) {
  if (Whole ? mask != 0 : mask == kFullMask<V>) {
    if constexpr (sizeof(pack) == sizeof(uint4)) {
      // An intrinsic, because the compiler would split a plain store into lanes, to share them with the branch below.
      uint4 bits;
      memcpy(&bits, &pack, sizeof bits);
      __stwb(reinterpret_cast<uint4*>(base + at), bits);
    } else {
      *reinterpret_cast<Pack<T, V>*>(base + at) = pack;
    }
  } else if (!Whole) {
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (mask >> j & 1u) base[at + j] = pack.v[j];
  }
}

// Whether packs of 16 bytes can be used on all of these (null counts as aligned).
template <class... Pointers>
bool vector_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % kVectorBytes == 0) && ...);
}

// Element `index` of a per-channel parameter whose type is known at run time, or `otherwise` if it is null.
template <class A>
__device__ __forceinline__ A load_param(const void* pointer, DType dtype, int64_t index,
                                        A otherwise) {
  if (pointer == nullptr) return otherwise;
  switch (dtype) {
    case DType::f64:
      return static_cast<A>(static_cast<const double*>(pointer)[index]);
    case DType::f16:
      return static_cast<A>(to_acc(static_cast<const __half*>(pointer)[index]));
    case DType::bf16:
      return static_cast<A>(to_acc(static_cast<const __nv_bfloat16*>(pointer)[index]));
    default:
      return static_cast<A>(static_cast<const float*>(pointer)[index]);
  }
}

template <class A>
__device__ __forceinline__ void store_param(void* pointer, DType dtype, int64_t index, A value) {
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(pointer)[index] = static_cast<double>(value);
      break;
    case DType::f16:
      from_acc(static_cast<float>(value), static_cast<__half*>(pointer)[index]);
      break;
    case DType::bf16:
      from_acc(static_cast<float>(value), static_cast<__nv_bfloat16*>(pointer)[index]);
      break;
    default:
      static_cast<float*>(pointer)[index] = static_cast<float>(value);
  }
}

}  // namespace advdl_ops::cuda
