// The LSTM on CUDA, step by step: torch computes the matrix products, csrc/cuda/lstm.cu the rest. docs/kernels.md
// counts launches.
//
// Everything runs on the current stream without synchronization. The host reads the values of batch_sizes only, which
// are in host memory. So CUDA graphs can capture a call.
#include <array>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "lstm.h"

namespace advdl_ops::lstm {
namespace {

// ---- matrices ----

// A matrix view of the memory of `t` from element `at` on. Autograd does not track it, so operators accept it as `out`.
Tensor matrix_of(const Tensor& t, int64_t at, std::array<int64_t, 2> sizes,
                 std::array<int64_t, 2> strides) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), 2, sizes.data(), strides.data(), at, &handle));
  return Tensor(handle);
}
int64_t width_of(const Tensor& t) { return t.size(t.dim() - 1); }
int64_t count_rows(const Tensor& t) {
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) count *= t.size(i);
  return count;
}
// All rows of a contiguous tensor as a matrix.
Tensor all_rows(const Tensor& t) {
  const int64_t width = width_of(t);
  return matrix_of(t, 0, {count_rows(t), width}, {width, 1});
}
// The first `rows` of a contiguous matrix.
Tensor first_rows(const Tensor& t, int64_t rows) {
  return matrix_of(t, 0, {rows, width_of(t)}, {width_of(t), 1});
}
// The transpose of all_rows(t).
Tensor transposed(const Tensor& t) {
  const int64_t width = width_of(t);
  return matrix_of(t, 0, {width, count_rows(t)}, {1, width});
}

// out = a b. `out` may be fp32 with half-precision factors.
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  if (out.scalar_type() == a.scalar_type()) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  } else {
    std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }
}

// out = the sum of the rows.
void sum_rows(const Tensor& rows, Tensor out) {
  const int64_t dimension = 0;
  torch::stable::sum_out(out, all_rows(rows),
                         torch::headeronly::IntHeaderOnlyArrayRef(&dimension, 1), false,
                         out.scalar_type());
}

// Copies a tensor with the same rows into a matrix, or fills it with zeros.
void set(Tensor to, const OptionalTensor& from) {
  if (from.has_value()) {
    torch::stable::copy_(to, all_rows(*from));
  } else {
    torch::stable::zero_(to);
  }
}

// ---- times ----

// Which sequences have a time step, and where its rows are in tensors with x's layout.
class Times {
 public:
  explicit Times(const Arguments& a) : a_(a), steps_(a.steps()) {
    if (!a.batch_sizes.has_value()) return;
    const int64_t* sizes = integers(*a.batch_sizes);
    sizes_.assign(sizes, sizes + steps_);
    starts_.resize(steps_);
    for (int64_t t = 1; t < steps_; ++t) starts_[t] = starts_[t - 1] + sizes_[t - 1];
  }
  int64_t steps() const { return steps_; }
  // The time of a step. Steps are numbered in forward's order.
  int64_t of_step(int64_t step) const { return a_.reverse ? steps_ - 1 - step : step; }
  int64_t rows(int64_t time) const { return sizes_.empty() ? a_.batch() : sizes_[time]; }

  // The rows of a time; null if the tensor is empty or not given.
  template <class Pointer>
  LstmStepRows<Pointer> at(const OptionalTensor& t, int64_t time) const {
    if (!t.has_value() || t->numel() == 0) return {};
    using Byte =
        std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
    Byte* first = static_cast<char*>(t->data_ptr()) + offset(*t, time) * t->element_size();
    return {reinterpret_cast<Pointer>(first), stride(*t)};
  }
  LstmStepRows<const void*> in(const OptionalTensor& t, int64_t time) const {
    return at<const void*>(t, time);
  }
  LstmStepRows<void*> out(const Tensor& t, int64_t time) const { return at<void*>(t, time); }
  Tensor matrix(const Tensor& t, int64_t time) const {
    return matrix_of(t, offset(t, time), {rows(time), width_of(t)}, {stride(t), 1});
  }

