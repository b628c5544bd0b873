// Requests for csrc/cuda/group_norm.cu and, with groups of kEachPosition, layer_norm_2d.cu: see module.cpp.
#include "../../csrc/common/group_norm.h"
#include "arena.h"
#include "group_norm.h"

namespace cuda_emulation {
namespace {

using namespace advdl_ops;

GroupNormShape get_shape(const py::dict& r) {
  GroupNormShape s;
  s.n = r["n"].cast<int64_t>();
  s.c = r["c"].cast<int64_t>();
  s.s = r["s"].cast<int64_t>();
  s.groups = r["groups"].cast<int64_t>();
  s.layout = get_enum<Layout>(r, "layout");
  s.dtype = get_enum<DType>(r, "dtype");
  s.weight_dtype = get_enum<DType>(r, "weight_dtype");
  return s;
}

// Bytes of the tensors of a call, and the type of its statistics and sums.
struct Sizes {
  size_t all, weights, channels, sets;
  DType acc;

  explicit Sizes(const GroupNormShape& s) {
    acc = s.dtype == DType::f64 ? DType::f64 : DType::f32;
    all = static_cast<size_t>(s.n * s.c * s.s) * element_bytes(s.dtype);
    weights = static_cast<size_t>(s.c) * element_bytes(s.weight_dtype);
    channels = static_cast<size_t>(s.c) * element_bytes(acc);
    sets = static_cast<size_t>(s.sets()) * element_bytes(acc);
  }
};

// What forward and backward share.
template <class Params>
void get_common(const py::dict& r, Arena& arena, const Sizes& sizes, Params& p) {
  p.eps = r["eps"].cast<double>();
  p.act = get_enum<Activation>(r, "act");
  p.act_param = r["act_param"].cast<double>();
  p.x = arena.input("x", sizes.all, p.shape.dtype);
  p.weight = arena.input("weight", sizes.weights, p.shape.weight_dtype);
  p.bias = arena.input("bias", sizes.weights, p.shape.weight_dtype);
}

}  // namespace

py::dict group_norm_forward(const py::dict& r) {
  apply_settings(r);
  Arena arena(r);
  GroupNormForward p;
  p.shape = get_shape(r);
  const Sizes sizes(p.shape);
  get_common(r, arena, sizes, p);
  p.residual = arena.input("residual", sizes.all, p.shape.dtype);
  p.out = arena.output("out", sizes.all, p.shape.dtype);
  p.mean = arena.output("mean", sizes.sets, sizes.acc);
  p.var = arena.output("var", sizes.sets, sizes.acc);
  if (p.shape.groups == kEachPosition) {
    void* workspace = arena.workspace(cuda::layer_norm_2d_forward_workspace(p));
    cuda::layer_norm_2d_forward(p, workspace, nullptr);
  } else {
    void* workspace = arena.workspace(cuda::group_norm_forward_workspace(p));
    cuda::group_norm_forward(p, workspace, nullptr);
  }
  return arena.results();
}

py::dict group_norm_backward(const py::dict& r) {
  apply_settings(r);
  Arena arena(r);
  GroupNormBackward p;
  p.shape = get_shape(r);
  const Sizes sizes(p.shape);
  get_common(r, arena, sizes, p);
  p.z_source = get_enum<ZSource>(r, "z_source");
  p.dout = arena.input("dout", sizes.all, p.shape.dtype);
  p.saved = arena.input("saved", sizes.all, p.shape.dtype);
  p.mean = arena.input("mean", sizes.sets, sizes.acc);
  p.var = arena.input("var", sizes.sets, sizes.acc);
  if (arena.wants("want_dx")) p.dx = arena.output("dx", sizes.all, p.shape.dtype);
  if (arena.wants("want_dresidual"))
    p.dresidual = arena.output("dresidual", sizes.all, p.shape.dtype);
  if (arena.wants("want_dweight")) {
    p.dweight = arena.output("dweight", sizes.channels, sizes.acc);
    p.dbias = arena.output("dbias", sizes.channels, sizes.acc);
  }
  if (p.shape.groups == kEachPosition) {
    void* workspace = arena.workspace(cuda::layer_norm_2d_backward_workspace(p));
    cuda::layer_norm_2d_backward(p, workspace, nullptr);
  } else {
    void* workspace = arena.workspace(cuda::group_norm_backward_workspace(p));
    cuda::group_norm_backward(p, workspace, nullptr);
  }
  return arena.results();
}

}  // namespace cuda_emulation
