// torch.ops.advdl_ops.group_norm and its backward: argument checks, allocation, registration.
#include "../common/group_norm.h"

#include <tuple>

#include "tensor.h"

namespace advdl_ops {
namespace {

constexpr const char *kName = "group_norm", *kBackwardName = "group_norm_backward";

GroupNormShape shape_of(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        int64_t groups) {
  GroupNormShape shape;
  shape.n = x.size(0);
  shape.c = x.size(1);
  shape.s = positions(x);
  shape.groups = groups;
  shape.layout = layout_of(x);
  shape.dtype = dtype_of(x, kName);
  const OptionalTensor& affine = weight.has_value() ? weight : bias;
  if (affine.has_value()) shape.weight_dtype = dtype_of(*affine, kName);
  return shape;
}

void check_common(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                  int64_t groups, double eps, int64_t act) {
  check(x.dim() >= 2, kName, "x must have at least 2 dimensions");
  check(groups >= 0 && (groups == kEachPosition || x.size(1) % groups == 0), kName,
        "num_groups must divide the channels");
  check(eps >= 0, kName, "eps must not be negative");
  check_affine(kName, x, weight, bias, act);
}

std::tuple<Tensor, Tensor> forward(Tensor x, OptionalTensor residual, OptionalTensor weight,
                                   OptionalTensor bias, int64_t groups, double eps, int64_t act,
                                   double act_param) {
  check_common(x, weight, bias, groups, eps, act);
  check_residual(kName, residual, x);
  x = dense(x);
  residual = in_format_of(residual, x);
  weight = contiguous(weight);
  bias = contiguous(bias);

  GroupNormForward p;
  p.shape = shape_of(x, weight, bias, groups);
  Tensor out = allocate_like(x);
  Tensor stats = allocate_pair(x, p.shape.sets(), acc_type(x.scalar_type()));
  p.eps = eps;
  p.act = static_cast<Activation>(act);
  p.act_param = act_param;
  p.x = data(x);
  p.residual = data(residual);
  p.weight = data(weight);
  p.bias = data(bias);
  p.out = data(out);
  p.mean = data(stats);
  p.var = second_of_pair(stats);
  if (p.shape.is_empty()) {
    torch::stable::zero_(stats);
    return {out, stats};
  }
  const bool each_position = groups == kEachPosition;
  Launch(x, [&] {
    return each_position ? device::layer_norm_2d_forward_workspace(p)
                         : device::group_norm_forward_workspace(p);
  }).run(each_position ? device::layer_norm_2d_forward : device::group_norm_forward, p);
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dout, Tensor x, OptionalTensor saved,
                                                    OptionalTensor weight, OptionalTensor bias,
                                                    Tensor stats, int64_t groups, double eps,
                                                    int64_t act, double act_param, int64_t z_source,
                                                    bool need_dx, bool need_dresidual) {
  check_common(x, weight, bias, groups, eps, act);
  check_backward(kBackwardName, dout, x, saved, act, z_source);
  x = dense(x);
  // Inductor may pass a gradient whose memory format differs from that of forward's output.
  dout = in_format_of(dout, x);
  saved = in_format_of(saved, x);
  weight = contiguous(weight);
  bias = contiguous(bias);
  stats = *contiguous(OptionalTensor(stats));

  GroupNormBackward p;
  p.shape = shape_of(x, weight, bias, groups);
  const ScalarType acc = acc_type(x.scalar_type());
  check(stats.dim() == 2 && stats.size(0) == 2 && stats.size(1) == p.shape.sets() &&
            stats.scalar_type() == acc && stats.device() == x.device(),
        kBackwardName, "stats must be as forward returned them");
  const bool has_affine = weight.has_value() || bias.has_value();
  const int64_t channels = has_affine ? x.size(1) : 0;
  Tensor dx = need_dx ? allocate_like(x) : allocate_vector(x, 0, x.scalar_type());
  Tensor dresidual = need_dresidual ? allocate_like(x) : allocate_vector(x, 0, x.scalar_type());
  Tensor dweight = allocate_vector(x, channels, acc), dbias = allocate_vector(x, channels, acc);
  p.eps = eps;
  p.act = static_cast<Activation>(act);
  p.act_param = act_param;
  p.z_source = static_cast<ZSource>(z_source);
  p.dout = data(dout);
  p.x = data(x);
  p.saved = data(saved);
  p.weight = data(weight);
  p.bias = data(bias);
  p.mean = data(stats);
  p.var = second_of_pair(stats);
  // In a set of one value, x is the mean and dx is zero. The kernels would only compute it up to rounding.
  const bool is_zero = need_dx && p.shape.set_size() == 1;
  if (is_zero) torch::stable::zero_(dx);
  p.dx = data_or_null(dx, need_dx && !is_zero);
  p.dresidual = data_or_null(dresidual, need_dresidual);
  p.dweight = data_or_null(dweight, has_affine);
  p.dbias = data_or_null(dbias, has_affine);
  const bool each_position = groups == kEachPosition;
  Launch(x, [&] {
    return each_position ? device::layer_norm_2d_backward_workspace(p)
                         : device::group_norm_backward_workspace(p);
  }).run(each_position ? device::layer_norm_2d_backward : device::group_norm_backward, p);
  return {dx, dresidual, dweight, dbias};
}

}  // namespace
}  // namespace advdl_ops

STABLE_TORCH_LIBRARY_IMPL(advdl_ops, ADVDL_DISPATCH_KEY, m) {
  m.impl("group_norm", TORCH_BOX(&advdl_ops::forward));
  m.impl("group_norm_backward", TORCH_BOX(&advdl_ops::backward));
}
