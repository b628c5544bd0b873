// The LSTM on CPU: passes the tensors' pointers and strides to csrc/cpu/lstm*.cpp, which computes a whole layer and
// direction.
#include <algorithm>
#include <numeric>
#include <vector>

#include "lstm.h"

namespace advdl_ops::lstm {
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

// The rows of a tensor in the arguments' layout (packed, batch_first or neither). Null if it is empty or not given.
template <class Rows>
Rows rows_of(const Arguments& a, const OptionalTensor& t) {
  if (!t.has_value() || t->numel() == 0) return {};
  using Pointer = decltype(Rows::data);
  const auto pointer = static_cast<Pointer>(t->data_ptr());
  if (a.batch_sizes.has_value()) return {pointer, t->stride(0), 0};
  if (a.cell) return {pointer, 0, t->stride(0)};
  return {pointer, t->stride(a.batch_first ? 1 : 0), t->stride(a.batch_first ? 0 : 1)};
}

// The parameters that forward and backward share.
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

}  // namespace

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

}  // namespace advdl_ops::lstm
