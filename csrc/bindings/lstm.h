// What the LSTM's bindings share. lstm.cpp checks, allocates and registers. lstm_cpu.cpp and lstm_cuda.cpp run the
// kernels: each library has one of the two.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/lstm.h"
#include "tensor.h"

namespace advdl_ops::lstm {

inline constexpr const char* kName = "lstm";

// The arguments that forward and backward share, in the order of their schemas.
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

// Both write every output that is not empty. All tensors are contiguous, except x and dy, whose rows are.
void run_forward(const Arguments& a, const ForwardOutputs& o);
void run_backward(const Arguments& a, const BackwardInputs& in, const BackwardOutputs& o);

inline const int64_t* integers(const Tensor& t) {
  return static_cast<const int64_t*>(t.data_ptr());
}

// Uninitialised rows of `size` elements, as many as x has, or none.
inline Tensor allocate_rows(const Tensor& x, int64_t size, bool wanted = true) {
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

inline LstmLayerNorm norm_of(const Arguments& a) {
  return {a.eps, data(a.ln_hh_weight), data(a.ln_hh_bias), data(a.ln_c_weight), data(a.ln_c_bias)};
}

}  // namespace advdl_ops::lstm
