// Norms whose sets lie in memory as [rows, sets, length], with a weight and a bias for every element of a row: the layer norm
// of channels_last positions, and group norm where channels are too short for vectors.
#pragma once

#include "group_norm.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

struct ContiguousSets {
  int64_t rows, sets, length;
  int64_t inner;  // elements of a row that share a channel
  int64_t width() const { return sets * length; }
};

void contiguous_sets_forward(const GroupNormForward& p, const ContiguousSets& cut, Arena arena);
void contiguous_sets_backward(const GroupNormBackward& p, const ContiguousSets& cut, Arena arena);
// Counts the memory of these two.
void contiguous_sets_workspace(const GroupNormShape& shape, const ContiguousSets& cut,
                               bool backward, Arena& arena);

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
