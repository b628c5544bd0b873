// Convolution by a 3x3 filter with stride 1 in fewer multiplications, and its gradients: Winograd's minimal filtering (Lavin & Gray
// 2015, arXiv:1509.09308). Tiles of 4 outputs use the points 0, +-5/8, +-3/2 and infinity (Barabasz et al. 2018, arXiv:1803.10986).
//
// csrc/cpu/winograd_conv2d.cpp implements these functions; csrc/bindings/winograd_conv2d.cpp checks, allocates and fills the
// structs. No pointer aliases another one. Everything is f32, images are in channels_last.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv2d_axis.h"
#include "tensor_types.h"

namespace advdl_ops {

// The outputs of a tile, rows by columns.
enum class WinogradTile : int64_t { two_by_two = 0, two_by_four = 1, four_by_four = 2 };
constexpr int64_t kWinogradTileCount = 3;

struct WinogradConv2dShape {
  int64_t n = 0, c_in = 0, c_out = 0;
  Conv2dAxis h, w;  // kernel 3, stride 1
  WinogradTile tile = WinogradTile::two_by_two;
};

// A weight [C_out, C_in, 3, 3]. Turned, for the gradient of x, it is stored as [C_in, C_out, 3, 3] with its taps in reverse order.
struct WinogradWeight {
  int64_t c_in = 0, c_out = 0;
  WinogradTile tile = WinogradTile::two_by_two;
  Layout layout = Layout::channels_first;
  bool turned = false;
  const float* weight = nullptr;
};

// out[n, i, j, o] = act(scale[o] * sum over a, b, c of x[n, i + a * dilation - padding, j ..., c] * weight[o, c, a, b]
//                       + shift[o] + residual[n, i, j, o]), with x = 0 outside the image.
struct WinogradConv2dForward {
  WinogradConv2dShape shape;
  Activation act = Activation::identity;
  double act_param = 0;
  const float* x = nullptr;         // [N, H, W, C_in]
  WinogradWeight weight;            // read for tiles that are not finite, and if it is not packed
  const float* packed = nullptr;    // by winograd_pack, or null: packed in this call
  int64_t threads = 1;              // that share the work; no result depends on it
  const float* scale = nullptr;     // [C_out] or null (1)
  const float* shift = nullptr;     // [C_out] or null (0)
  const float* residual = nullptr;  // as out, or null
  float* out = nullptr;             // [N, H_out, W_out, C_out]
};

// dweight[o, c, a, b] = sum over n, i, j of dz[n, i, j, o] * x[n, i + a * dilation - padding, j ..., c].
struct WinogradConv2dBackward {
  WinogradConv2dShape shape;
  Layout weight_layout = Layout::channels_first;
  int64_t threads = 1;        // that share the work; no result depends on it
  const float* dz = nullptr;  // [N, H_out, W_out, C_out]
  const float* x = nullptr;   // [N, H, W, C_in]
  float* dweight = nullptr;   // [C_out, C_in, 3, 3] in `weight_layout`
};

namespace cpu {
int64_t winograd_packed_size(const WinogradWeight& w);
// packed: [panels of C_out][points][C_in + 1][panel], winograd_packed_size elements; the last row of a point is not used.
void winograd_pack(const WinogradWeight& w, float* packed);
// Scratch bytes that the call needs.
size_t winograd_conv2d_forward_workspace(const WinogradConv2dForward& p);
size_t winograd_conv2d_backward_workspace(const WinogradConv2dBackward& p);
void winograd_conv2d_forward(const WinogradConv2dForward& p, void* workspace);
void winograd_conv2d_backward(const WinogradConv2dBackward& p, void* workspace);
}  // namespace cpu

}  // namespace advdl_ops
