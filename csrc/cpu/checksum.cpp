// Each lane of several vectors runs through its words by the round of xxHash32 (https://github.com/Cyan4973/xxHash). Every
// round is a bijection of the state and of the word, so a change of one word reaches the end. The rotation between the two
// products spreads a change of the highest bit, which one product alone would leave there.
#include "../common/checksum.h"

#include "dispatch.h"
#include "simd.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

typedef uint32_t Words __attribute__((vector_size(ADVDL_VECTOR_BYTES)));
constexpr int64_t kChains = 8, kStep = kChains * ADVDL_VECTOR_BYTES;
constexpr int64_t kBlockBytes = 64 * 1024, kMostBlocks = 1024;
constexpr uint64_t kOdd = 0x9E3779B97F4A7C15;

ADVDL_INLINE Words mixed(Words state, Words word) {
  const Words sum = state + word * 0x85EBCA77u;
  return ((sum << 13) | (sum >> 19)) * 0x9E3779B1u;
}

ADVDL_INLINE uint64_t mixed(uint64_t state, uint64_t word) {
  const uint64_t product = (state ^ word) * kOdd;
  return product ^ (product >> 32);
}

uint64_t of_block(const char* bytes, int64_t count) {
  Words chains[kChains];
  for (int k = 0; k < kChains; ++k) chains[k] = Words{} + static_cast<uint32_t>(k + 1);
  const auto step = [&](const char* from) {
#pragma GCC unroll 8
    for (int k = 0; k < kChains; ++k) {
      Words words;
      std::memcpy(&words, from + k * ADVDL_VECTOR_BYTES, sizeof(words));
      chains[k] = mixed(chains[k], words);
    }
  };
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) step(bytes + i);
  if (i < count) {
    char rest[kStep] = {};
    std::memcpy(rest, bytes + i, count - i);
    step(rest);
  }
  Words all = chains[0];
  for (int k = 1; k < kChains; ++k) all = mixed(all, chains[k]);
  uint64_t sum = static_cast<uint64_t>(count);
  for (int64_t lane = 0; lane < ADVDL_VECTOR_BYTES / 4; ++lane) sum = mixed(sum, all[lane]);
  return sum;
}

uint64_t run(const void* bytes, int64_t count) {
  const int64_t most = round_up(ceil_div(count, kMostBlocks), kStep);
  const int64_t block = most > kBlockBytes ? most : kBlockBytes, blocks = ceil_div(count, block);
  uint64_t of_blocks[kMostBlocks];
  cpu::parallel_ranges(blocks, block / 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, size = count - first < block ? count - first : block;
      of_blocks[b] = of_block(static_cast<const char*>(bytes) + first, size);
    }
  });
  uint64_t sum = static_cast<uint64_t>(count);
  for (int64_t b = 0; b < blocks; ++b) sum = mixed(sum, of_blocks[b]);
  return sum;
}

}  // namespace

void add_checksum(cpu::KernelTable& table) { table.checksum = run; }

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
