// What the bindings share: how a tensor is described to the kernels, checks of arguments, allocation and launches. The
// bindings are the only code that uses torch, and only through its stable ABI.
//
// The bindings of batch_norm_act, group_norm and lstm are compiled twice: for the CPU library, and with USE_CUDA for
// the CUDA library. The others belong to one library only.
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
// For a gradient that may be not wanted; its tensor is then empty.
inline void* data_or_null(const Tensor& t, bool wanted) { return wanted ? t.data_ptr() : nullptr; }

// An uninitialised tensor on the device of `like`. It calls the C shim directly: the dispatcher would cost more than
// the allocation.
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

// [2, size], contiguous: two vectors in one tensor. Each tensor that an operator returns costs as much as a small
// kernel.
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

// Whether `t` [N, C, S...] is dense with channels innermost.
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

// `t` itself if kernels can read it ([N, C, S] or [N, S, C]), else a contiguous copy.
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

inline int64_t positions(const Tensor& x) {
  int64_t count = 1;
  for (int64_t i = 2; i < x.dim(); ++i) count *= x.size(i);
  return count;
}

// The layout of a dense x. With one position or one channel, x has both layouts; the one with the longer innermost rows
// is chosen.
inline Layout layout_of(const Tensor& x) {
  return is_channels_last(x) && (x.size(1) > 1 || !x.is_contiguous()) ? Layout::channels_last
                                                                      : Layout::channels_first;
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (x[i] != y[i]) return false;
  }
  return true;
}

inline bool same_kind(const Tensor& a, const Tensor& b) {
  return same_sizes(a, b) && a.scalar_type() == b.scalar_type() && a.device() == b.device();
}

// Whether a [C] tensor may have its dtype: that of x, or fp32 with a half-precision x.
inline bool goes_with(const OptionalTensor& t, ScalarType x) {
  if (!t.has_value() || t->scalar_type() == x) return true;
  return (x == ScalarType::Half || x == ScalarType::BFloat16) &&
         t->scalar_type() == ScalarType::Float;
}

inline bool is_per_channel(const OptionalTensor& t, const Tensor& x) {
  return !t.has_value() || (t->dim() == 1 && t->size(0) == x.size(1) && t->device() == x.device());
}

inline void check_affine(const char* function, const Tensor& x, const OptionalTensor& weight,
                         const OptionalTensor& bias, int64_t act) {
  check(goes_with(weight, x.scalar_type()) && goes_with(bias, x.scalar_type()), function,
        "weight and bias must be of x's dtype, or float32 beside a half x");
  check(is_per_channel(weight, x), function,
        "weight must have one value per channel of x, on its device");
  check(is_per_channel(bias, x), function,
        "bias must have one value per channel of x, on its device");
  check(!weight.has_value() || !bias.has_value() || weight->scalar_type() == bias->scalar_type(),
        function, "weight and bias must have the same dtype");
  check(act >= 0 && act < kActivationCount, function, "unknown activation code");
}

inline void check_residual(const char* function, const OptionalTensor& residual, const Tensor& x) {
  check(!residual.has_value() || same_kind(*residual, x), function,
        "residual must have the shape, dtype and device of x");
}

inline void check_backward(const char* function, const Tensor& dout, const Tensor& x,
                           const OptionalTensor& saved, int64_t act, int64_t z_source) {
  check(same_kind(dout, x), function, "dout must have the shape, dtype and device of x");
  check(!saved.has_value() || same_kind(*saved, x), function,
        "saved must have the shape, dtype and device of x");
  check(z_source >= 0 && z_source <= 2, function, "unknown z_source");
  const auto source = static_cast<ZSource>(z_source);
  check((source != ZSource::input) == saved.has_value(), function,
        "saved must be given exactly where z_source names it");
  check(source != ZSource::output || static_cast<Activation>(act) == Activation::relu, function,
        "only relu's derivative can be read off its output");
}

// The workspace of a call, and on CUDA the device and stream on which it runs.
#if defined(USE_CUDA)
class Launch {
 public:
  // workspace() runs after the device is set, as the bytes may depend on the device.
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
  // The workspace of small inputs: an allocation would cost as much as the kernel.
  alignas(64) unsigned char small_[16384];
  OptionalTensor large_;
};
#endif

}  // namespace advdl_ops
