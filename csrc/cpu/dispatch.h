// The kernels of one capability, as a table; dispatch.cpp chooses one at load.
#pragma once

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

// Uses the named capability from now on; false, and nothing changed, where this build or CPU lacks it.
bool set_capability(const char* name);

}  // namespace advdl_ops::cpu