 private:
  int64_t offset(const Tensor& t, int64_t time) const {
    if (a_.cell) return 0;
    return sizes_.empty() ? time * t.stride(a_.batch_first ? 1 : 0) : starts_[time] * t.stride(0);
  }
  int64_t stride(const Tensor& t) const {
    return t.stride(a_.cell || !sizes_.empty() || a_.batch_first ? 0 : 1);
  }

  const Arguments& a_;
  int64_t steps_;
  std::vector<int64_t> sizes_, starts_;  // packed only
};

LstmStep step_of(const Arguments& a, const Times& times, int64_t time) {
  LstmStep step;
  step.rows = times.rows(time);
  step.hidden = a.hidden();
  step.projection = a.w_hr.has_value() ? a.recurrent() : 0;
  step.dtype = dtype_of(a.x, kName);
  step.lengths = static_cast<const int64_t*>(data(a.lengths));
  step.time = time;
  step.zoneout_c_mask = times.at<const uint8_t*>(a.zoneout_c_mask, time);
  step.zoneout_h_mask = times.at<const uint8_t*>(a.zoneout_h_mask, time);
  step.zoneout_c = a.zoneout_c;
  step.zoneout_h = a.zoneout_h;
  return step;
}

// A step of all sequences that only reads or writes h.
LstmStep state_step(const Arguments& a) {
  LstmStep step;
  step.rows = a.batch();
  step.hidden = a.recurrent();
  step.dtype = dtype_of(a.x, kName);
  return step;
}

// The first rows of `t`. The last view is kept, because the number of rows seldom changes from step to step.
class FirstRows {
 public:
  explicit FirstRows(Tensor t) : t_(std::move(t)) {}
  const Tensor& operator()(int64_t rows) {
    if (!part_.has_value() || part_->size(0) != rows) part_ = first_rows(t_, rows);
    return *part_;
  }

 private:
  Tensor t_;
  OptionalTensor part_;
};

// Calls a launcher of csrc/common/lstm.h. None needs a workspace.
template <auto kernel, class Params, class... Arguments>
void run_step(Launch& launch, const Params& p, const Arguments&... arguments) {
  launch.run([&](const Params&, void*, void* stream) { kernel(p, arguments..., stream); }, p);
}

// A contiguous x with zeros in place of the padding.
Tensor without_padding(const Arguments& a, Launch& launch) {
  if (!a.lengths.has_value()) return *contiguous(OptionalTensor(a.x));
  const Tensor copy = allocate_rows(a.x, width_of(a.x));
  const int64_t time = a.batch_first ? 1 : 0, batch = 1 - time;
  LstmPadding p;
  p.steps = a.steps();
  p.batch = a.batch();
  p.width = width_of(a.x);
  p.dtype = dtype_of(a.x, kName);
  p.lengths = static_cast<const int64_t*>(data(a.lengths));
  p.x = {data(a.x), a.x.stride(time), a.x.stride(batch)};
  p.out = {data(copy), copy.stride(time), copy.stride(batch)};
  run_step<cuda::lstm_without_padding>(launch, p);
  return copy;
}

}  // namespace

// ---- forward ----

