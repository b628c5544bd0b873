// torch.ops.advdl_ops.lstm, lstm_cell and their backward: argument checks, allocation, registration.
#include "lstm.h"

#include <algorithm>
#include <tuple>

namespace advdl_ops::lstm {
namespace {

constexpr const char* kCellName = "lstm_cell";

bool has_sizes(const OptionalTensor& t, std::initializer_list<int64_t> sizes) {
  if (!t.has_value()) return true;
  const auto found = t->sizes();
  return std::equal(found.begin(), found.end(), sizes.begin(), sizes.end());
}

void check_like(const char* function, const OptionalTensor& t, const Tensor& x,
                std::initializer_list<int64_t> sizes, const char* message) {
  check(has_sizes(t, sizes), function, message);
  check(!t.has_value() || (t->scalar_type() == x.scalar_type() && t->device() == x.device()),
        function, "all tensors must be of x's dtype and on its device");
}

void check_weights(const char* function, const Arguments& a) {
  dtype_of(a.x, function);
  check(a.x.dim() >= 2, function, "x must have 2 or 3 dimensions");
  check(a.eps >= 0, function, "eps must not be negative");
  check(a.w_hh.dim() == 2 && a.gates() % Arguments::kGates == 0 && a.gates() > 0, function,
        "w_hh must be [4 * hidden_size, hidden_size], or [4 * hidden_size, proj_size]");
  const int64_t gates = a.gates(), hidden = a.hidden(), size = a.recurrent();
  const int64_t input = a.x.size(a.x.dim() - 1);
  check(a.w_ih.has_value() || input == gates, function,
        "x must have 4 * hidden_size features without w_ih");
  check_like(function, a.w_hh, a.x, {gates, size}, "w_hh");
  check_like(function, a.w_ih, a.x, {gates, input},
             "w_ih must be [4 * hidden_size, features of x]");
  check_like(function, a.b_ih, a.x, {gates}, "b_ih must be [4 * hidden_size]");
  check_like(function, a.b_hh, a.x, {gates}, "b_hh must be [4 * hidden_size]");
  if (a.w_hr.has_value()) {
    check_like(function, a.w_hr, a.x, {size, hidden}, "w_hr must be [proj_size, hidden_size]");
    check(size < hidden, function, "proj_size must be less than hidden_size");
  } else {
    check(size == hidden, function, "w_hh must be [4 * hidden_size, hidden_size] without w_hr");
  }
  const bool norm = a.ln_hh_weight.has_value();
  check(a.ln_hh_bias.has_value() == norm && a.ln_c_weight.has_value() == norm &&
            a.ln_c_bias.has_value() == norm,
        function, "the weights and biases of layer norm must be given all or not at all");
  check_like(function, a.ln_hh_weight, a.x, {gates}, "ln_hh_weight must be [4 * hidden_size]");
  check_like(function, a.ln_hh_bias, a.x, {gates}, "ln_hh_bias must be [4 * hidden_size]");
  check_like(function, a.ln_c_weight, a.x, {hidden}, "ln_c_weight must be [hidden_size]");
  check_like(function, a.ln_c_bias, a.x, {hidden}, "ln_c_bias must be [hidden_size]");
}

void check_states(const char* function, const Arguments& a) {
  check_like(function, a.h0, a.x, {a.batch(), a.recurrent()},
             "h must be [batch, hidden_size], or [batch, proj_size]");
  check_like(function, a.c0, a.x, {a.batch(), a.hidden()}, "c must be [batch, hidden_size]");
}

bool is_mask(const OptionalTensor& mask, const Tensor& x, int64_t size) {
  if (!mask.has_value()) return true;
  if (mask->scalar_type() != ScalarType::Byte || mask->device() != x.device() ||
      mask->dim() != x.dim() || mask->size(x.dim() - 1) != size)
    return false;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    if (mask->size(i) != x.size(i)) return false;
  }
  return true;
}

// A vector of int64, on any device.
bool is_index(const Tensor& t) { return t.dim() == 1 && t.scalar_type() == ScalarType::Long; }

void check_sequences(const Arguments& a) {
  check(a.x.dim() == (a.batch_sizes.has_value() ? 2 : 3), kName,
        "x must have 3 dimensions, or 2 with batch_sizes");
  check(a.steps() > 0, kName, "x must have a time step at least");
  if (a.batch_sizes.has_value()) {
    const Tensor& sizes = *a.batch_sizes;
    check(!a.lengths.has_value(), kName, "lengths and batch_sizes must not both be given");
    check(a.h0.has_value(), kName, "h0 must be given beside batch_sizes");
    check(is_index(sizes) && sizes.is_cpu() && sizes.is_contiguous(), kName,
          "batch_sizes must be a contiguous vector of int64 on the CPU");
    int64_t before = a.batch(), rows = 0;
    check(integers(sizes)[0] == before, kName, "h0 must have batch_sizes[0] rows");
    for (int64_t t = 0; t < sizes.size(0); ++t) {
      const int64_t size = integers(sizes)[t];
      check(size >= 1 && size <= before, kName, "batch_sizes must be positive and not ascend");
      before = size;
      rows += size;
    }
    check(rows == a.x.size(0), kName, "x must have as many rows as batch_sizes sum up to");
  }
  if (a.lengths.has_value()) {
    check(is_index(*a.lengths) && a.lengths->size(0) == a.batch() && a.lengths->is_contiguous() &&
              a.lengths->device() == a.x.device(),
          kName, "lengths must be [batch] of int64, contiguous, on x's device");
  }
  check_like(kName, a.recurrent_mask, a.x, {a.batch(), a.recurrent()},
             "recurrent_mask must be as h0");
  check(is_mask(a.zoneout_c_mask, a.x, a.hidden()) && is_mask(a.zoneout_h_mask, a.x, a.recurrent()),
        kName, "the masks of zoneout must be of uint8, with a row for each of x's");
  check(a.zoneout_c >= 0 && a.zoneout_c <= 1 && a.zoneout_h >= 0 && a.zoneout_h <= 1, kName,
        "zoneout must lie in 0 .. 1");
}

// `t` [T, B, ...], [B, T, ...] or [rows, ...]: itself if each row is contiguous, else a contiguous copy.
Tensor with_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}
OptionalTensor with_rows(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(with_rows(*t)) : std::nullopt;
}

