// The thread pool that kernels run on: whoever loads them gives it (the binding gives torch's), else one thread.
#pragma once

#include <cstdint>

namespace advdl_ops::cpu {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction,
                             void* context);

void set_parallel_for(ParallelFor parallel_for, int (*thread_count)());
void parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);
int thread_count();

// f(begin, end) on parts of [0, count), none so small that starting a thread costs more than it saves; `work` is
// the number of elements that one index stands for.
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