void run_forward(const Arguments& a, const ForwardOutputs& o) {
  const int64_t batch = a.batch(), hidden = a.hidden(), size = a.recurrent();
  if (batch == 0) return;
  const ScalarType dtype = a.x.scalar_type(), acc = acc_type(dtype);
  Launch launch(a.x, [] { return size_t{0}; });
  const Times times(a);

  // w_ih x of all steps. The gates of a step overwrite it.
  Tensor projected = a.x;
  if (a.w_ih.has_value()) {
    projected = o.gates.numel() > 0 ? o.gates : allocate_rows(a.x, a.gates());
    multiply(all_rows(*contiguous(OptionalTensor(a.x))), transposed(*a.w_ih), all_rows(projected));
  }
  const Tensor c = acc == dtype ? o.c_n : allocate_matrix(a.x, batch, hidden, acc);
  set(c, a.c0);
  LstmStepForward p;
  p.h = data(o.h_n);
  Tensor fed = o.h_n;
  if (a.recurrent_mask.has_value()) {
    fed = allocate_matrix(a.x, batch, size, dtype);
    p.fed = data(fed);
    p.recurrent_mask = data(a.recurrent_mask);
  }
  if (a.h0.has_value()) {
    p.step = state_step(a);
    run_step<cuda::lstm_step_output>(launch, p, data(*a.h0));
  } else {
    set(o.h_n, std::nullopt);
    if (a.recurrent_mask.has_value()) set(fed, std::nullopt);
  }

  const Tensor weight = transposed(a.w_hh);
  FirstRows fed_rows(fed), product_rows(allocate_matrix(a.x, batch, a.gates(), dtype));
  std::optional<FirstRows> hidden_rows, output_rows;
  OptionalTensor output_weight;
  if (a.w_hr.has_value()) {
    hidden_rows.emplace(allocate_matrix(a.x, batch, hidden, dtype));
    output_rows.emplace(allocate_matrix(a.x, batch, size, dtype));
    output_weight = transposed(*a.w_hr);
  }
  p.norm = norm_of(a);
  p.b_ih = data(a.b_ih);
  p.b_hh = data(a.b_hh);
  p.c = data(c);
  for (int64_t i = 0; i < times.steps(); ++i) {
    const int64_t time = times.of_step(i), rows = times.rows(time);
    p.step = step_of(a, times, time);
    if (i > 0 || a.h0.has_value()) {
      multiply(fed_rows(rows), weight, product_rows(rows));
      p.product = data(product_rows(rows));
    }
    p.projected = times.in(projected, time);
    p.gates = times.out(o.gates, time);
    p.cells = times.out(o.cells, time);
    p.products = times.out(o.products, time);
    p.y = times.out(o.y, time);
    if (a.w_hr.has_value()) p.hidden_out = data((*hidden_rows)(rows));
    run_step<cuda::lstm_step_forward>(launch, p);
    if (a.w_hr.has_value()) {
      multiply((*hidden_rows)(rows), *output_weight, (*output_rows)(rows));
      run_step<cuda::lstm_step_output>(launch, p, data((*output_rows)(rows)));
    }
  }
  if (acc != dtype) set(o.c_n, c);
}

// ---- backward ----

