// torch tensors as the kernels see them, and where kernels run. The only code besides the bindings that knows torch, and
// through its stable ABI alone.
//
// A binding is compiled twice: for the CPU library, and with USE_CUDA for the CUDA library.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "tensor_types.h"

#if defined(USE_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace advdl_ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

#if defined(USE_CUDA)
namespace device = cuda;
#define ADVDL_DISPATCH_KEY CUDA
#else
namespace device = cpu;
#define ADVDL_DISPATCH_KEY CPU
#endif

inline DType dtype_of(const Tensor& t, const char* function) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      throw std::runtime_error(std::string(function) +
                               ": dtype must be float32, float64, float16 or bfloat16");
  }
}

inline void check(bool condition, const char* function, const char* message) {
  if (!condition) throw std::runtime_error(std::string(function) + ": " + message);
}

inline void* data(const Tensor& t) { return t.data_ptr(); }
inline void* data(const OptionalTensor& t) { return t.has_value() ? t->data_ptr() : nullptr; }
// Of a tensor that stands for "not wanted" where it is empty.
inline void* data_or_null(const Tensor& t, bool wanted) { return wanted ? t.data_ptr() : nullptr; }

// Uninitialised, of the device of `like`. Straight through the C shim: a call of the dispatcher costs more than the allocation.
inline Tensor allocate(const Tensor& like, const int64_t* sizes, const int64_t* strides,
                       int64_t rank, ScalarType dtype) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      rank, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}
inline Tensor allocate_like(const Tensor& like) {
  return allocate(like, like.sizes().data(), like.strides().data(), like.dim(), like.scalar_type());
}
inline Tensor allocate_vector(const Tensor& like, int64_t size, ScalarType dtype) {
  const int64_t stride = 1;
  return allocate(like, &size, &stride, 1, dtype);
}

inline Tensor allocate_matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns > 0 ? columns : 1, 1};
  return allocate(like, sizes, strides, 2, dtype);
}

// [2, size], contiguous: two vectors in one tensor, as each tensor that an operator returns costs as much as a small kernel.
inline Tensor allocate_pair(const Tensor& like, int64_t size, ScalarType dtype) {
  return allocate_matrix(like, 2, size, dtype);
}
inline void* second_of_pair(const Tensor& pair) {
  return static_cast<char*>(pair.data_ptr()) + pair.size(1) * pair.element_size();
}

// The dtype of statistics and arithmetic for tensors of `dtype`.
inline ScalarType acc_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Whether `t` is [N, C, S...] dense with channels innermost.
inline bool is_channels_last(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t rank = t.dim();
  if (rank < 2) return false;
  int64_t expected = 1;
  if (sizes[1] != 1 && strides[1] != expected) return false;
  expected = sizes[1];
  for (int64_t i = rank - 1; i >= 2; --i) {
    if (sizes[i] != 1 && strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return sizes[0] == 1 || strides[0] == expected;
}

// `t` itself where kernels can read it ([N, C, S] or [N, S, C]), else a contiguous copy.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() || is_channels_last(t) ? t : torch::stable::contiguous(t);
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (sizes[i] != 1 && x[i] != y[i]) return false;
  }
  return true;
}

// `t` in the memory format of `like` (same sizes): itself, or a copy.
inline Tensor in_format_of(const Tensor& t, const Tensor& like) {
  if (same_strides(t, like)) return t;
  Tensor copy =
      allocate(like, like.sizes().data(), like.strides().data(), like.dim(), t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}
inline OptionalTensor in_format_of(const OptionalTensor& t, const Tensor& like) {
  return t.has_value() ? OptionalTensor(in_format_of(*t, like)) : std::nullopt;
}

inline OptionalTensor contiguous(const OptionalTensor& t) {
  if (!t.has_value() || t->is_contiguous()) return t;
  return torch::stable::contiguous(*t);
}

// Scratch memory of a call, and on CUDA the device and stream that it runs on.
#if defined(USE_CUDA)
class Launch {
 public:
  // `workspace` is asked behind the guard: its answer may depend on the device.
  template <class Workspace>
  Launch(const Tensor& like, Workspace workspace)
      : guard_(like.get_device_index()),
        workspace_(allocate_vector(like, static_cast<int64_t>(workspace()), ScalarType::Byte)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream_));
  }
  template <class Kernel, class Params>
  void run(Kernel kernel, const Params& params) {
    kernel(params, workspace_.data_ptr(), stream_);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
  Tensor workspace_;
};
#else
class Launch {
 public:
  template <class Workspace>
  Launch(const Tensor& like, Workspace workspace) {
    const size_t workspace_bytes = workspace();
    if (workspace_bytes <= sizeof(small_)) return;
    large_ = allocate_vector(like, static_cast<int64_t>(workspace_bytes), ScalarType::Byte);
  }
  template <class Kernel, class Params>
  void run(Kernel kernel, const Params& params) {
    kernel(params, large_.has_value() ? large_->data_ptr() : small_);
  }

 private:
  // Small inputs need little: the allocation would cost as much as the kernel.
  alignas(64) unsigned char small_[16384];
  OptionalTensor large_;
};
#endif

}  // namespace advdl_ops
