// The kernels of one capability, as a table; dispatch.cpp chooses one at load.
#pragma once

#include "../common/batch_norm_act.h"

namespace advdl_ops::cpu {

struct KernelTable {
  const char* name;
  size_t (*batch_norm_act_forward_workspace)(const BatchNormActForward&);
  size_t (*batch_norm_act_backward_workspace)(const BatchNormActBackward&);
  void (*batch_norm_act_forward)(const BatchNormActForward&, void*);
  void (*batch_norm_act_backward)(const BatchNormActBackward&, void*);
};

// The capability in use: "default", "avx2" or "avx512".
const char* capability();

// Uses the named capability from now on; false, and nothing changed, where this build or CPU lacks it.
bool set_capability(const char* name);

}  // namespace advdl_ops::cpu