void run_backward(const Arguments& a, const BackwardInputs& in, const BackwardOutputs& o) {
  const int64_t batch = a.batch(), hidden = a.hidden(), size = a.recurrent();
  if (batch == 0) {
    for (const Tensor& t :
         {o.dw_ih, o.dw_hh, o.dbias, o.dw_hr, o.dln_hh_weight, o.dln_c_weight, o.dln_c_bias})
      set(t, std::nullopt);
    return;
  }
  const ScalarType dtype = a.x.scalar_type(), acc = acc_type(dtype);
  const bool norm = a.ln_hh_weight.has_value(), projects = a.w_hr.has_value();
  const auto wanted = [](const Tensor& t) { return t.numel() > 0; };
  Launch launch(a.x, [] { return size_t{0}; });
  const Times times(a);

  const Tensor dgates = !a.w_ih.has_value() && wanted(o.dx) ? o.dx : allocate_rows(a.x, a.gates());
  const Tensor dproducts = norm ? allocate_rows(a.x, a.gates()) : dgates;
  const Tensor fed = allocate_rows(a.x, size, wanted(o.dw_hh));
  const Tensor dhh_weight = allocate_rows(a.x, a.gates(), norm);
  const Tensor dc_weight = allocate_rows(a.x, hidden, norm);
  const Tensor dc_bias = allocate_rows(a.x, hidden, norm);
  const Tensor dh = allocate_matrix(a.x, batch, size, acc);
  const Tensor dc = acc == dtype ? o.dc0 : allocate_matrix(a.x, batch, hidden, acc);
  const Tensor dfed = allocate_matrix(a.x, batch, size, dtype);
  set(dh, in.dh_n);
  set(dc, in.dc_n);
  // Backward reaches shorter packed sequences later: their dfed must be zero until then. In reverse they leave after
  // their first step, and dfed keeps what that step wrote.
  set(dfed, std::nullopt);
  // For dw_hr, both collect the rows of all steps in backward's order, so that dw_hr is one product.
  const int64_t kept_rows = wanted(o.dw_hr) ? count_rows(a.x) : batch;
  const Tensor dprojected = allocate_matrix(a.x, projects ? kept_rows : 0, size, dtype);
  const Tensor hidden_out = allocate_matrix(a.x, wanted(o.dw_hr) ? kept_rows : 0, hidden, dtype);
  FirstRows dhidden_rows(allocate_matrix(a.x, projects ? batch : 0, hidden, dtype));
  FirstRows dfed_rows(dfed);

  LstmStepBackward p;
  p.norm = norm_of(a);
  p.recurrent_mask = data(a.recurrent_mask);
  p.c_begin = data(a.c0);
  p.h_begin = data(a.h0);
  p.begin_at_lengths = a.reverse && a.lengths.has_value();
  p.dh = data(dh);
  p.dc = data(dc);
  p.dfed = data(dfed);
  int64_t done = 0;
  for (int64_t i = times.steps() - 1; i >= 0; --i) {
    const int64_t time = times.of_step(i), rows = times.rows(time);
    p.step = step_of(a, times, time);
    p.begun = 0;
    if (i > 0) {
      const int64_t before = times.of_step(i - 1);
      p.begun = times.rows(before);
      p.cells_before = times.in(in.cells, before);
      p.h_before = times.in(in.y, before);
    }
    p.gates = times.in(in.gates, time);
    p.products = times.in(in.products, time);
    p.dy = times.in(in.dy, time);
    p.dgates = times.out(dgates, time);
    p.dproducts = norm ? times.out(dproducts, time) : LstmStepRows<void*>{};
    p.fed = times.out(fed, time);
    p.dhh_weight = times.out(dhh_weight, time);
    p.dc_weight = times.out(dc_weight, time);
    p.dc_bias = times.out(dc_bias, time);
    if (projects) {
      const Tensor part = matrix_of(dprojected, done * size, {rows, size}, {size, 1});
      p.dprojected = data(part);
      run_step<cuda::lstm_step_backward_output>(launch, p);
      multiply(part, all_rows(*a.w_hr), dhidden_rows(rows));
      p.dhidden = data(dhidden_rows(rows));
      if (wanted(hidden_out))
        p.hidden_out = {data(matrix_of(hidden_out, done * hidden, {rows, hidden}, {hidden, 1})),
                        hidden};
      if (wanted(o.dw_hr)) done += rows;
    }
    run_step<cuda::lstm_step_backward>(launch, p);
    multiply(times.matrix(dproducts, time), all_rows(a.w_hh), dfed_rows(rows));
  }
  LstmStepBackward first;
  first.step = state_step(a);
  first.recurrent_mask = p.recurrent_mask;
  first.dfed = p.dfed;
  first.dh = p.dh;
  first.dprojected = data(o.dh0);
  run_step<cuda::lstm_step_backward_output>(launch, first);
  if (acc != dtype) set(o.dc0, dc);

  if (a.w_ih.has_value() && wanted(o.dx))
    multiply(all_rows(dgates), all_rows(*a.w_ih), all_rows(o.dx));
  if (wanted(o.dw_ih)) multiply(transposed(dgates), all_rows(without_padding(a, launch)), o.dw_ih);
  if (wanted(o.dw_hh)) multiply(transposed(dproducts), all_rows(fed), o.dw_hh);
  if (wanted(o.dw_hr)) multiply(transposed(dprojected), hidden_out, o.dw_hr);
  if (wanted(o.dbias)) sum_rows(dgates, o.dbias);
  if (norm) {
    sum_rows(dhh_weight, o.dln_hh_weight);
    sum_rows(dc_weight, o.dln_c_weight);
    sum_rows(dc_bias, o.dln_c_bias);
  }
}

}  // namespace advdl_ops::lstm
