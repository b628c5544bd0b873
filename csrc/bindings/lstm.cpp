// torch.ops.advdl_ops.lstm, lstm_cell and their backward: argument checks, allocation, registration.
#include "../common/lstm.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "tensor.h"

namespace advdl_ops {
namespace {

constexpr const char *kName = "lstm", *kCellName = "lstm_cell";

// The arguments that forward and backward share, in the order of the schema.
struct Arguments {
  Tensor x;
  OptionalTensor h0, c0, w_ih;
  Tensor w_hh;
  OptionalTensor b_ih, b_hh, w_hr, lengths, batch_sizes;
  OptionalTensor recurrent_mask, zoneout_c_mask, zoneout_h_mask;
  double zoneout_c = 0, zoneout_h = 0;
  OptionalTensor ln_hh_weight, ln_hh_bias, ln_c_weight, ln_c_bias;
  double eps = 1e-5;
  bool batch_first = false, reverse = false;
  bool cell = false;  // x is [B, I], one step of every sequence

  int64_t gates() const { return w_hh.size(0); }
  int64_t hidden() const { return w_hh.size(0) / kGates; }
  int64_t recurrent() const { return w_hh.size(1); }
  int64_t steps() const {
    if (cell) return 1;
    return batch_sizes.has_value() ? batch_sizes->size(0) : x.size(batch_first ? 1 : 0);
  }
  int64_t batch() const {
    if (cell) return x.size(0);
    return batch_sizes.has_value() ? h0->size(0) : x.size(batch_first ? 0 : 1);
  }
  static constexpr int64_t kGates = 4;
};

struct ForwardOutputs {
  Tensor y, h_n, c_n, gates, cells, products;
};
struct BackwardInputs {
  OptionalTensor dy, dh_n, dc_n;
  Tensor y, gates, cells, products;
};
struct BackwardOutputs {
  Tensor dx, dh0, dc0, dw_ih, dw_hh, dbias, dw_hr, dln_hh_weight, dln_c_weight, dln_c_bias;
};

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

const int64_t* integers(const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); }

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

// Rows of `t` [T, B, ...], [B, T, ...] or [rows, ...], elements of a row side by side.
Tensor with_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}
OptionalTensor with_rows(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(with_rows(*t)) : std::nullopt;
}

// Uninitialised rows of `size` elements, as many as x has, or none.
Tensor allocate_rows(const Tensor& x, int64_t size, bool wanted = true) {
  if (!wanted) return allocate_vector(x, 0, x.scalar_type());
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(sizes.size());
  sizes.back() = size;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return allocate(x, sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()),
                  x.scalar_type());
}
// A gradient of a weight, empty where it is not wanted.
Tensor allocate_gradient(const Tensor& x, const OptionalTensor& weight, bool wanted) {
  const ScalarType acc = acc_type(x.scalar_type());
  if (!wanted || !weight.has_value()) return allocate_vector(x, 0, acc);
  return weight->dim() == 1 ? allocate_vector(x, weight->size(0), acc)
                            : allocate_matrix(x, weight->size(0), weight->size(1), acc);
}

LstmLayerNorm norm_of(const Arguments& a) {
  return {a.eps, data(a.ln_hh_weight), data(a.ln_hh_bias), data(a.ln_c_weight), data(a.ln_c_bias)};
}

void make_contiguous(Arguments& a) {
  a.x = with_rows(a.x);
  a.w_hh = *contiguous(OptionalTensor(a.w_hh));
  for (OptionalTensor* t :
       {&a.h0, &a.c0, &a.w_ih, &a.b_ih, &a.b_hh, &a.w_hr, &a.recurrent_mask, &a.zoneout_c_mask,
        &a.zoneout_h_mask, &a.ln_hh_weight, &a.ln_hh_bias, &a.ln_c_weight, &a.ln_c_bias})
    *t = contiguous(*t);
}

}  // namespace
}  // namespace advdl_ops

#if defined(USE_CUDA)
#include "lstm_steps.h"
#else

