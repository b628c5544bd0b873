// Depthwise convolution: one filter of kernel_h x kernel_w for each channel, with an epilogue, and its gradients.
//
// csrc/cpu implements these functions in depthwise_conv2d (channels_first) and depthwise_conv2d_last (channels_last);
// csrc/bindings/depthwise_conv2d.cpp checks, allocates and fills the structs. On CUDA, Triton computes this family
// (advdl_ops/triton). No pointer aliases another one.
// "acc" is float, or double where `dtype` is f64.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv2d_axis.h"
#include "tensor_types.h"

namespace advdl_ops {

// Outputs of a row that the kernel for channels_first computes at once, at most.
inline constexpr int64_t kDepthwiseTileColumns = 16384;

struct DepthwiseConv2dShape {
  int64_t n = 0, c = 0;
  Conv2dAxis h, w;
  Layout layout = Layout::channels_first;
  DType dtype = DType::f32;        // of x, weight, residual, out and their gradients
  DType scale_dtype = DType::f32;  // of scale
  DType shift_dtype = DType::f32;  // of shift

  int64_t taps() const { return h.kernel * w.kernel; }
};

// out[n, c, i, j] = act(scale[c] * sum over a, b of x[n, c, i * stride + a * dilation - padding, j ...]
//                       * weight[c, a, b] + shift[c] + residual[n, c, i, j]), with x = 0 outside the image.
struct DepthwiseConv2dForward {
  DepthwiseConv2dShape shape;
  Activation act = Activation::identity;
  double act_param = 0;
  const void* x = nullptr;         // [N, C, H, W] in `layout`
  const void* weight = nullptr;    // [C, kernel_h, kernel_w]
  const void* scale = nullptr;     // [C] or null (1)
  const void* shift = nullptr;     // [C] or null (0)
  const void* residual = nullptr;  // as out, or null
  void* out = nullptr;             // [N, C, H_out, W_out] in `layout`
};

// dx[i] = sum of dz[o] * weight[a] over all o, a with o * stride + a * dilation - padding = i;
// dweight[a] = sum over N and o of dz[o] * x[o * stride + a * dilation - padding]; dbias = sum of dz.
struct DepthwiseConv2dBackward {
  DepthwiseConv2dShape shape;
  const void* dz = nullptr;      // [N, C, H_out, W_out] in `layout`
  const void* x = nullptr;       // [N, C, H, W] in `layout`
  const void* weight = nullptr;  // [C, kernel_h, kernel_w]
  void* dx = nullptr;            // as x, or null: not wanted
  void* dweight = nullptr;       // [C, kernel_h, kernel_w] acc, or null: not wanted
  void* dbias = nullptr;         // [C] acc, or null: not wanted
};

namespace cpu {
// Bytes of workspace that the call needs. They depend on the shape only, never on the number of threads.
size_t depthwise_conv2d_forward_workspace(const DepthwiseConv2dForward& p);
size_t depthwise_conv2d_backward_workspace(const DepthwiseConv2dBackward& p);
void depthwise_conv2d_forward(const DepthwiseConv2dForward& p, void* workspace);
void depthwise_conv2d_backward(const DepthwiseConv2dBackward& p, void* workspace);
size_t depthwise_conv2d_last_forward_workspace(const DepthwiseConv2dForward& p);
size_t depthwise_conv2d_last_backward_workspace(const DepthwiseConv2dBackward& p);
void depthwise_conv2d_last_forward(const DepthwiseConv2dForward& p, void* workspace);
void depthwise_conv2d_last_backward(const DepthwiseConv2dBackward& p, void* workspace);
}  // namespace cpu

}  // namespace advdl_ops
