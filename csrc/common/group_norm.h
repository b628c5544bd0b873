// y = act(group_norm(x) + residual) and its gradients: the arguments of the launchers. Instance norm has one channel
// per group. The layer norm over the channels of each position ("layer norm 2d") differs only in the set that is
// normalized.
//
// csrc/cpu and csrc/cuda implement these functions in group_norm* and layer_norm_2d* (groups == kEachPosition);
// csrc/bindings/group_norm.cpp checks, allocates and fills the structs. No pointer aliases another one.
// "acc" is float, or double where `dtype` is f64: the type of statistics, sums and arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor_types.h"

namespace advdl_ops {

// A value of `groups`: each position is normalized over its channels.
inline constexpr int64_t kEachPosition = 0;

struct GroupNormShape {
  int64_t n = 0, c = 0, s = 0;  // batch, channels, spatial positions; any may be 0
  int64_t groups = 1;           // divides c; or kEachPosition
  Layout layout = Layout::channels_first;
  DType dtype = DType::f32;         // of x, residual, out and their gradients
  DType weight_dtype = DType::f32;  // of weight and bias

  // The number of sets, and the elements of each.
  int64_t sets() const { return n * (groups == kEachPosition ? s : groups); }
  int64_t set_size() const { return groups == kEachPosition ? c : c / groups * s; }
  bool is_empty() const { return n == 0 || c == 0 || s == 0; }
};

// mean = E[x], var = E[(x - mean)^2] of each set; rstd = 1 / sqrt(var + eps);
// out = act((x - mean) * rstd * weight + bias + residual).
struct GroupNormForward {
  GroupNormShape shape;
  double eps = 1e-5;
  Activation act = Activation::identity;
  double act_param = 0;
  const void* x = nullptr;         // [N, C, S] in `layout`
  const void* residual = nullptr;  // as x, or null
  const void* weight = nullptr;    // [C] or null (1)
  const void* bias = nullptr;      // [C] or null (0)
  void* out = nullptr;             // as x
  void* mean = nullptr;            // [N, groups], or [N, S] with kEachPosition; acc
  void* var = nullptr;             // as mean
};

// With dz = dout * act'(z), xhat = (x - mean) * rstd, M elements in a set:
//   dresidual = dz, dbias[c] = sum dz, dweight[c] = sum dz * xhat over N and S,
//   dx = rstd * (weight * dz - (sum of weight * dz + xhat * sum of weight * dz * xhat) / M), with sums over the set.
struct GroupNormBackward {
  GroupNormShape shape;
  double eps = 1e-5;
  Activation act = Activation::identity;
  double act_param = 0;
  ZSource z_source = ZSource::input;
  const void* dout = nullptr;    // as x
  const void* x = nullptr;       // [N, C, S] in `layout`
  const void* saved = nullptr;   // as x, or null
  const void* weight = nullptr;  // [C] or null (1)
  const void* bias = nullptr;    // [C] or null (0)
  const void* mean = nullptr;    // as forward wrote it
  const void* var = nullptr;     // as forward wrote it
  void* dx = nullptr;            // as x, or null: not wanted
  void* dresidual = nullptr;     // as x, or null: not wanted
  void* dweight = nullptr;       // [C] acc, or null: not wanted
  void* dbias = nullptr;         // [C] acc, null exactly where dweight is
};

namespace cpu {
// Bytes of workspace that the call needs. They depend on the shape only, never on the number of threads.
size_t group_norm_forward_workspace(const GroupNormForward& p);
size_t group_norm_backward_workspace(const GroupNormBackward& p);
void group_norm_forward(const GroupNormForward& p, void* workspace);
void group_norm_backward(const GroupNormBackward& p, void* workspace);
size_t layer_norm_2d_forward_workspace(const GroupNormForward& p);
size_t layer_norm_2d_backward_workspace(const GroupNormBackward& p);
void layer_norm_2d_forward(const GroupNormForward& p, void* workspace);
void layer_norm_2d_backward(const GroupNormBackward& p, void* workspace);
}  // namespace cpu

namespace cuda {
// As above; `stream` is a cudaStream_t. Asynchronous, no host synchronisation, safe under graph capture.
// `workspace` is 256-byte aligned and uninitialised.
size_t group_norm_forward_workspace(const GroupNormForward& p);
size_t group_norm_backward_workspace(const GroupNormBackward& p);
void group_norm_forward(const GroupNormForward& p, void* workspace, void* stream);
void group_norm_backward(const GroupNormBackward& p, void* workspace, void* stream);
size_t layer_norm_2d_forward_workspace(const GroupNormForward& p);
size_t layer_norm_2d_backward_workspace(const GroupNormBackward& p);
void layer_norm_2d_forward(const GroupNormForward& p, void* workspace, void* stream);
void layer_norm_2d_backward(const GroupNormBackward& p, void* workspace, void* stream);
}  // namespace cuda

}  // namespace advdl_ops
