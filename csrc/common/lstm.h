// One layer and direction of an LSTM over whole sequences, and its gradients: what a launcher is given.
//
// For a sequence b at the times t = 0 .. length - 1 (backwards where `reverse`), from h = h0, c = c0:
//   i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of w_ih x + b_ih + w_hh (h * recurrent_mask) + b_hh,
//   cell = f c + i g, hidden = o tanh(cell), projected = w_hr hidden (hidden itself without w_hr),
//   c = zoneout(cell), h = zoneout(projected), each with what was before; y = h.
// csrc/cpu/lstm.cpp does all of it. On CUDA csrc/bindings/lstm_cuda.cpp lets torch multiply, and launches the rest of each
// step from csrc/cuda/lstm.cu. "acc" is float, or double where `dtype` is f64.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor_types.h"

namespace advdl_ops {

// Which sequences have which times. Sequences stand in the order of their length, the longest first, so that those that have
// a time are the first batch_sizes[t]; a kernel counts them so.
struct LstmSequences {
  int64_t steps = 0, batch = 0;
  bool reverse = false;
  const int64_t* batch_sizes = nullptr;  // [steps], descending; null: every sequence has every time
  const int64_t* order = nullptr;   // [batch]: the caller's number of each sequence; null: the same
  const int64_t* starts = nullptr;  // [steps]: of packed tensors, the first row of each time
};

// A tensor of rows, one for each time and sequence: that of time t and sequence k (in the caller's numbers) begins at element
// t * time + k * batch, or (starts[t] + k) * time where the tensor is packed.
template <class Pointer>
struct LstmRows {
  Pointer data = nullptr;
  int64_t time = 0, batch = 0;
};
using LstmInput = LstmRows<const void*>;
using LstmOutput = LstmRows<void*>;

struct LstmShape {
  LstmSequences sequences;
  // of x, the cell, and w_hr's output or 0
  int64_t input = 0, hidden = 0, projection = 0;
  DType dtype = DType::f32;  // of every tensor that is not said to be of another
  int64_t recurrent() const { return projection > 0 ? projection : hidden; }  // R, the size of h
};

// Zoneout of c or of h: by `mask` (1: keep what was before), or without one by its expectation, `rate`.
struct LstmZoneout {
  LstmRows<const uint8_t*> mask;  // rows as x's; null: none
  double rate = 0;
  bool on() const { return mask.data != nullptr || rate != 0; }
};

// Layer norm (Ba et al. 2016) of the recurrent product over its 4H values, and of the cell before its tanh:
//   w_hh h becomes normalized(w_hh h) * hh_weight + hh_bias; hidden = o tanh(normalized(cell) * c_weight + c_bias).
// (Of the product w_ih x it is the caller's matter: x holds that product then, and w_ih is null.)
struct LstmLayerNorm {
  double eps = 1e-5;
  const void* hh_weight = nullptr;  // [4H]; all four given, or all null: no layer norm
  const void* hh_bias = nullptr;    // [4H]
  const void* c_weight = nullptr;   // [H]
  const void* c_bias = nullptr;     // [H]
  bool on() const { return hh_weight != nullptr; }
};

struct LstmWeights {
  const void* w_ih = nullptr;            // [4H, I], or null: x holds w_ih x, rows of I = 4H
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
  // For backward, null: not wanted. Left as they are where a sequence has ended.
  LstmOutput gates;     // rows of 4H: i, f, g, o
  LstmOutput cells;     // rows of H: c
  LstmOutput products;  // rows of 4H: w_hh h, with layer norm only
};

struct LstmBackward {
  LstmShape shape;
  LstmWeights weights;
  LstmZoneout zoneout_c, zoneout_h;
  LstmInput x, y, gates, cells, products;  // as forward had and made them
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
// Scratch bytes that the call needs; depends on the shape only, never on the thread count.
size_t lstm_forward_workspace(const LstmForward& p);
size_t lstm_backward_workspace(const LstmBackward& p);
void lstm_forward(const LstmForward& p, void* workspace);
void lstm_backward(const LstmBackward& p, void* workspace);
}  // namespace cpu

// ---- CUDA: the steps between the matrix products ----

// Rows that lie `stride` elements apart, one for each sequence.
template <class Pointer>
struct LstmStepRows {
  Pointer data = nullptr;
  int64_t stride = 0;
};

// Packs of 16 bytes are worth their longer threads from this many in a step: a block on each of 132 multiprocessors.
inline constexpr int64_t kLstmPacks = 132 * 128;

// One time of the first `rows` sequences. States are [rows, ...], contiguous. Launches are asynchronous.
struct LstmStep {
  int64_t rows = 0, hidden = 0, projection = 0;
  DType dtype = DType::f32;
  // On the device, [rows]: a sequence with lengths[k] <= time has ended, or has not begun: its states stay. Null: none has.
  const int64_t* lengths = nullptr;
  int64_t time = 0;
  LstmStepRows<const uint8_t*> zoneout_c_mask, zoneout_h_mask;  // rows of H and of R, or null
  double zoneout_c = 0, zoneout_h = 0;                          // the rates, where there is no mask
  int64_t packs_from = kLstmPacks;                              // tests set it
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
  // Without a projection: what lstm_step_output does. With one: o tanh(c) for its matrix product, zero where ended.
  void* hidden_out = nullptr;            // [rows, H], with a projection only
  const void* recurrent_mask = nullptr;  // [rows, R] or null
  void* h = nullptr;                     // [rows, R], read and written
  void* fed = nullptr;                   // [rows, R]: h * recurrent_mask, where that is given
  LstmStepRows<void*> y;                 // rows of R, or null: h, or zero where ended
};

struct LstmStepBackward {
  LstmStep step;
  LstmLayerNorm norm;
  LstmStepRows<const void*> gates;         // rows of 4H
  LstmStepRows<const void*> cells_before;  // rows of H: c before this time
  LstmStepRows<const void*> products;      // rows of 4H, with layer norm
  LstmStepRows<const void*> h_before;      // rows of R: h before this time
  // Not all sequences have a time before this one. Those from row `begun` on begin here, and, in reverse with lengths, those
  // with lengths[k] = time + 1: what they had before stands here.
  int64_t begun = INT64_MAX;
  bool begin_at_lengths = false;
  const void* c_begin = nullptr;         // [rows, H] or null (0)
  const void* h_begin = nullptr;         // [rows, R] or null (0)
  LstmStepRows<const void*> dy;          // rows of R, or null (0)
  const void* recurrent_mask = nullptr;  // [rows, R] or null
  // Of what the recurrent matrix product fed back from the later step: [rows, R], or null at the last step.
  const void* dfed = nullptr;
  // acc: the gradient of h beside dfed; becomes that of h_before beside this step's product. Ended: dfed is added.
  void* dh = nullptr;  // [rows, R]
  void* dc = nullptr;  // [rows, H] acc: the gradient of c; becomes that of c_before
  // With a projection in two parts: lstm_step_backward_output makes dprojected, dh and `fed`; after its matrix product
  // lstm_step_backward goes on with dhidden. Without one: both null, and lstm_step_backward does all.
  void* dprojected = nullptr;     // [rows, P]: of the projection; zero where ended
  const void* dhidden = nullptr;  // [rows, H]
  LstmStepRows<void*> dgates;     // rows of 4H: of the pre-activations; zero where ended
  LstmStepRows<void*> dproducts;  // rows of 4H: of w_hh h, with layer norm (otherwise it is dgates)
  // For the gradients of w_hh and of w_hr, or null: not wanted. Zero where ended.
  LstmStepRows<void*> fed;         // rows of R: h_before * recurrent_mask
  LstmStepRows<void*> hidden_out;  // rows of H: o tanh(c)
  // For the gradients of the layer norms, rows of 4H and of H whose sums they are, or null; zero where ended.
  LstmStepRows<void*> dhh_weight, dc_weight, dc_bias;
};

// A copy of padded rows that is zero where a sequence has ended: a NaN there would reach the gradient of w_ih, as 0 * NaN.
struct LstmPadding {
  int64_t steps = 0, batch = 0, width = 0;
  DType dtype = DType::f32;
  const int64_t* lengths = nullptr;  // [batch], on the device
  LstmInput x;
  LstmOutput out;
};

namespace cuda {
void lstm_step_forward(const LstmStepForward& p, void* stream);
// With a projection, after its product [rows, P]: zoneout, h, fed, y. Of h0, without zoneout and y, it makes h and fed.
void lstm_step_output(const LstmStepForward& p, const void* projected_h, void* stream);
// dprojected, dh, fed. After the last step, without zoneout and dy, dprojected is the gradient of h0.
void lstm_step_backward_output(const LstmStepBackward& p, void* stream);
void lstm_step_backward(const LstmStepBackward& p, void* stream);
void lstm_without_padding(const LstmPadding& p, void* stream);
}  // namespace cuda

}  // namespace advdl_ops
