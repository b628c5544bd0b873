// What the bindings of the convolutions on CPU share: memory formats, checks and axes.
#pragma once

#include <vector>

#include "../common/conv2d_axis.h"
#include "../common/convert_layout.h"
#include "tensor.h"

namespace advdl_ops {

// channels_last only if x is not contiguous as well (conv2d_format in advdl_ops/_schemas.py).
inline Layout format_of(const Tensor& x) {
  return is_channels_last(x) && !x.is_contiguous() ? Layout::channels_last : Layout::channels_first;
}

inline Tensor allocate_image(const Tensor& like, Layout layout, int64_t n, int64_t c, int64_t h,
                             int64_t w, ScalarType dtype) {
  const int64_t sizes[] = {n, c, h, w};
  const auto at_least_one = [](int64_t size) { return size > 0 ? size : 1; };
  c = at_least_one(c), h = at_least_one(h), w = at_least_one(w);
  const int64_t first[] = {c * h * w, h * w, w, 1}, last[] = {h * w * c, 1, w * c, c};
  return allocate(like, sizes, layout == Layout::channels_last ? last : first, 4, dtype);
}
inline Tensor allocate_image(const Tensor& like, Layout layout, int64_t n, int64_t c, int64_t h,
                             int64_t w) {
  return allocate_image(like, layout, n, c, h, w, like.scalar_type());
}

// An image in channels_last memory. If that memory is contiguous as well, the strides are those of `given`.
inline Tensor allocate_last(const Tensor& like, Layout given, int64_t n, int64_t c, int64_t h,
                            int64_t w) {
  const bool is_both = c == 1 || h * w == 1 || n * c * h * w == 0;
  return allocate_image(like, is_both ? given : Layout::channels_last, n, c, h, w);
}

// torch.ops.advdl_ops.convert_layout
inline Tensor convert_layout(Tensor x, bool channels_last) {
  check(x.dim() == 4, "convert_layout", "x must have 4 dimensions");
  const Layout layout = channels_last ? Layout::channels_last : Layout::channels_first;
  ConvertLayout p;
  p.element_bytes = x.element_size();
  const bool is_other = channels_last ? x.is_contiguous() : is_channels_last(x);
  const int64_t n = x.size(0), c = x.size(1), s = x.size(2) * x.size(3);
  Tensor out = allocate_image(x, layout, n, c, x.size(2), x.size(3));
  if (!is_other || (p.element_bytes != 2 && p.element_bytes != 4 && p.element_bytes != 8)) {
    torch::stable::copy_(out, x);
    return out;
  }
  p.n = n;
  p.to_last = channels_last;
  p.rows = channels_last ? c : s;
  p.columns = channels_last ? s : c;
  p.from = data(x);
  p.to = data(out);
  cpu::convert_layout(p);
  return out;
}

// `t` [N, C, H, W] in this layout: itself or a copy.
inline Tensor in_format(const Tensor& t, Layout layout) {
  const bool is_last = layout == Layout::channels_last;
  return (is_last ? is_channels_last(t) : t.is_contiguous()) ? t : convert_layout(t, is_last);
}

// Whether `t` has the shape `s` of an output, and x's dtype and device.
template <class Shape>
bool is_output(const Tensor& t, const Tensor& x, const Shape& s) {
  return t.dim() == 4 && t.size(0) == s.n && t.size(1) == s.c_out && t.size(2) == s.h.out &&
         t.size(3) == s.w.out && t.scalar_type() == x.scalar_type() && t.device() == x.device();
}

// The checks of every convolution. They run before any size of these arguments is read.
inline void check_conv2d(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                         const char* function) {
  check(x.dim() == 4 && weight.dim() == 4, function, "x and weight must have 4 dimensions");
  check(weight.scalar_type() == x.scalar_type() && weight.device() == x.device(), function,
        "weight must have the dtype and device of x");
  check(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, function,
        "stride, padding and dilation must be of two numbers each");
}

inline Conv2dAxis axis(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                       int i, const char* function) {
  Conv2dAxis a;
  a.in = x.size(2 + i);
  a.kernel = weight.size(2 + i);
  a.stride = stride[i];
  a.padding = padding[i];
  a.dilation = dilation[i];
  check(a.stride > 0 && a.dilation > 0 && a.padding >= 0 && a.kernel > 0, function,
        "stride, dilation and the kernel must be positive, padding not negative");
  constexpr int64_t kLargest = int64_t{1} << 40;  // sums of such numbers do not overflow
  check(a.stride < kLargest && a.padding < kLargest && a.dilation < kLargest / a.kernel, function,
        "stride, padding and the filter's reach must be less than 2^40");
  const int64_t room = a.in + 2 * a.padding - a.reach() - 1;
  check(room >= 0, function, "the kernel must not be larger than the padded input");
  a.out = room / a.stride + 1;
  if (a.out == 1) a.stride = 1;  // the stride has no effect; kernels need not handle a large one
  return a;
}

}  // namespace advdl_ops
