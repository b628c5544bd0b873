// A copy of an image in the other memory format: [N, C, S] -> [N, S, C] or back, which is N transpositions of a matrix.
#pragma once

#include <cstddef>
#include <cstdint>

namespace advdl_ops {

struct ConvertLayout {
  int64_t n = 0, rows = 0, columns = 0;
  bool to_last = false;        // rows are channels, columns are pixels; else the other way around
  int64_t element_bytes = 4;   // 2, 4 or 8; the dtype itself does not matter
  const void* from = nullptr;  // [N, rows, columns]
  void* to = nullptr;          // [N, columns, rows]; must not overlap `from`
};

namespace cpu {
void convert_layout(const ConvertLayout& p);
}  // namespace cpu

}  // namespace advdl_ops
