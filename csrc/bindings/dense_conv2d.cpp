// torch.ops.advdl_ops.dense_conv2d and its backward, on CPU only: argument checks, allocation, registration.
// advdl_ops/_conv/choice.py decides which convolutions they serve.

#include "../common/dense_conv2d.h"

#include <tuple>
#include <vector>

#include "conv2d.h"

namespace advdl_ops {
namespace {

constexpr const char *kName = "dense_conv2d", *kBackwardName = "dense_conv2d_backward";
constexpr int64_t kMostTaps = 64;

DenseConv2dShape shape_of(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                          const char* function) {
  check_conv2d(x, weight, stride, padding, dilation, function);
  check(weight.size(1) == x.size(1), function,
        "weight must be [C_out, C_in, kH, kW] with the channels of x");
  DenseConv2dShape s;
  s.n = x.size(0);
  s.c_in = x.size(1);
  s.c_out = weight.size(0);
  s.h = axis(x, weight, stride, padding, dilation, 0, function);
  s.w = axis(x, weight, stride, padding, dilation, 1, function);
  check(s.h.kernel <= kMostTaps / s.w.kernel, function, "the kernel must have at most 64 taps");
  s.dtype = dtype_of(x, function);
  check(s.dtype == DType::f32 || s.dtype == DType::f64, function,
        "dtype must be float32 or float64");
  s.weight_layout = format_of(weight);
  return s;
}

Tensor forward(Tensor x, Tensor weight, OptionalTensor shift, OptionalTensor residual,
               std::vector<int64_t> stride, std::vector<int64_t> padding,
               std::vector<int64_t> dilation, int64_t act, double act_param) {
  DenseConv2dForward p;
  p.shape = shape_of(x, weight, stride, padding, dilation, kName);
  const DenseConv2dShape& s = p.shape;
  check(!shift.has_value() ||
            (shift->dim() == 1 && shift->size(0) == s.c_out &&
             shift->scalar_type() == x.scalar_type() && shift->device() == x.device()),
        kName, "shift must have one value per output channel, of x's dtype and on its device");
  check(!residual.has_value() || is_output(*residual, x, s), kName,
        "residual must have the shape of the output and x's dtype and device");
  check(act >= 0 && act < kActivationCount, kName, "unknown activation code");
  const Layout given = format_of(x);
  x = in_format(x, Layout::channels_last);
  weight = in_format(weight, s.weight_layout);
  shift = contiguous(shift);
  if (residual.has_value()) residual = in_format(*residual, Layout::channels_last);
  Tensor out = allocate_last(x, given, s.n, s.c_out, s.h.out, s.w.out);
  p.act = static_cast<Activation>(act);
  p.act_param = act_param;
  p.x = data(x);
  p.weight = data(weight);
  p.shift = data(shift);
  p.residual = data(residual);
  p.out = data(out);
  Launch(x, [&] {
    return cpu::dense_conv2d_forward_workspace(p);
  }).run(cpu::dense_conv2d_forward, p);
  return in_format(out, given);
}

std::tuple<Tensor, Tensor> backward(Tensor dz, Tensor x, Tensor weight, std::vector<int64_t> stride,
                                    std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                    bool need_dx, bool need_dweight) {
  DenseConv2dBackward p;
  p.shape = shape_of(x, weight, stride, padding, dilation, kBackwardName);
  const DenseConv2dShape& s = p.shape;
  check(is_output(dz, x, s), kBackwardName,
        "dz must have the shape of the output and x's dtype and device");
  const Layout given = format_of(x);
  // If dweight is not wanted, only the sizes and format of x are used; if dx is not wanted, only those of the weight.
  if (need_dweight) x = in_format(x, Layout::channels_last);
  if (need_dx) weight = in_format(weight, s.weight_layout);
  dz = in_format(dz, Layout::channels_last);
  Tensor dx = need_dx ? allocate_last(x, given, s.n, s.c_in, s.h.in, s.w.in)
                      : allocate_vector(x, 0, x.scalar_type());
  Tensor dweight = need_dweight
                       ? allocate_image(x, s.weight_layout, s.c_out, s.c_in, s.h.kernel, s.w.kernel)
                       : allocate_vector(x, 0, x.scalar_type());
  p.dz = data(dz);
  p.x = data(x);
  p.weight = data(weight);
  p.dx = data_or_null(dx, need_dx);
  p.dweight = data_or_null(dweight, need_dweight);
  Launch(x, [&] {
    return cpu::dense_conv2d_backward_workspace(p);
  }).run(cpu::dense_conv2d_backward, p);
  return {need_dx ? in_format(dx, given) : dx, dweight};
}

}  // namespace
}  // namespace advdl_ops

STABLE_TORCH_LIBRARY_IMPL(advdl_ops, CPU, m) {
  m.impl("dense_conv2d", TORCH_BOX(&advdl_ops::forward));
  m.impl("dense_conv2d_backward", TORCH_BOX(&advdl_ops::backward));
}
