#include "probes.h"

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace advdl_ops::python {
namespace {

using Clock = std::chrono::steady_clock;

// Runs work(thread) `repeats` times on all threads, which start together. Returns the shortest time in seconds.
template <class Work>
double best_time(int threads, int repeats, const Work& work) {
  std::barrier gate(threads);
  double best = 1e30;
  auto body = [&](int thread) {
    for (int repeat = 0; repeat < repeats; ++repeat) {
      gate.arrive_and_wait();
      const auto start = Clock::now();
      work(thread);
      gate.arrive_and_wait();
      if (thread == 0) {
        best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
      }
    }
  };
  std::vector<std::jthread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(body, thread);
  body(0);
  others.clear();  // joins
  return best;
}

// --- copy ---------------------------------------------------------------------------------------

constexpr size_t kLine = 64;  // bytes; every thread copies whole lines

void copy_plain(char* out, const char* in, size_t bytes) { std::memcpy(out, in, bytes); }

#if defined(__x86_64__)
// Non-temporal stores do not read the cache line that they write, which saves a third of the memory traffic.
void copy_streaming(char* out, const char* in, size_t bytes) {
  for (size_t i = 0; i < bytes; i += kLine) {
    const auto* from = reinterpret_cast<const __m128i*>(in + i);
    auto* to = reinterpret_cast<__m128i*>(out + i);
    const __m128i a = _mm_load_si128(from), b = _mm_load_si128(from + 1);
    const __m128i c = _mm_load_si128(from + 2), d = _mm_load_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
  }
  _mm_sfence();
}

__attribute__((target("avx2"))) void copy_streaming_avx2(char* out, const char* in, size_t bytes) {
  for (size_t i = 0; i < bytes; i += kLine) {
    const auto* from = reinterpret_cast<const __m256i*>(in + i);
    auto* to = reinterpret_cast<__m256i*>(out + i);
    const __m256i a = _mm256_load_si256(from), b = _mm256_load_si256(from + 1);
    _mm256_stream_si256(to, a);
    _mm256_stream_si256(to + 1, b);
  }
  _mm_sfence();
}
#endif

using Copy = void (*)(char*, const char*, size_t);

std::vector<Copy> copies() {
  std::vector<Copy> list{copy_plain};
#if defined(__x86_64__)
  list.push_back(copy_streaming);
  if (__builtin_cpu_supports("avx2")) list.push_back(copy_streaming_avx2);
#endif
  return list;
}

struct Free {
  void operator()(char* pointer) const { std::free(pointer); }
};

std::unique_ptr<char, Free> allocate(size_t bytes) {
  char* pointer = static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
  if (pointer == nullptr) throw std::bad_alloc();
  return std::unique_ptr<char, Free>(pointer);
}

// --- multiply-add -------------------------------------------------------------------------------

constexpr int kChains =
    12;  // at least latency x ports of current CPUs, fewer than the 16 registers
constexpr int64_t kFmaSteps = 1 << 20;

// V is a GCC/Clang vector of floats. Each chain repeats x = x * a + b, which converges to 1.
template <class V>
inline __attribute__((always_inline)) float fma_chains() {
  V x[kChains];
  const V a = V{} + 0.5f, b = V{} + 0.5f;
  for (int i = 0; i < kChains; ++i) x[i] = V{} + static_cast<float>(i);
  for (int64_t step = 0; step < kFmaSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) x[i] = x[i] * a + b;
  }
  V sum{};
  for (int i = 0; i < kChains; ++i) sum += x[i];
  return sum[0];
}

template <int bytes>
struct Vector {
  typedef float type __attribute__((vector_size(bytes)));
};

struct Flops {
  float (*run)();
  int lanes;
};

float fma_default() { return fma_chains<Vector<16>::type>(); }
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) float fma_avx2() { return fma_chains<Vector<32>::type>(); }
__attribute__((target("avx512f"))) float fma_avx512() { return fma_chains<Vector<64>::type>(); }
#endif

std::vector<Flops> multiply_adds() {
  std::vector<Flops> list{{fma_default, 4}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    list.push_back({fma_avx2, 8});
  if (__builtin_cpu_supports("avx512f")) list.push_back({fma_avx512, 16});
#endif
  return list;
}

}  // namespace

double copy_bandwidth(size_t bytes, int threads) {
  const size_t lines = (bytes + kLine - 1) / kLine;
  const auto in = allocate(lines * kLine), out = allocate(lines * kLine);
  const auto range = [&](int thread) {
    const size_t begin = lines * thread / threads, end = lines * (thread + 1) / threads;
    return std::pair(begin * kLine, (end - begin) * kLine);
  };
  // Each thread first writes its part: this maps the pages, in memory near the thread.
  best_time(threads, 1, [&](int thread) {
    const auto [offset, size] = range(thread);
    std::memset(in.get() + offset, 1, size);
    std::memset(out.get() + offset, 0, size);
  });
  double best = 1e30;
  for (const Copy copy : copies()) {
    best = std::min(best, best_time(threads, 7, [&](int thread) {
                      const auto [offset, size] = range(thread);
                      copy(out.get() + offset, in.get() + offset, size);
                    }));
  }
  return 2.0 * static_cast<double>(lines * kLine) / std::max(best, 1e-9);
}

double peak_flops(int threads) {
  std::vector<float> sink(threads);  // a result that is used cannot be optimised away
  double best = 0;
  for (const Flops& kind : multiply_adds()) {
    const double seconds = best_time(threads, 5, [&](int thread) { sink[thread] = kind.run(); });
    const double flops = 2.0 * kChains * kFmaSteps * kind.lanes * threads;
    best = std::max(best, flops / std::max(seconds, 1e-9));
  }
  volatile float used = sink[0];
  (void)used;
  return best;
}

}  // namespace advdl_ops::python
