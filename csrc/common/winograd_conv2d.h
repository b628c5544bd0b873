// Convolution by a 3x3 filter with stride 1 in fewer multiplications, and its gradients: Winograd's minimal filtering
// (Lavin & Gray 2015, arXiv:1509.09308). Tiles of 4 outputs use the points 0, +-5/8, +-3/2 and infinity (Barabasz et
// al. 2018, arXiv:1803.10986).
//
// csrc/cpu/winograd_conv2d.cpp and winograd_conv2d_backward.cpp implement these functions;
// csrc/bindings/winograd_conv2d.cpp checks, allocates and fills the structs. No pointer aliases another one. All
// arithmetic is in f32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv2d_axis.h"
#include "tensor_types.h"

namespace advdl_ops {

// The outputs of a tile, rows by columns.
enum class WinogradTile : int64_t { two_by_two = 0, two_by_four = 1, four_by_four = 2 };
constexpr int64_t kWinogradTileCount = 3;

struct WinogradFilters {
  int64_t groups = 1, c_in = 0, c_out = 0;  // channels of a group
  WinogradTile tile = WinogradTile::two_by_two;
};

struct WinogradConv2dShape : WinogradFilters {
  int64_t n = 0;
  Conv2dAxis h, w;           // kernel 3, stride 1
  DType dtype = DType::f32;  // of all images: f32, bf16 or f16
  // Of all images. channels_first: with a dilation of w, x and out have at most kWinogradWidest columns.
  Layout layout = Layout::channels_last;
};
constexpr int64_t kWinogradWidest = 126;

// A weight [groups * C_out, C_in, 3, 3]. Turned, for the gradient of x, it is stored as [groups * C_in, C_out, 3, 3]
// with its taps in reverse order.
struct WinogradWeight {
  DType dtype = DType::f32;  // f32, bf16 or f16
  Layout layout = Layout::channels_last;
  bool turned = false;
  const void* data = nullptr;
};

// out[n, o, i, j] = act(scale[o] * sum over c, a, b of x[n, c, i + a * dilation - padding, j ...] * weight[o, c, a, b]
//                       + shift[o] + residual[n, o, i, j]), with x = 0 outside the image and c in the group of o.
struct WinogradConv2dForward {
  WinogradConv2dShape shape;
  Activation act = Activation::identity;
  double act_param = 0;
  const void* x = nullptr;         // [N, groups * C_in, H, W] in `layout`
  WinogradWeight weight;           // read for tiles that are not finite, and if it is not packed
  const float* packed = nullptr;   // by winograd_pack, or null: packed in this call
  int64_t threads = 1;             // that share the work; no result depends on it
  const float* scale = nullptr;    // [groups * C_out] or null (1)
  const float* shift = nullptr;    // [groups * C_out] or null (0)
  const void* residual = nullptr;  // as out, or null
  void* out = nullptr;             // [N, groups * C_out, H_out, W_out] in `layout`
};

// dweight[o, c, a, b] = sum over n, i, j of dz[n, o, i, j] * x[n, c, i + a * dilation - padding, j ...].
struct WinogradConv2dBackward {
  WinogradConv2dShape shape;
  Layout weight_layout = Layout::channels_last;
  int64_t threads = 1;       // that share the work; no result depends on it
  const void* dz = nullptr;  // [N, groups * C_out, H_out, W_out] in `layout`
  const void* x = nullptr;   // [N, groups * C_in, H, W] in `layout`
  float* dweight = nullptr;  // [groups * C_out, C_in, 3, 3] in `weight_layout`
};

namespace cpu {
int64_t winograd_packed_size(const WinogradFilters& filters);
// packed: [groups][panels of C_out][points][C_in + 1][panel], winograd_packed_size elements; the last row of a point is
// not used.
void winograd_pack(const WinogradFilters& filters, const WinogradWeight& weight, float* packed);
// Scratch bytes that the call needs.
size_t winograd_conv2d_forward_workspace(const WinogradConv2dForward& p);
size_t winograd_conv2d_backward_workspace(const WinogradConv2dBackward& p);
void winograd_conv2d_forward(const WinogradConv2dForward& p, void* workspace);
void winograd_conv2d_backward(const WinogradConv2dBackward& p, void* workspace);
}  // namespace cpu

}  // namespace advdl_ops
