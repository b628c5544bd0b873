// One layer and direction of an LSTM over whole sequences, and its gradients: the arguments of the launchers.
//
// Each sequence takes the times t = 0 .. length - 1 (from the last to the first if `reverse`), from h = h0 and c = c0:
//   i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of w_ih x + b_ih + w_hh (h * recurrent_mask) + b_hh,
//   cell = f c + i g, hidden = o tanh(cell), projected = w_hr hidden (hidden itself without w_hr),
//   c = zoneout(cell), h = zoneout(projected), each with its previous value; y = h.
// On CPU, csrc/cpu/lstm.cpp and lstm_backward.cpp do all of it. On CUDA, csrc/bindings/lstm_cuda.cpp calls torch for
// the matrix products and csrc/cuda/lstm.cu for the rest of each step. "acc" is float, or double where `dtype` is f64.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor_types.h"

namespace advdl_ops {

// Which sequences have which times. Kernels number the sequences by descending length, so those that have time t are
// the first batch_sizes[t].
struct LstmSequences {
  int64_t steps = 0, batch = 0;
  bool reverse = false;
  const int64_t* batch_sizes = nullptr;  // [steps], descending; null: every sequence has every time
  const int64_t* order = nullptr;   // [batch]: the caller's number of each sequence; null: the same
  const int64_t* starts = nullptr;  // [steps], packed tensors only: the first row of each time
};

// A tensor with a row for each time and sequence. The row of time t and sequence k (in the caller's numbers) begins at
// element t * time + k * batch, or (starts[t] + k) * time if the tensor is packed.
template <class Pointer>
struct LstmRows {
  Pointer data = nullptr;
  int64_t time = 0, batch = 0;
};
using LstmInput = LstmRows<const void*>;
using LstmOutput = LstmRows<void*>;

struct LstmShape {
  LstmSequences sequences;
  // sizes of x, of the cell, and of w_hr's output (0 without w_hr)
  int64_t input = 0, hidden = 0, projection = 0;
  DType dtype = DType::f32;  // of every tensor without another dtype in its comment
  int64_t recurrent() const { return projection > 0 ? projection : hidden; }  // R, the size of h
};

// Zoneout of c or of h: by `mask` (1: keep the previous value), or without a mask by its expectation, `rate`.
struct LstmZoneout {
  LstmRows<const uint8_t*> mask;  // rows as x's; null: none
  double rate = 0;
  bool on() const { return mask.data != nullptr || rate != 0; }
};

// Layer norm (Ba et al. 2016) of the recurrent product over its 4H values, and of the cell before its tanh:
//   w_hh h becomes normalized(w_hh h) * hh_weight + hh_bias; hidden = o tanh(normalized(cell) * c_weight + c_bias).
// The caller normalizes the product w_ih x itself: x then holds the normalized product, and w_ih is null.
struct LstmLayerNorm {
  double eps = 1e-5;
  const void* hh_weight = nullptr;  // [4H]; all four given, or all null: no layer norm
  const void* hh_bias = nullptr;    // [4H]
  const void* c_weight = nullptr;   // [H]
  const void* c_bias = nullptr;     // [H]
  bool on() const { return hh_weight != nullptr; }
};

struct LstmWeights {
  const void* w_ih = nullptr;            // [4H, I], or null: x holds w_ih x, so I = 4H
  const void* w_hh = nullptr;            // [4H, R]
  const void* b_ih = nullptr;            // [4H] or null
  const void* b_hh = nullptr;            // [4H] or null
  const void* w_hr = nullptr;            // [P, H], or null
  const void* recurrent_mask = nullptr;  // [B, R] or null (1): the factor of h
  LstmLayerNorm norm;
};

struct LstmForward {
  LstmShape shape;
  LstmWeights weights;
  LstmZoneout zoneout_c, zoneout_h;
  LstmInput x;               // rows of I
  const void* h0 = nullptr;  // [B, R] or null (0)
  const void* c0 = nullptr;  // [B, H] or null (0)
  LstmOutput y;              // rows of R, or null; zero where a sequence has ended
  void* h_n = nullptr;       // [B, R]
  void* c_n = nullptr;       // [B, H]
  // Saved for backward, or null: not wanted. Rows of ended sequences are not written.
  LstmOutput gates;     // rows of 4H: i, f, g, o
  LstmOutput cells;     // rows of H: c
  LstmOutput products;  // rows of 4H: w_hh h, with layer norm only
};

struct LstmBackward {
  LstmShape shape;
  LstmWeights weights;
  LstmZoneout zoneout_c, zoneout_h;
  LstmInput x, y, gates, cells, products;  // as forward read and wrote them
  const void* h0 = nullptr;                // [B, R] or null
  const void* c0 = nullptr;                // [B, H] or null
  LstmInput dy;                            // rows of R, or null (0)
  const void* dh_n = nullptr;              // [B, R] or null (0)
  const void* dc_n = nullptr;              // [B, H] or null (0)
  LstmOutput dx;                           // rows of I, or null: not wanted
  void* dh0 = nullptr;                     // [B, R]
  void* dc0 = nullptr;                     // [B, H]
  // The gradients of the weights, acc; null: not wanted.
  void* dw_ih = nullptr;       // [4H, I]
  void* dw_hh = nullptr;       // [4H, R]
  void* dbias = nullptr;       // [4H], of b_ih and of b_hh
  void* dw_hr = nullptr;       // [P, H]
  void* dhh_weight = nullptr;  // [4H]; hh_bias has the gradient of the bias
  void* dc_weight = nullptr;   // [H]
  void* dc_bias = nullptr;     // [H]
};

namespace cpu {
// Bytes of workspace that the call needs. They depend on the shape only, never on the number of threads.
size_t lstm_forward_workspace(const LstmForward& p);
size_t lstm_backward_workspace(const LstmBackward& p);
void lstm_forward(const LstmForward& p, void* workspace);
void lstm_backward(const LstmBackward& p, void* workspace);
}  // namespace cpu

// ---- CUDA: the steps between the matrix products ----

// One row for each sequence, `stride` elements apart.
template <class Pointer>
struct LstmStepRows {
  Pointer data = nullptr;
  int64_t stride = 0;
};

// A step uses packs if it has at least this many: enough for a block on each of 132 multiprocessors. With fewer, one
// element per thread is faster.
inline constexpr int64_t kLstmPacks = 132 * 128;

// One time of the first `rows` sequences. States are [rows, ...], contiguous. Launches are asynchronous.
struct LstmStep {
  int64_t rows = 0, hidden = 0, projection = 0;
  DType dtype = DType::f32;
  // [rows], on the device: the states of a sequence with lengths[k] <= time do not change (it has ended, or in reverse
  // not begun). Null: every sequence has this time.
  const int64_t* lengths = nullptr;
  int64_t time = 0;
  LstmStepRows<const uint8_t*> zoneout_c_mask, zoneout_h_mask;  // rows of H and of R, or null
  double zoneout_c = 0, zoneout_h = 0;                          // the rates if there is no mask
  int64_t packs_from = kLstmPacks;                              // only tests change it
};

struct LstmStepForward {
  LstmStep step;
  LstmLayerNorm norm;
  LstmStepRows<const void*> projected;  // rows of 4H: w_ih x
  const void* product = nullptr;        // [rows, 4H]: w_hh h, or null (0)
  const void* b_ih = nullptr;           // [4H] or null
  const void* b_hh = nullptr;           // [4H] or null
  void* c = nullptr;                    // [rows, H] acc, read and written
  LstmStepRows<void*> gates;            // rows of 4H, or null; may be `projected`
  LstmStepRows<void*> cells;            // rows of H, or null
  LstmStepRows<void*> products;         // with layer norm: rows of 4H, or null: a copy of `product`
  // Without a projection, the step also does the work of lstm_step_output. With one, it writes hidden_out = o tanh(c),
  // the input of the projection's product, and zero where the sequence has ended.
  void* hidden_out = nullptr;            // [rows, H], with a projection only
  const void* recurrent_mask = nullptr;  // [rows, R] or null
  void* h = nullptr;                     // [rows, R], read and written
  void* fed = nullptr;                   // [rows, R]: h * recurrent_mask, if that is given
  LstmStepRows<void*> y;                 // rows of R, or null: h, or zero where ended
};

struct LstmStepBackward {
  LstmStep step;
  LstmLayerNorm norm;
  LstmStepRows<const void*> gates;         // rows of 4H
  LstmStepRows<const void*> cells_before;  // rows of H: c before this time
  LstmStepRows<const void*> products;      // rows of 4H, with layer norm
  LstmStepRows<const void*> h_before;      // rows of R: h before this time
  // Sequences without an earlier step begin at this one: those from row `begun` on and, in reverse with lengths, those
  // with lengths[k] = time + 1. Their previous states are c_begin and h_begin.
  int64_t begun = INT64_MAX;
  bool begin_at_lengths = false;
  const void* c_begin = nullptr;         // [rows, H] or null (0)
  const void* h_begin = nullptr;         // [rows, R] or null (0)
  LstmStepRows<const void*> dy;          // rows of R, or null (0)
  const void* recurrent_mask = nullptr;  // [rows, R] or null
  // [rows, R]: the gradient of `fed` from the recurrent product of the later step, or null at the last step.
  const void* dfed = nullptr;
  // [rows, R] acc. Before: the gradient of h without the part dfed. After: that of h_before without the part of this
  // step's product. Where the sequence has ended, dfed is added.
  void* dh = nullptr;
  void* dc = nullptr;  // [rows, H] acc. Before: the gradient of c. After: that of c_before
  // With a projection there are two launches: lstm_step_backward_output writes dprojected, dh and `fed`; then, after
  // the matrix product that gives dhidden, lstm_step_backward does the rest. Without one, both are null and
  // lstm_step_backward does all.
  void* dprojected = nullptr;     // [rows, P]: of the projection; zero where ended
  const void* dhidden = nullptr;  // [rows, H]
  LstmStepRows<void*> dgates;     // rows of 4H: of the pre-activations; zero where ended
  LstmStepRows<void*> dproducts;  // rows of 4H: of w_hh h, with layer norm (otherwise it is dgates)
  // For the gradients of w_hh and w_hr, or null: not wanted. Zero where ended.
  LstmStepRows<void*> fed;         // rows of R: h_before * recurrent_mask
  LstmStepRows<void*> hidden_out;  // rows of H: o tanh(c)
  // With layer norm: rows of 4H and of H, whose sums are the gradients of its weights and bias. Zero where ended.
  LstmStepRows<void*> dhh_weight, dc_weight, dc_bias;
};

// Copies padded rows and writes zero where a sequence has ended. A NaN in the padding would reach the gradient of w_ih
// as 0 * NaN.
struct LstmPadding {
  int64_t steps = 0, batch = 0, width = 0;
  DType dtype = DType::f32;
  const int64_t* lengths = nullptr;  // [batch], on the device
  LstmInput x;
  LstmOutput out;
};

namespace cuda {
void lstm_step_forward(const LstmStepForward& p, void* stream);
// With a projection, after its product [rows, P]: zoneout, then h, fed and y. Given h0 and neither zoneout nor y, it
// writes the first h and fed.
void lstm_step_output(const LstmStepForward& p, const void* projected_h, void* stream);
// Writes dprojected, dh and fed. Called once more after the last step without zoneout and dy: dprojected is then the
// gradient of h0.
void lstm_step_backward_output(const LstmStepBackward& p, void* stream);
void lstm_step_backward(const LstmStepBackward& p, void* stream);
void lstm_without_padding(const LstmPadding& p, void* stream);
}  // namespace cuda

}  // namespace advdl_ops
