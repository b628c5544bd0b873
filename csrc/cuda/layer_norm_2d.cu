// act(layer_norm_2d(x) + residual) and its gradients on CUDA: every position is normalized over its channels.
// Algorithms, bytes and launches: docs/kernels.md.
//
//   layer_norm_2d_rows.cu   the channels of a position are contiguous, and fit into the registers of a team of threads
//   layer_norm_2d_tiles.cu  otherwise
//
//   forward   rows or tiles
//   backward  rows or tiles [+ finalize_grads, if dweight and dbias are wanted]
#include "group_norm_plan.h"
#include "layer_norm_2d_plan.h"

namespace advdl_ops::cuda {

size_t layer_norm_2d_forward_workspace(const GroupNormForward&) { return 0; }

size_t layer_norm_2d_backward_workspace(const GroupNormBackward& p) {
  if (p.shape.is_empty() || p.dweight == nullptr) return 0;
  return bytes_taken([&](Arena& arena) {
    with_acc_type(p.shape.dtype, [&]<class A>() { LayerNorm2dPartials<A>(p.shape, arena); });
  });
}

void layer_norm_2d_forward(const GroupNormForward& p, void*, void* stream) {
  if (p.shape.is_empty()) return;
  const bool aligned = vector_aligned(p.x, p.residual, p.out);
  layer_norm_2d_takes_rows(p.shape, aligned) ? layer_norm_2d_rows(p, aligned, stream)
                                             : layer_norm_2d_tiles(p, aligned, stream);
}

void layer_norm_2d_backward(const GroupNormBackward& p, void* workspace, void* stream) {
  const GroupNormShape& s = p.shape;
  if (s.is_empty()) {
    zero_values(p.dweight, s.c, s.dtype, stream);
    zero_values(p.dbias, s.c, s.dtype, stream);
    return;
  }
  const bool aligned = vector_aligned(p.x, p.dout, p.saved, p.dx, p.dresidual);
  void* partials = nullptr;
  if (p.dweight != nullptr) {
    Arena arena(workspace);
    with_acc_type(s.dtype, [&]<class A>() { partials = LayerNorm2dPartials<A>(s, arena).values; });
  }
  GroupPlan sums;  // of the channels, over all blocks
  sums.c = sums.channels = s.c;
  sums.splits = layer_norm_2d_takes_rows(s, aligned)
                    ? layer_norm_2d_rows_backward(p, aligned, partials, stream)
                    : layer_norm_2d_tiles_backward(p, aligned, partials, stream);
  if (p.dweight != nullptr) group_norm_finalize_gradients(p, sums, partials, nullptr, stream);
}

}  // namespace advdl_ops::cuda
