// Dense convolution in channels_last with an epilogue, and its gradients. Each is a matrix product over gathered
// pixels.
//
// csrc/cpu/dense_conv2d.cpp implements these functions; csrc/bindings/dense_conv2d.cpp checks, allocates and fills the
// structs. On CUDA, cuDNN and Triton compute this family (advdl_ops/_conv/cuda.py). No pointer aliases another one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv2d_axis.h"
#include "tensor_types.h"

namespace advdl_ops {

struct DenseConv2dShape {
  int64_t n = 0, c_in = 0, c_out = 0;
  Conv2dAxis h, w;
  DType dtype = DType::f32;  // of every tensor: f32 or f64
  Layout weight_layout =
      Layout::channels_first;  // of the weight and its gradient; images are channels_last

  int64_t taps() const { return h.kernel * w.kernel; }
};

// out[n, i, j, o] = act(sum over a, b, c of x[n, i * stride + a * dilation - padding, j ..., c] * weight[o, a, b, c]
//                       + shift[o] + residual[n, i, j, o]), with x = 0 outside the image.
struct DenseConv2dForward {
  DenseConv2dShape shape;
  Activation act = Activation::identity;
  double act_param = 0;
  const void* x = nullptr;         // [N, H, W, C_in]
  const void* weight = nullptr;    // [C_out, C_in, kernel_h, kernel_w] in `weight_layout`
  const void* shift = nullptr;     // [C_out] or null (0)
  const void* residual = nullptr;  // as out, or null
  void* out = nullptr;             // [N, H_out, W_out, C_out]
};

// dx[i] = sum of dz[o] * weight[a] over all o, a with o * stride + a * dilation - padding = i;
// dweight[a] = sum over N and o of dz[o] * x[o * stride + a * dilation - padding].
struct DenseConv2dBackward {
  DenseConv2dShape shape;
  const void* dz = nullptr;  // [N, H_out, W_out, C_out]
  const void* x = nullptr;   // [N, H, W, C_in]; read for dweight only
  const void* weight =
      nullptr;         // [C_out, C_in, kernel_h, kernel_w] in `weight_layout`; read for dx only
  void* dx = nullptr;  // as x, or null: not wanted
  void* dweight = nullptr;  // as weight, or null: not wanted
};

namespace cpu {
// Bytes of workspace that the call needs. They depend on the shape only, never on the number of threads.
size_t dense_conv2d_forward_workspace(const DenseConv2dForward& p);
size_t dense_conv2d_backward_workspace(const DenseConv2dBackward& p);
void dense_conv2d_forward(const DenseConv2dForward& p, void* workspace);
void dense_conv2d_backward(const DenseConv2dBackward& p, void* workspace);
}  // namespace cpu

}  // namespace advdl_ops
