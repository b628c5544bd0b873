// y = act(batch_norm(x) + residual) and its gradients: the arguments of the launchers.
//
// csrc/cpu/batch_norm_act.cpp and csrc/cuda/batch_norm_act_*.cu implement the same functions on these structs;
// csrc/bindings/batch_norm_act.cpp checks, allocates and fills them. No pointer aliases another one, except
// running_*_out. "acc" is float, or double where `dtype` is f64: the type of statistics, sums and arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor_types.h"

namespace advdl_ops {

struct BatchNormActShape {
  int64_t n = 0, c = 0, s = 0;  // batch, channels, spatial positions; any may be 0
  Layout layout = Layout::channels_first;
  DType dtype = DType::f32;          // of x, residual, z, out and their gradients
  DType weight_dtype = DType::f32;   // of weight and bias
  DType running_dtype = DType::f32;  // of running_mean and running_var, read and written
};

// training: mean = E[x], var = E[(x - mean)^2] over N and S of each channel (n * s >= 2);
//   running_mean_out = (1 - momentum) * running_mean + momentum * mean, running_var_out likewise with the
//   unbiased variance var * count / (count - 1).
// otherwise: mean = running_mean, var = running_var.
// rstd = 1 / sqrt(var + eps). Without running statistics and not in training, mean and rstd are given.
// out = act((x - mean) * rstd * weight + bias + residual). Null, in training: only mean is written, and to rstd the sum of
//   squared distances from it, which other processes' batches are added to (any count >= 1).
struct BatchNormActForward {
  BatchNormActShape shape;
  bool training = false;
  double momentum = 0.1, eps = 1e-5;
  Activation act = Activation::identity;
  double act_param = 0;
  const void* x = nullptr;             // [N, C, S] in `layout`
  const void* residual = nullptr;      // as x, or null
  const void* weight = nullptr;        // [C] or null (1)
  const void* bias = nullptr;          // [C] or null (0)
  const void* running_mean = nullptr;  // [C]; null: none to write, or mean and rstd are given
  const void* running_var = nullptr;   // [C]; null exactly where running_mean is
  void* out = nullptr;                 // as x, or null
  void* mean = nullptr;                // [C] acc; written, or given
  void* rstd = nullptr;                // [C] acc
  void* running_mean_out =
      nullptr;  // [C], may be running_mean; written in training if that is given
  void* running_var_out = nullptr;  // [C], may be running_var
};

// With z the pre-activation and dz = dout * act'(z), xhat = (x - mean) * rstd:
//   dbias = sum dz, dweight = sum dz * xhat, dresidual = dz,
//   dx = weight * rstd * (dz - (dbias + xhat * dweight) / (n * s)) in training, weight * rstd * dz otherwise.
// means_given, in training: the batch is a part of a larger one, whose means of dz and dz * xhat are in dbias and dweight;
//   dx = weight * rstd * (dz - dbias - xhat * dweight) is all that is written.
struct BatchNormActBackward {
  BatchNormActShape shape;
  bool training = false, means_given = false;
  Activation act = Activation::identity;
  double act_param = 0;
  ZSource z_source = ZSource::input;
  const void* dout = nullptr;    // as x
  const void* x = nullptr;       // [N, C, S] in `layout`
  const void* saved = nullptr;   // as x, or null
  const void* weight = nullptr;  // [C] or null (1)
  const void* bias = nullptr;    // [C] or null (0)
  const void* mean = nullptr;    // [C] acc
  const void* rstd = nullptr;    // [C] acc
  void* dx = nullptr;            // as x, or null: not wanted
  void* dresidual = nullptr;     // as x, or null: not wanted
  void* dweight = nullptr;       // [C] acc; written, or given
  void* dbias = nullptr;         // [C] acc
};

namespace cpu {
// Bytes of workspace that the call needs. They depend on the shape only, never on the number of threads.
size_t batch_norm_act_forward_workspace(const BatchNormActForward& p);
size_t batch_norm_act_backward_workspace(const BatchNormActBackward& p);
void batch_norm_act_forward(const BatchNormActForward& p, void* workspace);
void batch_norm_act_backward(const BatchNormActBackward& p, void* workspace);
}  // namespace cpu

namespace cuda {
// As above; `stream` is a cudaStream_t. Asynchronous, no host synchronisation, safe under graph capture.
// `workspace` is 256-byte aligned and uninitialised.
size_t batch_norm_act_forward_workspace(const BatchNormActForward& p);
size_t batch_norm_act_backward_workspace(const BatchNormActBackward& p);
void batch_norm_act_forward(const BatchNormActForward& p, void* workspace, void* stream);
void batch_norm_act_backward(const BatchNormActBackward& p, void* workspace, void* stream);
}  // namespace cuda

}  // namespace advdl_ops
