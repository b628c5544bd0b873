// The scheduler of the host emulation: see include/cuda_runtime.h.
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "include/cuda_runtime.h"

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack, changes stacks, restores: no system call, unlike swapcontext.
asm(R"(
.text
.type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulation_switch, . - cuda_emulation_switch
)");
extern "C" void cuda_emulation_switch(void** save, void* restore);
#else
#include <ucontext.h>
#endif

namespace cuda_emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;  // touched only as far as a kernel's frame reaches
constexpr int kMaxThreads = 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type, -1 in integers

enum class State { ready, block_barrier, warp_barrier, done };

struct Fiber {
  unsigned char* stack = nullptr;
#if defined(__x86_64__)
  void* context = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
  State state = State::done;
  unsigned mask = 0;       // of the warp operation it waits for
  unsigned exchanges = 0;  // warp operations so far: deposits alternate between two buffers
};

struct Warp {
  unsigned char deposit[2][32][8];
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  int current = 0, threads = 0;
  const std::function<void()>* body = nullptr;
  unsigned char* shared = nullptr;
  cudaError_t error = cudaSuccess;
  std::map<const void*, int> shared_opt_in;
  std::vector<Launch> launches;
};

Machine machine;

void to_scheduler(bool last) {
  Fiber& fiber = machine.fibers[machine.current];
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#if defined(__x86_64__)
  cuda_emulation_switch(&fiber.context, machine.scheduler);
#else
  swapcontext(&fiber.context, &machine.scheduler);
#endif
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack,
                                  &machine.scheduler_stack_bytes);
  (*machine.body)();
  machine.fibers[machine.current].state = State::done;
  to_scheduler(true);
  std::abort();  // a finished fiber is never resumed
}

void start(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("cuda emulation: no memory for a stack");
    fiber.stack = static_cast<unsigned char*>(stack);
  }
  if (fiber.state != State::done)  // frames of an abandoned launch
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStackBytes);
#if defined(__x86_64__)
  // As if fiber_main had just been called: at its entry %rsp + 8 is a multiple of 16.
  auto** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.context = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack = {};
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &fiber_main, 0);
#endif
  fiber.state = State::ready;
  fiber.exchanges = 0;
}

void resume(int index) {
  Fiber& fiber = machine.fibers[index];
  machine.current = index;
  threadIdx = {static_cast<unsigned>(index), 0, 0};
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack, kStackBytes);
#if defined(__x86_64__)
  cuda_emulation_switch(&machine.scheduler, fiber.context);
#else
  swapcontext(&machine.scheduler, &fiber.context);
#endif
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
}

// Whether every lane that a waiting lane names has arrived, with the same mask.
bool release_warp(int first) {
  bool any = false;
  for (int lane = 0; lane < 32; ++lane) {
    const Fiber& fiber = machine.fibers[first + lane];
    if (fiber.state != State::warp_barrier) continue;
    bool all = true;
    for (int other = 0; other < 32; ++other) {
      const Fiber& peer = machine.fibers[first + other];
      if (fiber.mask >> other & 1u)
        all = all && peer.state == State::warp_barrier && peer.mask == fiber.mask;
    }
    if (!all) continue;
    const unsigned mask = fiber.mask;
    for (int other = 0; other < 32; ++other)
      if (mask >> other & 1u) machine.fibers[first + other].state = State::ready;
    any = true;
  }
  return any;
}

[[noreturn]] void report_divergence() {
  int barrier = 0, warp = 0, done = 0, example = -1;
  for (int t = 0; t < machine.threads; ++t) {
    const State state = machine.fibers[t].state;
    barrier += state == State::block_barrier;
    warp += state == State::warp_barrier;
    done += state == State::done;
    if (state != State::done && example < 0) example = t;
  }
  throw std::runtime_error("cuda emulation: divergent barrier in block " +
                           std::to_string(blockIdx.x) + ": " + std::to_string(barrier) +
                           " threads at __syncthreads, " + std::to_string(warp) +
                           " at a warp operation, " + std::to_string(done) +
                           " finished; first waiting thread " + std::to_string(example));
}

