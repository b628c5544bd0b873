// How the CPU kernels run: the table of one capability's kernels, chosen at the first call, and the threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/batch_norm_act.h"
#include "../common/convert_layout.h"
#include "../common/dense_conv2d.h"
#include "../common/depthwise_conv2d.h"
#include "../common/group_norm.h"
#include "../common/lstm.h"

namespace advdl_ops::cpu {

struct KernelTable {
  const char* name;
  size_t (*batch_norm_act_forward_workspace)(const BatchNormActForward&);
  size_t (*batch_norm_act_backward_workspace)(const BatchNormActBackward&);
  void (*batch_norm_act_forward)(const BatchNormActForward&, void*);
  void (*batch_norm_act_backward)(const BatchNormActBackward&, void*);

  void (*convert_layout)(const ConvertLayout&);

  size_t (*dense_conv2d_forward_workspace)(const DenseConv2dForward&);
  size_t (*dense_conv2d_backward_workspace)(const DenseConv2dBackward&);
  void (*dense_conv2d_forward)(const DenseConv2dForward&, void*);
  void (*dense_conv2d_backward)(const DenseConv2dBackward&, void*);

  size_t (*depthwise_conv2d_forward_workspace)(const DepthwiseConv2dForward&);
  size_t (*depthwise_conv2d_backward_workspace)(const DepthwiseConv2dBackward&);
  void (*depthwise_conv2d_forward)(const DepthwiseConv2dForward&, void*);
  void (*depthwise_conv2d_backward)(const DepthwiseConv2dBackward&, void*);

  size_t (*depthwise_conv2d_last_forward_workspace)(const DepthwiseConv2dForward&);
  size_t (*depthwise_conv2d_last_backward_workspace)(const DepthwiseConv2dBackward&);
  void (*depthwise_conv2d_last_forward)(const DepthwiseConv2dForward&, void*);
  void (*depthwise_conv2d_last_backward)(const DepthwiseConv2dBackward&, void*);

  size_t (*group_norm_forward_workspace)(const GroupNormForward&);
  size_t (*group_norm_backward_workspace)(const GroupNormBackward&);
  void (*group_norm_forward)(const GroupNormForward&, void*);
  void (*group_norm_backward)(const GroupNormBackward&, void*);

  size_t (*layer_norm_2d_forward_workspace)(const GroupNormForward&);
  size_t (*layer_norm_2d_backward_workspace)(const GroupNormBackward&);
  void (*layer_norm_2d_forward)(const GroupNormForward&, void*);
  void (*layer_norm_2d_backward)(const GroupNormBackward&, void*);

  size_t (*lstm_forward_workspace)(const LstmForward&);
  size_t (*lstm_backward_workspace)(const LstmBackward&);
  void (*lstm_forward)(const LstmForward&, void*);
  void (*lstm_backward)(const LstmBackward&, void*);
};

// The capability in use: "default", "avx2" or "avx512".
const char* capability();

// Uses the named capability from now on. Returns false and changes nothing if this build or CPU lacks it.
bool set_capability(const char* name);

// --- threads -------------------------------------------------------------------------------------

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction,
                             void* context);

// Kernels run on the thread pool that is set here (the bindings set torch's), or on one thread if none is set.
void set_parallel_for(ParallelFor parallel_for, int (*thread_count)());
void parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);
int thread_count();

// Calls f(begin, end) on parts of [0, count), each large enough to be worth a thread. `work` is the number of elements
// per index.
template <class F>
void parallel_ranges(int64_t count, int64_t work, F&& f) {
  constexpr int64_t kGrain = 32768;
  if (count <= 0) return;
  const int64_t grain = kGrain / (work > 0 ? work : 1) + 1;
  if (count <= grain) return f(0, count);
  parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace advdl_ops::cpu
