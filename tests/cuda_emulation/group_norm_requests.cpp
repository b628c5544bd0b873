// Requests for csrc/cuda/group_norm.cu and, with groups of kEachPosition, layer_norm_2d.cu: see module.cpp.
#include <utility>

#include "../../csrc/common/group_norm.h"
#include "group_norm.h"
#include "norm_requests.h"

namespace cuda_emulation {
namespace {

using namespace advdl_ops;

// Sets groups, eps, and the fields of every request for a norm. It also returns the bytes of the statistics.
template <class Params>
std::pair<Sizes, size_t> get_group_norm(const py::dict& r, Arena& arena, Params& p) {
  p.shape = get_shape<GroupNormShape>(r);
  p.shape.groups = r["groups"].cast<int64_t>();
  p.eps = r["eps"].cast<double>();
  const Sizes sizes(p.shape);
  get_common(r, arena, sizes, p);
  return {sizes, static_cast<size_t>(p.shape.sets()) * element_bytes(sizes.acc)};
}

template <class Params>
py::dict run(Arena& arena, const Params& p, size_t (*workspace)(const Params&),
             void (*launch)(const Params&, void*, void*)) {
  launch(p, arena.workspace(workspace(p)), nullptr);
  return arena.results();
}

}  // namespace

py::dict group_norm_forward(const py::dict& r) {
  apply_settings(r);
  Arena arena(r);
  GroupNormForward p;
  const auto [sizes, sets] = get_group_norm(r, arena, p);
  p.residual = arena.input("residual", sizes.all, p.shape.dtype);
  p.out = arena.output("out", sizes.all, p.shape.dtype);
  p.mean = arena.output("mean", sets, sizes.acc);
  p.var = arena.output("var", sets, sizes.acc);
  return p.shape.groups == kEachPosition
             ? run(arena, p, cuda::layer_norm_2d_forward_workspace, cuda::layer_norm_2d_forward)
             : run(arena, p, cuda::group_norm_forward_workspace, cuda::group_norm_forward);
}

py::dict group_norm_backward(const py::dict& r) {
  apply_settings(r);
  Arena arena(r);
  GroupNormBackward p;
  const auto [sizes, sets] = get_group_norm(r, arena, p);
  get_gradients(r, arena, sizes, p);
  p.mean = arena.input("mean", sets, sizes.acc);
  p.var = arena.input("var", sets, sizes.acc);
  if (arena.wants("want_dweight")) {
    p.dweight = arena.output("dweight", sizes.channels, sizes.acc);
    p.dbias = arena.output("dbias", sizes.channels, sizes.acc);
  }
  return p.shape.groups == kEachPosition
             ? run(arena, p, cuda::layer_norm_2d_backward_workspace, cuda::layer_norm_2d_backward)
             : run(arena, p, cuda::group_norm_backward_workspace, cuda::group_norm_backward);
}

}  // namespace cuda_emulation
