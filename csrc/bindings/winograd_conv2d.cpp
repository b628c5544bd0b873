// torch.ops.advdl_ops.winograd_conv2d, its backward and the transform of its weight, on CPU only: argument checks,
// allocation, registration. advdl_ops/_conv/choice.py decides which convolutions they serve.

#include "../common/winograd_conv2d.h"

#include <tuple>
#include <vector>

#include "../cpu/dispatch.h"
#include "conv2d.h"

namespace advdl_ops {
namespace {

constexpr const char *kPackName = "winograd_pack", *kName = "winograd_conv2d",
                     *kBackwardName = "winograd_conv2d_backward";
constexpr int64_t kSize = 3;  // of the filter

WinogradFilters filters_of(const Tensor& weight, int64_t groups, int64_t tile,
                           const char* function) {
  check(weight.dim() == 4 && weight.size(2) == kSize && weight.size(3) == kSize, function,
        "weight must be [C_out, C_in / groups, 3, 3]");
  check(weight.size(0) > 0 && weight.size(1) > 0, function,
        "weight must have an output and an input channel");
  check(dtype_of(weight, function) != DType::f64, function,
        "dtype must be float32, float16 or bfloat16");
  check(groups > 0 && weight.size(0) % groups == 0, function,
        "groups must be positive and divide the output channels");
  check(tile >= 0 && tile < kWinogradTileCount, function, "unknown tile");
  WinogradFilters f;
  f.groups = groups;
  f.c_out = weight.size(0) / groups;
  f.c_in = weight.size(1);
  f.tile = static_cast<WinogradTile>(tile);
  return f;
}

// `weight` is in one of the two formats.
WinogradWeight weight_of(const Tensor& weight, bool turned, const char* function) {
  WinogradWeight w;
  w.dtype = dtype_of(weight, function);
  w.layout = format_of(weight);
  w.turned = turned;
  w.data = data(weight);
  return w;
}
Tensor dense_weight(const Tensor& weight) { return in_format(weight, format_of(weight)); }

Tensor pack(Tensor weight, int64_t groups, int64_t tile) {
  const WinogradFilters f = filters_of(weight, groups, tile, kPackName);
  weight = dense_weight(weight);
  Tensor packed = allocate_vector(weight, cpu::winograd_packed_size(f), ScalarType::Float);
  cpu::winograd_pack(f, weight_of(weight, false, kPackName), static_cast<float*>(data(packed)));
  return packed;
}

// Of the forward convolution.
WinogradConv2dShape shape_of(const Tensor& x, const Tensor& weight,
                             const std::vector<int64_t>& padding,
                             const std::vector<int64_t>& dilation, int64_t groups, int64_t tile,
                             const char* function) {
  const std::vector<int64_t> stride{1, 1};
  check_conv2d(x, weight, stride, padding, dilation, function);
  WinogradConv2dShape s;
  static_cast<WinogradFilters&>(s) = filters_of(weight, groups, tile, function);
  check(groups * s.c_in == x.size(1), function,
        "weight must be [C_out, C_in / groups, 3, 3] with the channels of x");
  s.n = x.size(0);
  s.h = axis(x, weight, stride, padding, dilation, 0, function);
  s.w = axis(x, weight, stride, padding, dilation, 1, function);
  s.dtype = dtype_of(x, function);
  const int64_t widest = s.w.in > s.w.out ? s.w.in : s.w.out;
  if (s.w.dilation == 1 || widest <= kWinogradWidest) s.layout = format_of(x);
  return s;
}

// An output, or a gradient of x, of this layout.
Tensor allocate_result(const Tensor& x, Layout layout, int64_t c, int64_t h, int64_t w) {
  return layout == Layout::channels_last ? allocate_last(x, format_of(x), x.size(0), c, h, w)
                                         : allocate_image(x, layout, x.size(0), c, h, w);
}

// Whether `t` has the shape of the output of all groups, and x's dtype and device.
bool is_result(const Tensor& t, const Tensor& x, const Tensor& weight, WinogradConv2dShape s) {
  s.c_out = weight.size(0);
  return is_output(t, x, s);
}

bool is_vector(const OptionalTensor& t, int64_t size, const Tensor& x) {
  return !t.has_value() || (t->dim() == 1 && t->size(0) == size &&
                            t->scalar_type() == ScalarType::Float && t->device() == x.device());
}

void run(WinogradConv2dForward& p, const Tensor& x) {
  p.threads = cpu::thread_count();
  Launch(x, [&] {
    return cpu::winograd_conv2d_forward_workspace(p);
  }).run(cpu::winograd_conv2d_forward, p);
}

// packed: of winograd_pack, or null: made for this call.
Tensor forward(Tensor x, Tensor weight, OptionalTensor packed, OptionalTensor scale,
               OptionalTensor shift, OptionalTensor residual, std::vector<int64_t> padding,
               std::vector<int64_t> dilation, int64_t groups, int64_t tile, int64_t act,
               double act_param) {
  WinogradConv2dForward p;
  p.shape = shape_of(x, weight, padding, dilation, groups, tile, kName);
  const WinogradConv2dShape& s = p.shape;
  const int64_t c_out = weight.size(0);
  check(is_vector(scale, c_out, x) && is_vector(shift, c_out, x), kName,
        "scale and shift must have one value per output channel, in float32 and on x's device");
  check(is_vector(packed, cpu::winograd_packed_size(s), x) &&
            (!packed.has_value() || packed->is_contiguous()),
        kName, "packed must come from winograd_pack for this weight and tile");
  check(!residual.has_value() || is_result(*residual, x, weight, s), kName,
        "residual must have the shape of the output and x's dtype and device");
  check(act >= 0 && act < kActivationCount, kName, "unknown activation code");
  const Layout given = format_of(x);
  x = in_format(x, s.layout);
  weight = dense_weight(weight);
  scale = contiguous(scale);
  shift = contiguous(shift);
  if (residual.has_value()) residual = in_format(*residual, s.layout);
  Tensor out = allocate_result(x, s.layout, c_out, s.h.out, s.w.out);
  p.act = static_cast<Activation>(act);
  p.act_param = act_param;
  p.x = data(x);
  p.weight = weight_of(weight, false, kName);
  p.scale = static_cast<const float*>(data(scale));
  p.shift = static_cast<const float*>(data(shift));
  p.residual = data(residual);
  p.out = data(out);
  p.packed = static_cast<const float*>(data(packed));
  run(p, x);
  return in_format(out, given);
}

// dx is a convolution of dz by the turned weight, with the padding that remains of the filter's reach.
Tensor input_gradient(const Tensor& dz, const Tensor& x, const Tensor& weight,
                      const WinogradConv2dShape& s) {
  WinogradConv2dForward p;
  p.shape = s;
  p.shape.c_in = s.c_out;
  p.shape.c_out = s.c_in;
  const auto turned = [](const Conv2dAxis& axis) {
    check(axis.padding <= axis.reach(), kBackwardName,
          "padding must not exceed the reach of the filter");
    Conv2dAxis a = axis;
    a.in = axis.out;
    a.out = axis.in;
    a.padding = axis.reach() - axis.padding;
    return a;
  };
  p.shape.h = turned(s.h);
  p.shape.w = turned(s.w);
  Tensor dx = allocate_result(x, s.layout, x.size(1), s.h.in, s.w.in);
  p.x = data(dz);
  p.weight = weight_of(weight, true, kBackwardName);
  p.out = data(dx);
  run(p, x);
  return in_format(dx, format_of(x));
}

Tensor weight_gradient(const Tensor& dz, const Tensor& x, const Tensor& weight,
                       const WinogradConv2dShape& s) {
  WinogradConv2dBackward p;
  p.shape = s;
  p.weight_layout = format_of(weight);
  Tensor dweight =
      allocate_image(x, p.weight_layout, weight.size(0), s.c_in, kSize, kSize, ScalarType::Float);
  p.threads = cpu::thread_count();
  p.dz = data(dz);
  p.x = data(x);
  p.dweight = static_cast<float*>(data(dweight));
  Launch(x, [&] {
    return cpu::winograd_conv2d_backward_workspace(p);
  }).run(cpu::winograd_conv2d_backward, p);
  return dweight;
}

// The gradient of the weight is in f32.
std::tuple<Tensor, Tensor> backward(Tensor dz, Tensor x, Tensor weight,
                                    std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                    int64_t groups, int64_t dx_tile, int64_t dweight_tile,
                                    bool need_dx, bool need_dweight) {
  const WinogradConv2dShape of_dx =
      shape_of(x, weight, padding, dilation, groups, dx_tile, kBackwardName);
  const WinogradConv2dShape of_dweight =
      shape_of(x, weight, padding, dilation, groups, dweight_tile, kBackwardName);
  check(is_result(dz, x, weight, of_dx), kBackwardName,
        "dz must have the shape of the output and x's dtype and device");
  dz = in_format(dz, of_dx.layout);
  Tensor dx = need_dx ? input_gradient(dz, x, dense_weight(weight), of_dx)
                      : allocate_vector(x, 0, x.scalar_type());
  Tensor dweight = need_dweight
                       ? weight_gradient(dz, in_format(x, of_dx.layout), weight, of_dweight)
                       : allocate_vector(x, 0, ScalarType::Float);
  return {dx, dweight};
}

}  // namespace
}  // namespace advdl_ops

STABLE_TORCH_LIBRARY_IMPL(advdl_ops, CPU, m) {
  m.impl("winograd_pack", TORCH_BOX(&advdl_ops::pack));
  m.impl("winograd_conv2d", TORCH_BOX(&advdl_ops::forward));
  m.impl("winograd_conv2d_backward", TORCH_BOX(&advdl_ops::backward));
}
