// How the CPU kernels run: the table of one capability's kernels, chosen at the first call, and the threads.
//
// dispatch.cpp makes the table. `add_<family>` at the end of <family>.cpp sets the family's entries. Each function that
// ../common/<family>.h declares in `cpu` calls the entry of the same name.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/batch_norm_act.h"
#include "../common/checksum.h"
#include "../common/convert_layout.h"
#include "../common/dense_conv2d.h"
#include "../common/depthwise_conv2d.h"
#include "../common/group_norm.h"
#include "../common/lstm.h"
#include "../common/winograd_conv2d.h"

namespace advdl_ops::cpu {

// The kernels of a family, see ../common/<family>.h.
template <class Forward, class Backward>
struct Family {
  size_t (*forward_workspace)(const Forward&);
  size_t (*backward_workspace)(const Backward&);
  void (*forward)(const Forward&, void* workspace);
  void (*backward)(const Backward&, void* workspace);
};

struct KernelTable {
  const char* name;
  Family<BatchNormActForward, BatchNormActBackward> batch_norm_act;
  uint64_t (*checksum)(const void* bytes, int64_t count);
  void (*convert_layout)(const ConvertLayout&);
  Family<DenseConv2dForward, DenseConv2dBackward> dense_conv2d;
  Family<DepthwiseConv2dForward, DepthwiseConv2dBackward> depthwise_conv2d;
  Family<DepthwiseConv2dForward, DepthwiseConv2dBackward> depthwise_conv2d_last;
  Family<GroupNormForward, GroupNormBackward> group_norm;
  Family<GroupNormForward, GroupNormBackward> layer_norm_2d;
  Family<LstmForward, LstmBackward> lstm;
  int64_t (*winograd_packed_size)(const WinogradFilters&);
  void (*winograd_pack)(const WinogradFilters&, const WinogradWeight&, float*);
  Family<WinogradConv2dForward, WinogradConv2dBackward> winograd_conv2d;
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
