// Norms of contiguous sets with a weight and a bias for each element: layer norm 2d in channels_last, and group norm if
// channels are too short for loops of their own.
#pragma once

#include "../common/arena.h"
#include "../common/group_norm.h"

#include "simd.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

// Contiguous sets [rows, sets, length]. All rows have the same weights.
struct ContiguousSets {
  int64_t rows, sets, length;
  int64_t inner;  // neighbouring elements of a row that share a channel
  int64_t width() const { return sets * length; }
};

void elementwise_affine_forward(const GroupNormForward& p, const ContiguousSets& cut, Arena arena);
void elementwise_affine_backward(const GroupNormBackward& p, const ContiguousSets& cut,
                                 Arena arena);
// Takes the workspace of these two functions, for arithmetic in Acc (float or double).
template <class Acc>
void take_elementwise_affine(const ContiguousSets& cut, bool backward, Arena& arena);

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
