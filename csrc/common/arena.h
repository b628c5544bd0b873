// Cuts one block of memory into arrays: the workspace of a call, or the shared memory of a CUDA block.
//
// A struct takes its arrays in its constructor. On an arena without memory the same constructor only counts bytes. The
// size of a workspace is always computed this way, so it cannot differ from what the kernel takes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor_types.h"

namespace advdl_ops {

template <int64_t kAlignment>
struct ArenaOf {
  unsigned char* base = nullptr;  // null: only count bytes
  int64_t bytes = 0;

  ADVDL_HOST_DEVICE explicit ArenaOf(void* memory = nullptr)
      : base(static_cast<unsigned char*>(memory)) {}

  // The next `count` elements, aligned to kAlignment bytes. Without memory, the address must not be used.
  template <class T>
  ADVDL_HOST_DEVICE T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(base + bytes);
    bytes += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return array;
  }
};

// A workspace. Each array begins at a cache line.
using Arena = ArenaOf<64>;

// The bytes that take(arena) takes. Host code.
template <class Take>
inline __attribute__((always_inline)) size_t bytes_taken(const Take& take) {
  Arena counted;
  take(counted);
  return static_cast<size_t>(counted.bytes);
}

}  // namespace advdl_ops
