// torch.ops.advdl_ops.winograd_conv2d, its backward and the transform of its weight, on CPU only: argument checks, allocation,
// registration. advdl_ops/_conv/choice.py decides which convolutions they serve.

#include "../common/winograd_conv2d.h"

#include <tuple>
#include <vector>

#include "conv2d.h"

namespace advdl_ops {
namespace {

constexpr const char *kPackName = "winograd_pack", *kName = "winograd_conv2d",
                     *kBackwardName = "winograd_conv2d_backward";
constexpr int64_t kSize = 3;  // of the filter

// Without its data, which is set once it is in `layout`.
WinogradWeight weight_of(const Tensor& weight, int64_t tile, bool turned, const char* function) {
  check(weight.dim() == 4 && weight.size(2) == kSize && weight.size(3) == kSize, function,
        "weight must be [C_out, C_in, 3, 3]");
  check(weight.size(0) > 0 && weight.size(1) > 0, function,
        "weight must have an output and an input channel");
  check(dtype_of(weight, function) == DType::f32, function, "dtype must be float32");
  check(tile >= 0 && tile < kWinogradTileCount, function, "unknown tile");
  WinogradWeight w;
  w.c_out = weight.size(turned ? 1 : 0);
  w.c_in = weight.size(turned ? 0 : 1);
  w.tile = static_cast<WinogradTile>(tile);
  w.turned = turned;
  w.layout = format_of(weight);
  return w;
}

Tensor pack(Tensor weight, int64_t tile) {
  WinogradWeight w = weight_of(weight, tile, false, kPackName);
  weight = in_format(weight, w.layout);
  Tensor packed = allocate_vector(weight, cpu::winograd_packed_size(w), weight.scalar_type());
  w.weight = static_cast<const float*>(data(weight));
  cpu::winograd_pack(w, static_cast<float*>(data(packed)));
  return packed;
}

// Of the forward convolution.
WinogradConv2dShape shape_of(const Tensor& x, const Tensor& weight,
                             const std::vector<int64_t>& padding,
                             const std::vector<int64_t>& dilation, int64_t tile,
                             const char* function) {
  const std::vector<int64_t> stride{1, 1};
  check_conv2d(x, weight, stride, padding, dilation, function);
  check(weight.size(1) == x.size(1), function,
        "weight must be [C_out, C_in, 3, 3] with the channels of x");
  WinogradConv2dShape s;
  s.n = x.size(0);
  s.c_in = x.size(1);
  s.c_out = weight.size(0);
  s.h = axis(x, weight, stride, padding, dilation, 0, function);
  s.w = axis(x, weight, stride, padding, dilation, 1, function);
  s.tile = static_cast<WinogradTile>(tile);
  return s;
}

bool is_vector(const OptionalTensor& t, int64_t size, const Tensor& x) {
  return !t.has_value() || (t->dim() == 1 && t->size(0) == size &&
                            t->scalar_type() == x.scalar_type() && t->device() == x.device());
}

int64_t thread_count() {
  uint32_t count = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return count;
}

void run(WinogradConv2dForward& p, const Tensor& weight) {
  p.weight.weight = static_cast<const float*>(data(weight));
  p.threads = thread_count();
  Launch(weight, [&] {
    return cpu::winograd_conv2d_forward_workspace(p);
  }).run(cpu::winograd_conv2d_forward, p);
}

// packed: of winograd_pack, or null: made for this call.
Tensor forward(Tensor x, Tensor weight, OptionalTensor packed, OptionalTensor scale,
               OptionalTensor shift, OptionalTensor residual, std::vector<int64_t> padding,
               std::vector<int64_t> dilation, int64_t tile, int64_t act, double act_param) {
  WinogradConv2dForward p;
  p.weight = weight_of(weight, tile, false, kName);
  p.shape = shape_of(x, weight, padding, dilation, tile, kName);
  const WinogradConv2dShape& s = p.shape;
  check(is_vector(scale, s.c_out, x) && is_vector(shift, s.c_out, x), kName,
        "scale and shift must have one value per output channel, of x's dtype and on its device");
  check(is_vector(packed, cpu::winograd_packed_size(p.weight), x) &&
            (!packed.has_value() || packed->is_contiguous()),
        kName, "packed must come from winograd_pack for this weight and tile");
  check(!residual.has_value() || is_output(*residual, x, s), kName,
        "residual must have the shape of the output and x's dtype and device");
  check(act >= 0 && act < kActivationCount, kName, "unknown activation code");
  const Layout given = format_of(x);
  x = in_format(x, Layout::channels_last);
  weight = in_format(weight, p.weight.layout);
  scale = contiguous(scale);
  shift = contiguous(shift);
  if (residual.has_value()) residual = in_format(*residual, Layout::channels_last);
  Tensor out = allocate_last(x, given, s.n, s.c_out, s.h.out, s.w.out);
  p.act = static_cast<Activation>(act);
  p.act_param = act_param;
  p.x = static_cast<const float*>(data(x));
  p.scale = static_cast<const float*>(data(scale));
  p.shift = static_cast<const float*>(data(shift));
  p.residual = static_cast<const float*>(data(residual));
  p.out = static_cast<float*>(data(out));
  p.packed = static_cast<const float*>(data(packed));
  run(p, weight);
  return in_format(out, given);
}

// dx is a convolution of dz by the turned weight, with the padding that remains of the filter's reach.
Tensor input_gradient(const Tensor& dz, const Tensor& x, const Tensor& weight,
                      const WinogradConv2dShape& s, Layout given) {
  WinogradConv2dForward p;
  p.weight = weight_of(weight, static_cast<int64_t>(s.tile), true, kBackwardName);
  p.shape.n = s.n;
  p.shape.c_in = s.c_out;
  p.shape.c_out = s.c_in;
  p.shape.tile = s.tile;
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
  Tensor dx = allocate_last(x, given, s.n, s.c_in, s.h.in, s.w.in);
  p.x = static_cast<const float*>(data(dz));
  p.out = static_cast<float*>(data(dx));
  run(p, weight);
  return in_format(dx, given);
}

Tensor weight_gradient(const Tensor& dz, const Tensor& x, const WinogradConv2dShape& s,
                       Layout weight_layout) {
  Tensor dweight = allocate_image(x, weight_layout, s.c_out, s.c_in, kSize, kSize);
  WinogradConv2dBackward p;
  p.shape = s;
  p.weight_layout = weight_layout;
  p.threads = thread_count();
  p.dz = static_cast<const float*>(data(dz));
  p.x = static_cast<const float*>(data(x));
  p.dweight = static_cast<float*>(data(dweight));
  Launch(x, [&] {
    return cpu::winograd_conv2d_backward_workspace(p);
  }).run(cpu::winograd_conv2d_backward, p);
  return dweight;
}

std::tuple<Tensor, Tensor> backward(Tensor dz, Tensor x, Tensor weight,
                                    std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                    int64_t dx_tile, int64_t dweight_tile, bool need_dx,
                                    bool need_dweight) {
  const Layout weight_layout = weight_of(weight, dx_tile, false, kBackwardName).layout;
  weight_of(weight, dweight_tile, false, kBackwardName);
  WinogradConv2dShape s = shape_of(x, weight, padding, dilation, dx_tile, kBackwardName);
  check(is_output(dz, x, s), kBackwardName,
        "dz must have the shape of the output and x's dtype and device");
  const Layout given = format_of(x);
  dz = in_format(dz, Layout::channels_last);
  Tensor dx = need_dx ? input_gradient(dz, x, in_format(weight, weight_layout), s, given)
                      : allocate_vector(x, 0, x.scalar_type());
  s.tile = static_cast<WinogradTile>(dweight_tile);
  Tensor dweight = need_dweight
                       ? weight_gradient(dz, in_format(x, Layout::channels_last), s, weight_layout)
                       : allocate_vector(x, 0, x.scalar_type());
  return {dx, dweight};
}

}  // namespace
}  // namespace advdl_ops

STABLE_TORCH_LIBRARY_IMPL(advdl_ops, CPU, m) {
  m.impl("winograd_pack", TORCH_BOX(&advdl_ops::pack));
  m.impl("winograd_conv2d", TORCH_BOX(&advdl_ops::forward));
  m.impl("winograd_conv2d_backward", TORCH_BOX(&advdl_ops::backward));
}