// An uninitialised gradient of a weight, empty if not wanted.
Tensor allocate_gradient(const Tensor& x, const OptionalTensor& weight, bool wanted) {
  const ScalarType acc = acc_type(x.scalar_type());
  if (!wanted || !weight.has_value()) return allocate_vector(x, 0, acc);
  return weight->dim() == 1 ? allocate_vector(x, weight->size(0), acc)
                            : allocate_matrix(x, weight->size(0), weight->size(1), acc);
}

void make_contiguous(Arguments& a) {
  a.x = with_rows(a.x);
  a.w_hh = *contiguous(OptionalTensor(a.w_hh));
  for (OptionalTensor* t :
       {&a.h0, &a.c0, &a.w_ih, &a.b_ih, &a.b_hh, &a.w_hr, &a.recurrent_mask, &a.zoneout_c_mask,
        &a.zoneout_h_mask, &a.ln_hh_weight, &a.ln_hh_bias, &a.ln_c_weight, &a.ln_c_bias})
    *t = contiguous(*t);
}

ForwardOutputs allocate_and_run(Arguments& a, bool save) {
  make_contiguous(a);
  const ScalarType dtype = a.x.scalar_type();
  const bool norm = a.ln_hh_weight.has_value();
  ForwardOutputs o{allocate_rows(a.x, a.recurrent(), !a.cell),
                   allocate_matrix(a.x, a.batch(), a.recurrent(), dtype),
                   allocate_matrix(a.x, a.batch(), a.hidden(), dtype),
                   allocate_rows(a.x, a.gates(), save),
                   allocate_rows(a.x, a.hidden(), save && !a.cell),
                   allocate_rows(a.x, a.gates(), save && norm)};
  run_forward(a, o);
  return o;
}

struct Wanted {
  bool dx, dw_ih, dw_hh, dbias, dw_hr;
};
BackwardOutputs allocate_and_run_backward(Arguments& a, BackwardInputs& in, const Wanted& need) {
  make_contiguous(a);
  in.dy = with_rows(in.dy);
  in.dh_n = contiguous(in.dh_n);
  in.dc_n = contiguous(in.dc_n);
  const ScalarType dtype = a.x.scalar_type();
  const bool norm = a.ln_hh_weight.has_value();
  BackwardOutputs o{
      allocate_rows(a.x, a.x.size(a.x.dim() - 1), need.dx),
      allocate_matrix(a.x, a.batch(), a.recurrent(), dtype),
      allocate_matrix(a.x, a.batch(), a.hidden(), dtype),
      allocate_gradient(a.x, a.w_ih, need.dw_ih),
      allocate_gradient(a.x, a.w_hh, need.dw_hh),
      allocate_vector(a.x, need.dbias ? a.gates() : 0, acc_type(dtype)),
      allocate_gradient(a.x, a.w_hr, need.dw_hr),
      allocate_gradient(a.x, a.ln_hh_weight, norm),
      allocate_gradient(a.x, a.ln_c_weight, norm),
      allocate_gradient(a.x, a.ln_c_bias, norm),
  };
  run_backward(a, in, o);
  return o;
}

void check_saved(const char* function, const Arguments& a, const BackwardInputs& in) {
  const int64_t rows = a.x.numel() / std::max<int64_t>(a.x.size(a.x.dim() - 1), 1);
  const auto are_rows = [&](const Tensor& t, int64_t size) {
    return t.numel() == rows * size && t.dim() == a.x.dim() && t.is_contiguous() &&
           t.scalar_type() == a.x.scalar_type() && t.device() == a.x.device();
  };
  const bool norm = a.ln_hh_weight.has_value();
  check((a.cell || are_rows(in.y, a.recurrent())) && are_rows(in.gates, a.gates()) &&
            (a.cell || are_rows(in.cells, a.hidden())) &&
            (!norm || are_rows(in.products, a.gates())),
        function, "y, gates, cells and products must be as forward returned them");
  check(!in.dy.has_value() ||
            (in.dy->numel() == rows * a.recurrent() && in.dy->dim() == a.x.dim() &&
             in.dy->device() == a.x.device() && in.dy->scalar_type() == a.x.scalar_type()),
        function, "dy must be as y");
  check_like(function, in.dh_n, a.x, {a.batch(), a.recurrent()}, "dh_n must be as h_n");
  check_like(function, in.dc_n, a.x, {a.batch(), a.hidden()}, "dc_n must be as c_n");
}