void run_block(bool reverse) {
  const int threads = machine.threads;
  for (int t = 0; t < threads; ++t) start(machine.fibers[t]);
  while (true) {
    bool progress = false;
    for (int w = 0; w < threads / 32; ++w) {
      const int first = (reverse ? threads / 32 - 1 - w : w) * 32;
      do {
        for (int i = 0; i < 32; ++i) {
          const int t = first + (reverse ? 31 - i : i);
          if (machine.fibers[t].state != State::ready) continue;
          resume(t);
          progress = true;
        }
      } while (release_warp(first));
    }
    int waiting = 0, done = 0;
    for (int t = 0; t < threads; ++t) {
      waiting += machine.fibers[t].state == State::block_barrier;
      done += machine.fibers[t].state == State::done;
    }
    if (done == threads) return;
    if (waiting == threads) {
      for (int t = 0; t < threads; ++t) machine.fibers[t].state = State::ready;
    } else if (!progress) {
      report_divergence();
    }
  }
}

}  // namespace

Settings& settings() {
  static Settings instance;
  return instance;
}

void clear_launches() { machine.launches.clear(); }
size_t launch_count() { return machine.launches.size(); }
const Launch& launch_at(size_t index) { return machine.launches.at(index); }
cudaError_t last_error() { return std::exchange(machine.error, cudaSuccess); }
unsigned char* shared_memory() { return machine.shared; }

void sync_threads() {
  machine.fibers[machine.current].state = State::block_barrier;
  to_scheduler(false);
}

void exchange(unsigned mask, int source, const void* mine, void* theirs, size_t size) {
  const int thread = machine.current;
  Fiber& fiber = machine.fibers[thread];
  Warp& warp = machine.warps[thread / 32];
  const unsigned buffer = fiber.exchanges++ % 2;
  std::memcpy(warp.deposit[buffer][thread % 32], mine, size);
  fiber.mask = mask;
  fiber.state = State::warp_barrier;
  to_scheduler(false);
  if (mask >> source & 1u) {
    std::memcpy(theirs, warp.deposit[buffer][source], size);
  } else {
    std::memset(theirs, kPoison, size);  // a lane that does not take part: undefined on the device
  }
}

void run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body) {
  const auto& grid = config.gridDim;
  const auto& block = config.blockDim;
  if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1 || block.x % 32 != 0 ||
      block.x == 0 || block.x > kMaxThreads)
    throw std::runtime_error(
        "cuda emulation: one-dimensional grids and blocks of whole warps only");
  const int shared = static_cast<int>(config.dynamicSmemBytes);
  const int allowed = std::max(48 * 1024, machine.shared_opt_in[kernel]);
  machine.launches.push_back({true, grid.x, block.x, config.dynamicSmemBytes});
  if (shared > std::min(allowed, std::max(48 * 1024, settings().shared_limit))) {
    machine.error = cudaErrorInvalidValue;
    return;
  }
  if (settings().dry) return;
  machine.threads = static_cast<int>(block.x);
  machine.fibers.resize(std::max<size_t>(machine.fibers.size(), block.x));
  machine.warps.resize(std::max<size_t>(machine.warps.size(), block.x / 32));
  machine.body = &body;
  gridDim = grid;
  blockDim = block;
  const Settings& how = settings();
  std::vector<unsigned> order(grid.x);
  std::iota(order.begin(), order.end(), 0u);
  if (how.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (how.order == Order::shuffled)
    std::shuffle(order.begin(), order.end(), std::mt19937(how.seed));
  // On the heap and of the exact size: AddressSanitizer sees the first byte past its end.
  const std::unique_ptr<unsigned char[]> memory(new unsigned char[config.dynamicSmemBytes]);
  machine.shared = memory.get();
  for (const unsigned index : order) {
    std::memset(machine.shared, kPoison, config.dynamicSmemBytes);
    blockIdx = {index, 0, 0};
    run_block(how.order == Order::reverse);
  }
  machine.shared = nullptr;
}

}  // namespace cuda_emulation

// ---- the few functions of the runtime that host code calls ----

using cuda_emulation::machine;
using cuda_emulation::settings;

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
  *value = settings().shared_limit;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > settings().shared_limit)
    return cudaErrorInvalidValue;
  machine.shared_opt_in[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  machine.launches.push_back({false, 0, 0, bytes});
  if (!settings().dry) std::memset(pointer, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid value (emulation)";
}

}  // extern "C"