namespace advdl_ops {
namespace {

// LstmSequences of the arguments, and the arrays that it points to.
class Sequences {
 public:
  explicit Sequences(const Arguments& a) {
    sequences_.steps = a.steps();
    sequences_.batch = a.batch();
    sequences_.reverse = a.reverse;
    if (a.batch_sizes.has_value()) {
      sequences_.batch_sizes = integers(*a.batch_sizes);
      starts_.resize(sequences_.steps);
      std::exclusive_scan(sequences_.batch_sizes, sequences_.batch_sizes + sequences_.steps,
                          starts_.begin(), int64_t{0});
      sequences_.starts = starts_.data();
    } else if (a.lengths.has_value()) {
      sort(integers(*a.lengths));
    }
  }
  operator const LstmSequences&() const { return sequences_; }

 private:
  void sort(const int64_t* lengths) {
    for (int64_t k = 0; k < sequences_.batch; ++k)
      check(lengths[k] >= 1 && lengths[k] <= sequences_.steps, kName,
            "lengths must lie in 1 .. the steps of x");
    order_.resize(sequences_.batch);
    std::iota(order_.begin(), order_.end(), int64_t{0});
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    batch_sizes_.resize(sequences_.steps);
    int64_t active = sequences_.batch;
    for (int64_t t = 0; t < sequences_.steps; ++t) {
      while (active > 0 && lengths[order_[active - 1]] <= t) --active;
      batch_sizes_[t] = active;
    }
    sequences_.order = order_.data();
    sequences_.batch_sizes = batch_sizes_.data();
  }

  LstmSequences sequences_;
  std::vector<int64_t> order_, batch_sizes_, starts_;
};

// The rows of a tensor as the arguments have them; null where it is empty or not given.
template <class Rows>
Rows rows_of(const Arguments& a, const OptionalTensor& t) {
  if (!t.has_value() || t->numel() == 0) return {};
  using Pointer = decltype(Rows::data);
  const auto pointer = static_cast<Pointer>(t->data_ptr());
  if (a.batch_sizes.has_value()) return {pointer, t->stride(0), 0};
  if (a.cell) return {pointer, 0, t->stride(0)};
  return {pointer, t->stride(a.batch_first ? 1 : 0), t->stride(a.batch_first ? 0 : 1)};
}

// What the parameters of both passes have in common.
template <class Params>
Params params_of(const Arguments& a, const LstmSequences& sequences) {
  Params p;
  p.shape.sequences = sequences;
  p.shape.input = a.x.size(a.x.dim() - 1);
  p.shape.hidden = a.hidden();
  p.shape.projection = a.w_hr.has_value() ? a.recurrent() : 0;
  p.shape.dtype = dtype_of(a.x, kName);
  p.weights.w_ih = data(a.w_ih);
  p.weights.w_hh = data(a.w_hh);
  p.weights.b_ih = data(a.b_ih);
  p.weights.b_hh = data(a.b_hh);
  p.weights.w_hr = data(a.w_hr);
  p.weights.recurrent_mask = data(a.recurrent_mask);
  p.weights.norm = norm_of(a);
  using Mask = LstmRows<const uint8_t*>;
  p.zoneout_c = {rows_of<Mask>(a, a.zoneout_c_mask), a.zoneout_c};
  p.zoneout_h = {rows_of<Mask>(a, a.zoneout_h_mask), a.zoneout_h};
  p.x = rows_of<LstmInput>(a, a.x);
  p.h0 = data(a.h0);
  p.c0 = data(a.c0);
  return p;
}

void run_forward(const Arguments& a, const ForwardOutputs& o) {
  const Sequences sequences(a);
  auto p = params_of<LstmForward>(a, sequences);
  p.y = rows_of<LstmOutput>(a, o.y);
  p.h_n = data(o.h_n);
  p.c_n = data(o.c_n);
  p.gates = rows_of<LstmOutput>(a, o.gates);
  p.cells = rows_of<LstmOutput>(a, o.cells);
  p.products = rows_of<LstmOutput>(a, o.products);
  if (a.batch() == 0) return;
  Launch(a.x, [&] { return cpu::lstm_forward_workspace(p); }).run(cpu::lstm_forward, p);
}

void run_backward(const Arguments& a, const BackwardInputs& in, const BackwardOutputs& o) {
  const Sequences sequences(a);
  auto p = params_of<LstmBackward>(a, sequences);
  p.y = rows_of<LstmInput>(a, in.y);
  p.gates = rows_of<LstmInput>(a, in.gates);
  p.cells = rows_of<LstmInput>(a, in.cells);
  p.products = rows_of<LstmInput>(a, in.products);
  p.dy = rows_of<LstmInput>(a, in.dy);
  p.dh_n = data(in.dh_n);
  p.dc_n = data(in.dc_n);
  p.dx = rows_of<LstmOutput>(a, o.dx);
  p.dh0 = data(o.dh0);
  p.dc0 = data(o.dc0);
  const auto wanted = [](const Tensor& t) { return data_or_null(t, t.numel() > 0); };
  p.dw_ih = wanted(o.dw_ih);
  p.dw_hh = wanted(o.dw_hh);
  p.dbias = wanted(o.dbias);
  p.dw_hr = wanted(o.dw_hr);
  p.dhh_weight = wanted(o.dln_hh_weight);
  p.dc_weight = wanted(o.dln_c_weight);
  p.dc_bias = wanted(o.dln_c_bias);
  Launch(a.x, [&] { return cpu::lstm_backward_workspace(p); }).run(cpu::lstm_backward, p);
}

}  // namespace
}  // namespace advdl_ops
#endif