// The operators lstm and lstm_backward. `Shared` are the types of the arguments of both, in the order of `Arguments`.
template <class... Shared>
struct Operators {
  static Arguments checked(const Shared&... shared) {
    Arguments a{shared...};
    check_weights(kName, a);
    check_sequences(a);
    check_states(kName, a);
    return a;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(Shared... shared,
                                                                            bool save) {
    Arguments a = checked(shared...);
    ForwardOutputs o = allocate_and_run(a, save);
    return {o.y, o.h_n, o.c_n, o.gates, o.cells, o.products};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
  backward(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Shared... shared, Tensor y,
           Tensor gates, Tensor cells, Tensor products, bool need_dx, bool need_dw_ih,
           bool need_dw_hh, bool need_dbias, bool need_dw_hr) {
    Arguments a = checked(shared...);
    BackwardInputs in{dy, dh_n, dc_n, y, gates, cells, products};
    check_saved(kName, a, in);
    BackwardOutputs o =
        allocate_and_run_backward(a, in, {need_dx, need_dw_ih, need_dw_hh, need_dbias, need_dw_hr});
    return {o.dx,    o.dh0,   o.dc0,           o.dw_ih,        o.dw_hh,
            o.dbias, o.dw_hr, o.dln_hh_weight, o.dln_c_weight, o.dln_c_bias};
  }
};
// clang-format off
using Sequence = Operators<
    Tensor, OptionalTensor, OptionalTensor, OptionalTensor, Tensor,  // x, h0, c0, w_ih, w_hh
    OptionalTensor, OptionalTensor, OptionalTensor,                  // b_ih, b_hh, w_hr
    OptionalTensor, OptionalTensor,                                  // lengths, batch_sizes
    OptionalTensor, OptionalTensor, OptionalTensor,                  // masks
    double, double,                                                  // zoneout_c, zoneout_h
    OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,  // layer norms
    double, bool, bool>;                                             // eps, batch_first, reverse
// clang-format on

Arguments cell_arguments(Tensor x, OptionalTensor h, OptionalTensor c, Tensor w_ih, Tensor w_hh,
                         OptionalTensor b_ih, OptionalTensor b_hh) {
  Arguments a;
  a.x = x;
  a.h0 = h;
  a.c0 = c;
  a.w_ih = w_ih;
  a.w_hh = w_hh;
  a.b_ih = b_ih;
  a.b_hh = b_hh;
  a.cell = true;
  check(x.dim() == 2, kCellName, "x must have 2 dimensions");
  check_weights(kCellName, a);
  check_states(kCellName, a);
  return a;
}

std::tuple<Tensor, Tensor, Tensor> cell_forward(Tensor x, OptionalTensor h, OptionalTensor c,
                                                Tensor w_ih, Tensor w_hh, OptionalTensor b_ih,
                                                OptionalTensor b_hh, bool save) {
  Arguments a = cell_arguments(x, h, c, w_ih, w_hh, b_ih, b_hh);
  ForwardOutputs o = allocate_and_run(a, save);
  return {o.h_n, o.c_n, o.gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cell_backward(
    OptionalTensor dh, OptionalTensor dc, Tensor x, OptionalTensor h, OptionalTensor c, Tensor w_ih,
    Tensor w_hh, Tensor gates, bool need_dx, bool need_dw_ih, bool need_dw_hh, bool need_dbias) {
  Arguments a = cell_arguments(x, h, c, w_ih, w_hh, std::nullopt, std::nullopt);
  BackwardInputs in{std::nullopt, dh, dc, gates, gates, gates, gates};
  check_saved(kCellName, a, in);
  BackwardOutputs o =
      allocate_and_run_backward(a, in, {need_dx, need_dw_ih, need_dw_hh, need_dbias, false});
  return {o.dx, o.dh0, o.dc0, o.dw_ih, o.dw_hh, o.dbias};
}

}  // namespace
}  // namespace advdl_ops::lstm

STABLE_TORCH_LIBRARY_IMPL(advdl_ops, ADVDL_DISPATCH_KEY, m) {
  m.impl("lstm", TORCH_BOX(&advdl_ops::lstm::Sequence::forward));
  m.impl("lstm_cell", TORCH_BOX(&advdl_ops::lstm::cell_forward));
  m.impl("lstm_cell_backward", TORCH_BOX(&advdl_ops::lstm::cell_backward));
  m.impl("lstm_backward", TORCH_BOX(&advdl_ops::lstm::Sequence::backward));
}
