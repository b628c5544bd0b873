// torch.ops.advdl_ops.depthwise_conv2d, its backward and convert_layout on CPU: argument checks, allocation,
// registration. advdl_ops/_conv/choice.py decides when converting x to channels_last is faster.

#include <tuple>
#include <vector>

#include "../common/depthwise_conv2d.h"
#include "conv2d.h"

namespace advdl_ops {
namespace {

constexpr const char *kName = "depthwise_conv2d", *kBackwardName = "depthwise_conv2d_backward";

// The channels_first kernel copies the whole reach of a filter. If most of that is outside the image, channels_last is
// used.
bool reaches_far(const DepthwiseConv2dShape& s) {
  constexpr int64_t kLargeReach = 1 << 18;
  const int64_t columns = s.w.out < kDepthwiseTileColumns ? s.w.out : kDepthwiseTileColumns;
  return s.h.reach() > 4 * s.h.in || s.w.reach() > 4 * s.w.in ||
         s.h.reach() + 4 > kLargeReach / (s.w.reach() + columns);
}

DepthwiseConv2dShape shape_of(const Tensor& x, const Tensor& weight,
                              const std::vector<int64_t>& stride,
                              const std::vector<int64_t>& padding,
                              const std::vector<int64_t>& dilation, const char* function) {
  check_conv2d(x, weight, stride, padding, dilation, function);
  check(weight.size(0) == x.size(1) && weight.size(1) == 1, function,
        "weight must be [C, 1, kH, kW] with the channels of x");
  DepthwiseConv2dShape s;
  s.n = x.size(0);
  s.c = x.size(1);
  s.h = axis(x, weight, stride, padding, dilation, 0, function);
  s.w = axis(x, weight, stride, padding, dilation, 1, function);
  s.layout = reaches_far(s) ? Layout::channels_last : format_of(x);
  s.dtype = dtype_of(x, function);
  return s;
}

bool is_image(const Tensor& t, const DepthwiseConv2dShape& s) {
  return t.dim() == 4 && t.size(0) == s.n && t.size(1) == s.c && t.size(2) == s.h.out &&
         t.size(3) == s.w.out;
}

Tensor forward(Tensor x, Tensor weight, OptionalTensor scale, OptionalTensor shift,
               OptionalTensor residual, std::vector<int64_t> stride, std::vector<int64_t> padding,
               std::vector<int64_t> dilation, int64_t act, double act_param) {
  DepthwiseConv2dForward p;
  p.shape = shape_of(x, weight, stride, padding, dilation, kName);
  const DepthwiseConv2dShape& s = p.shape;
  check(goes_with(scale, x.scalar_type()) && goes_with(shift, x.scalar_type()), kName,
        "scale and shift must be of x's dtype, or float32 beside a half x");
  check(is_per_channel(scale, x) && is_per_channel(shift, x), kName,
        "scale and shift must have one value per channel, on x's device");
  check(!residual.has_value() ||
            (is_image(*residual, s) && residual->scalar_type() == x.scalar_type() &&
             residual->device() == x.device()),
        kName, "residual must have the shape of the output and x's dtype and device");
  check(act >= 0 && act < kActivationCount, kName, "unknown activation code");
  const Layout given = format_of(x);
  x = in_format(x, s.layout);
  weight = *contiguous(OptionalTensor(weight));
  scale = contiguous(scale);
  shift = contiguous(shift);
  if (residual.has_value()) residual = in_format(*residual, s.layout);
  if (scale.has_value()) p.shape.scale_dtype = dtype_of(*scale, kName);
  if (shift.has_value()) p.shape.shift_dtype = dtype_of(*shift, kName);
  Tensor out = allocate_image(x, s.layout, s.n, s.c, s.h.out, s.w.out);
  p.act = static_cast<Activation>(act);
  p.act_param = act_param;
  p.x = data(x);
  p.weight = data(weight);
  p.scale = data(scale);
  p.shift = data(shift);
  p.residual = data(residual);
  p.out = data(out);
  const bool is_last = s.layout == Layout::channels_last;
  Launch(x, [&] {
    return is_last ? cpu::depthwise_conv2d_last_forward_workspace(p)
                   : cpu::depthwise_conv2d_forward_workspace(p);
  }).run(is_last ? cpu::depthwise_conv2d_last_forward : cpu::depthwise_conv2d_forward, p);
  return in_format(out, given);
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor dz, Tensor x, Tensor weight,
                                            std::vector<int64_t> stride,
                                            std::vector<int64_t> padding,
                                            std::vector<int64_t> dilation, bool need_dx,
                                            bool need_dweight, bool need_dbias) {
  DepthwiseConv2dBackward p;
  p.shape = shape_of(x, weight, stride, padding, dilation, kBackwardName);
  const DepthwiseConv2dShape& s = p.shape;
  check(is_image(dz, s) && dz.scalar_type() == x.scalar_type() && dz.device() == x.device(),
        kBackwardName, "dz must have the shape of the output and x's dtype and device");
  const Layout given = format_of(x);
  // If dweight is not wanted, only the sizes and format of x are used.
  if (need_dweight) x = in_format(x, s.layout);
  dz = in_format(dz, s.layout);
  weight = *contiguous(OptionalTensor(weight));
  const ScalarType acc = acc_type(x.scalar_type());
  Tensor dx = need_dx ? allocate_image(x, s.layout, s.n, s.c, s.h.in, s.w.in)
                      : allocate_vector(x, 0, x.scalar_type());
  const int64_t sizes[] = {s.c, 1, s.h.kernel, s.w.kernel};
  const int64_t strides[] = {s.taps(), s.taps(), s.w.kernel, 1};
  Tensor dweight = need_dweight ? allocate(x, sizes, strides, 4, acc) : allocate_vector(x, 0, acc);
  Tensor dbias = allocate_vector(x, need_dbias ? s.c : 0, acc);
  p.dz = data(dz);
  p.x = data(x);
  p.weight = data(weight);
  p.dx = data_or_null(dx, need_dx);
  p.dweight = data_or_null(dweight, need_dweight);
  p.dbias = data_or_null(dbias, need_dbias);
  const bool is_last = s.layout == Layout::channels_last;
  Launch(x, [&] {
    return is_last ? cpu::depthwise_conv2d_last_backward_workspace(p)
                   : cpu::depthwise_conv2d_backward_workspace(p);
  }).run(is_last ? cpu::depthwise_conv2d_last_backward : cpu::depthwise_conv2d_backward, p);
  return {need_dx ? in_format(dx, given) : dx, dweight, dbias};
}

}  // namespace
}  // namespace advdl_ops

STABLE_TORCH_LIBRARY_IMPL(advdl_ops, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&advdl_ops::forward));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&advdl_ops::backward));
  m.impl("convert_layout", TORCH_BOX(&advdl_ops::convert_layout));
}