namespace advdl_ops {
namespace {

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

// Of what the schemas of both operators have in common, in their order.
template <class... Given>
Arguments checked(const Given&... given) {
  Arguments a{given...};
  check_weights(kName, a);
  check_sequences(a);
  check_states(kName, a);
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor x, OptionalTensor h0, OptionalTensor c0, OptionalTensor w_ih, Tensor w_hh,
    OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr, OptionalTensor lengths,
    OptionalTensor batch_sizes, OptionalTensor recurrent_mask, OptionalTensor zoneout_c_mask,
    OptionalTensor zoneout_h_mask, double zoneout_c, double zoneout_h, OptionalTensor ln_hh_weight,
    OptionalTensor ln_hh_bias, OptionalTensor ln_c_weight, OptionalTensor ln_c_bias, double eps,
    bool batch_first, bool reverse, bool save) {
  Arguments a =
      checked(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, batch_sizes, recurrent_mask,
              zoneout_c_mask, zoneout_h_mask, zoneout_c, zoneout_h, ln_hh_weight, ln_hh_bias,
              ln_c_weight, ln_c_bias, eps, batch_first, reverse);
  ForwardOutputs o = allocate_and_run(a, save);
  return {o.y, o.h_n, o.c_n, o.gates, o.cells, o.products};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Tensor x, OptionalTensor h0,
    OptionalTensor c0, OptionalTensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
    OptionalTensor w_hr, OptionalTensor lengths, OptionalTensor batch_sizes,
    OptionalTensor recurrent_mask, OptionalTensor zoneout_c_mask, OptionalTensor zoneout_h_mask,
    double zoneout_c, double zoneout_h, OptionalTensor ln_hh_weight, OptionalTensor ln_hh_bias,
    OptionalTensor ln_c_weight, OptionalTensor ln_c_bias, double eps, bool batch_first,
    bool reverse, Tensor y, Tensor gates, Tensor cells, Tensor products, bool need_dx,
    bool need_dw_ih, bool need_dw_hh, bool need_dbias, bool need_dw_hr) {
  Arguments a =
      checked(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, batch_sizes, recurrent_mask,
              zoneout_c_mask, zoneout_h_mask, zoneout_c, zoneout_h, ln_hh_weight, ln_hh_bias,
              ln_c_weight, ln_c_bias, eps, batch_first, reverse);
  BackwardInputs in{dy, dh_n, dc_n, y, gates, cells, products};
  check_saved(kName, a, in);
  BackwardOutputs o =
      allocate_and_run_backward(a, in, {need_dx, need_dw_ih, need_dw_hh, need_dbias, need_dw_hr});
  return {o.dx,    o.dh0,   o.dc0,           o.dw_ih,        o.dw_hh,
          o.dbias, o.dw_hr, o.dln_hh_weight, o.dln_c_weight, o.dln_c_bias};
}

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
}  // namespace advdl_ops

STABLE_TORCH_LIBRARY_IMPL(advdl_ops, ADVDL_DISPATCH_KEY, m) {
  m.impl("lstm", TORCH_BOX(&advdl_ops::forward));
  m.impl("lstm_cell", TORCH_BOX(&advdl_ops::cell_forward));
  m.impl("lstm_cell_backward", TORCH_BOX(&advdl_ops::cell_backward));
  m.impl("lstm_backward", TORCH_BOX(&advdl_ops::backward));
}
